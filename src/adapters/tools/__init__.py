"""The tools that a coach may call: typed async Python functions."""
