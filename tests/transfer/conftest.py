"""Fixtures of the tests with two processes."""

from pairs import kind, pair, start_pair  # for all tests of two processes

__all__ = ["kind", "pair", "start_pair"]
