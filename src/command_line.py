"""Command lines, of run.py, of the exported scripts and in PERCEPT_ARGS.

argparse takes a value that begins with a dash for a flag, prints its usage over many lines, and
ends the process, in a kernel too. Here a flag takes what follows it, whatever that begins with, and
what is wrong is one `UsageError`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

from src.utils import UsageError

PAIR_FLAG = "-p"


class CommandLine(argparse.ArgumentParser):
    """A parser of a command line.

    Attributes:
        origin: what the arguments are called in a message, "" for the program's command line.
    """

    origin = ""

    def add_pairs(self, description: str) -> None:
        """Add -p NAME VALUE, which may be given often; `pairs` of the result lists the pairs.

        The value may begin with a dash.
        """
        self.add_argument(
            PAIR_FLAG,
            dest="pairs",
            nargs=2,
            action="append",
            default=[],
            metavar=("NAME", "VALUE"),
            help=description,
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments, by default this process's.

        Raises:
            UsageError: for what argparse refuses, and for a flag without its value.
        """
        arguments, pairs = self._join_values(sys.argv[1:] if args is None else args)
        parsed, unparsed = super().parse_known_args(arguments, namespace)
        if PAIR_FLAG in self._option_string_actions:
            parsed.pairs = pairs
        return parsed, unparsed

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Raises:
            UsageError: always.
        """
        start = f"{self.origin}: " if self.origin else ""
        raise UsageError(f"{start}{message}; `{self.prog} --help` lists what can be given.")

    def _join_values(self, arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
        """Join flags and their values, ["--rois", "-;V1"] to ["--rois=-;V1"], and take out -p.

        Returns:
            The other arguments, and the pairs of -p.
        """
        joined: list[str] = []
        pairs: list[tuple[str, str]] = []
        waiting = deque(arguments)
        while waiting:
            flag = waiting.popleft()
            action = self._option_string_actions.get(flag)
            if flag == "--":
                return [*joined, flag, *waiting], pairs
            if flag == PAIR_FLAG and action is not None:
                name = self._take_value(waiting, f"{flag} takes a NAME and a VALUE")
                value = self._take_value(waiting, f"{flag} {name} has no value")
                pairs.append((name, value))
            elif action is not None and action.nargs is None:
                value = self._take_value(waiting, f"{flag} has no value")
                joined.append(f"{flag}={value}" if flag.startswith("--") else f"{flag}{value}")
            else:
                joined.append(flag)
        return joined, pairs

    def _take_value(self, waiting: deque[str], complaint: str) -> str:
        """The next argument; refuses the end, and another flag."""
        if not waiting or waiting[0].split("=")[0] in self._option_string_actions:
            self.error(complaint)
        return waiting.popleft()


def split_command(text: str, origin: str) -> list[str]:
    """Split a command line as a shell does.

    Args:
        text: the command line.
        origin: where it stands, for the message, e.g. "--launch".

    Raises:
        UsageError: for a quote that is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        shortened = repr(text if len(text) <= 200 else f"...{text[-200:]}")
        raise UsageError(
            f"{origin} is {shortened}, which cannot be split ({str(error).lower()}): close every"
            " quote, and put a backslash before one that is meant as such."
        ) from error
