"""Connectors for LMCache and vLLM, each an optional extra. See docs/engines.md.

Nothing outside imports this package, and importing it imports none of its modules: each needs its engine.
"""
