"""Measurements of what a compressed KV cache costs, and of others beside it under the same protocol.

`methods` names what is compared, `transfer` is the protocol, `results` keeps what was measured.
"""
