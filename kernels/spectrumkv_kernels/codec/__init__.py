"""How tokens are rounded to INT8 and INT4, and back."""
