"""Reads the loaded tables: questions in the terminal, a report page, exports."""
