"""`python -m spool`: see spool/check.py."""

from __future__ import annotations

import sys

from spool.check import main

if __name__ == "__main__":
    sys.exit(main())
