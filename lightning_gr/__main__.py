"""Makes ``python -m lightning_gr`` run the command ``lightning-gr``."""

import sys

from lightning_gr_startup import main

if __name__ == "__main__":
    sys.exit(main())
