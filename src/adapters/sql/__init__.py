"""The record in SQL: SQLite and PostgreSQL through one adapter."""
