"""The cache: stores, layers, and what Transformers calls."""
