"""Lines for whoever started a run, on standard output."""

from __future__ import annotations

import sys


def show(text: str) -> None:
    """Write a line to standard output at once, also where it is a file or a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
