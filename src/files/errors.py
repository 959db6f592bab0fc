"""The errors that a user sees: one sentence, without a traceback."""

from __future__ import annotations


class PerceptError(Exception):
    """Bad input, in one sentence."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows in place of a traceback."""
        return [f"PerceptError: {self}"]


class UsageError(PerceptError):
    """A command line, recipe or parameter that cannot be used; programs end with exit code 2."""
