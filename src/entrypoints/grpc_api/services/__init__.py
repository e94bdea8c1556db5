"""The services: decode, ask a use case, encode."""
