"""One training at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import gather_object

from src.files.ownership import lock_folder
from src.training.session import Session
from src.utils import PerceptError


@contextmanager
def own_training(session: Session, folder: Path) -> Iterator[None]:
    """Own the folder of a training; the main process does so for all that were launched with it.

    Args:
        session: of this process.
        folder: that `fit` writes.

    Raises:
        PerceptError: in each of the processes, if another training is writing the folder.
    """
    with ExitStack() as stack:
        refusal = ""
        if session.is_main:
            try:
                stack.enter_context(lock_folder(folder, f"training {folder.name}"))
            except PerceptError as error:
                refusal = str(error)
        refusals = [text for text in gather_object([refusal]) if text]
        if refusals:
            raise PerceptError(refusals[0])
        yield
