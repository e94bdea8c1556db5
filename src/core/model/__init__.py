"""What the product is about: frozen values and their invariants."""
