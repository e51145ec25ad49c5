"""Attention of new tokens over tiers."""
