#!python
"""`analytics-loader`: `loader` where an application has a loader.py of its own on PYTHONPATH.

Installed as a script and not as an entry point, which would import `loader` from the first place that has one.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    of_others = {Path(path).resolve() for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    of_others.add(Path(__file__).resolve().parent)
    last = [path for path in sys.path if Path(path).resolve() in of_others]
    sys.path = [path for path in sys.path if path not in last] + last

    from loader.__main__ import main

    main()
