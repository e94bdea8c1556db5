"""Prices of models, as data."""
