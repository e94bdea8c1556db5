"""What the product does: one story in each file."""
