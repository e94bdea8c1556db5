"""Entrypoints: the gRPC service and the commands, composed here."""
