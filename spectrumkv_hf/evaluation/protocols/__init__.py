"""How it is measured: numbers from a model and a method, without files or arguments."""
