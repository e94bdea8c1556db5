"""What the core asks of the outside. The docstrings are the contract."""
