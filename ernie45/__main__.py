"""`python -m ernie45` is the command `ernie`."""

import sys

from ernie45.cli import main

if __name__ == "__main__":
    sys.exit(main())
