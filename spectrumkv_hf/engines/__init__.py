"""Serving engines that carry caches in this package's codec: LMCache and vLLM.

Each module needs its engine installed and is imported by it or by its user; nothing else of the package imports them.
"""
