"""`python -m onestill` is the command `onestill`."""

from __future__ import annotations

import sys

from onestill.cli import main

if __name__ == "__main__":
    sys.exit(main())
