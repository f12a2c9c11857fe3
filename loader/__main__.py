"""`loader` and `python -m loader`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what to install where only the emitter is."""
    try:
        from loader.cli.main import cli
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("loader", "spool"):
            raise
        sys.exit(f"loader: {error.name} is not installed: pip install 'analytics-spool[loader]'")
    cli(prog_name="loader")


if __name__ == "__main__":
    main()
