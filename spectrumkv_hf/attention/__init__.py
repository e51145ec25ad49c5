"""How attention reaches a tiered layer: handles in the place of keys and values, and the hook that finds them."""
