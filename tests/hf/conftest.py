"""Fixtures of the tests with two processes."""

from pairs import kind, pair, start_pair

__all__ = ["kind", "pair", "start_pair"]
