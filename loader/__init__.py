"""Loads spool segments into Postgres; see README.md."""
