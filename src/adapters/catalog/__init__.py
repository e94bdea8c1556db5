"""The agents on offer, as data: one TOML file a coach."""
