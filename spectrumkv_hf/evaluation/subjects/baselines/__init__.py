"""Other people's ways to hold a KV cache, as methods: one file a family.

`methods.BASELINES` names them. A family is imported when a spec asks for it, and its package when a cache is made.
"""
