"""Where caches go besides `torch.distributed`: transports, and connectors for LMCache and vLLM, each an optional extra.

Nothing outside imports this package, and importing it imports none of its modules: `directory` needs nothing more,
`nixl` the extra of that name, the connectors their engine. See docs/engines.md.
"""
