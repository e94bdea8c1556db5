"""Adapters: the outside, behind the ports of the core."""
