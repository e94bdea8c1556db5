"""The speed suite: how the service compares with references that this starts itself, in one run."""
