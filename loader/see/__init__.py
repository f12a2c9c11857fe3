"""Reads the loaded tables for questions in the terminal, the report page, and exports."""
