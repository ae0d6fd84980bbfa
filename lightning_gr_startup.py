"""What Lightning asks for at the start of every Trainer, whoever wrote the script: callbacks to add by themselves.

This stands outside of the package because importing the package takes time, which nobody is to pay who did not ask.
"""

import os
from typing import Any

__all__ = ["callbacks"]


def callbacks() -> list[Any]:
    """The callbacks that the environment variable ``LIGHTNING_GR`` asks for; none where it is not set."""
    text = os.environ.get("LIGHTNING_GR", "").strip()
    if not text:
        return []
    from lightning_gr.cli.environment import callbacks_from

    return callbacks_from(text)
