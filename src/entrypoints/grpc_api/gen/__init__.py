"""Generated from proto/. Never edited."""
