"""The Hadamard matrix, and the rotation by position (RoPE)."""
