"""`loader` and `python -m loader`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or report what to install if only the emitter is installed."""
    if sys.argv[1:] == ["--version"]:  # without click, whose import takes most of the run time
        from importlib.metadata import version

        print(f"loader, version {version('analytics-spool')}")
        return
    try:
        from loader.cli.main import cli
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("loader", "spool"):
            raise
        from loader.extras import missing

        sys.exit(f"loader: {missing(str(error.name), 'loader')}")
    cli(prog_name="loader")


if __name__ == "__main__":
    main()
