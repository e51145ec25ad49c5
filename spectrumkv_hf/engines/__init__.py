"""Where caches go besides `torch.distributed`: transports and connectors, each an optional extra.

Nothing outside imports this package, and importing it imports none of its modules: `directory` needs nothing more,
`nixl` the extra of that name. See docs/engines.md.
"""
