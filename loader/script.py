#!python
"""`analytics-loader`: the `loader` command if an application has its own loader.py on PYTHONPATH.

Installed as a script, not as an entry point: an entry point would import the first `loader` on sys.path.
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
