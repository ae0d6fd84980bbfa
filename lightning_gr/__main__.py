"""``python -m lightning_gr`` is ``lightning-gr``."""

import sys

from lightning_gr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
