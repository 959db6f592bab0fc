"""state.pt: the state of a training on disk, from which an interrupted run goes on.

- Under DeepSpeed the optimizer's state is in pieces, one file a process beside state.pt, and such a
  run is resumed by as many processes.
- Of a finished run state.pt keeps the history alone, as the weights are in last.safetensors;
  without checkpoints it keeps the weights, too.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from src.files.foreign import shorten
from src.safe_pickle import load_plain_torch_file
from src.training.session import Session
from src.training.state import (
    Position,
    check_same_settings,
    get_random_state,
    set_random_state,
)
from src.training.types import log
from src.utils import (
    PerceptError,
    atomic,
    is_finite,
    is_out_of_memory,
    load_checkpoint,
    load_strictly,
    seed_everything,
)

# entries of state.pt that a run which is not finished has beside its settings and position
TRAINED_STATE = ("model", "optimizer", "scheduler", "scaler", "processes")

# what torch raises over a state that is not of the training that it is given to
STATE_ERRORS = (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError)

WRITTEN_BY_FIT = ("state.pt", "history.csv", "best.safetensors", "last.safetensors")


class StateStore:
    """Saves and restores a session.

    Args:
        session: whose state it is.
        folder: for state.pt.
        config: JSON-like, checked when resuming.
        settings: from `describe_run`, checked when resuming.
        keep_weights: keep the weights of a finished run in state.pt.
    """

    def __init__(
        self,
        session: Session,
        folder: Path,
        config: dict[str, Any],
        settings: dict[str, Any],
        keep_weights: bool,
    ):
        self.session, self.folder = session, folder
        self.config, self.settings, self.keep_weights = config, settings, keep_weights
        self.path = folder / "state.pt"
        self.saved_at = time.monotonic()

    @property
    def pieces(self) -> int:
        """In how many files beside state.pt the optimizer's state is; 0 where state.pt holds it."""
        return self.session.processes if self.session.sharded else 0

    # ------------------------------------------------------------------------------------- saving
    def save(self) -> None:
        """Write the state; all processes take part."""
        session = self.session
        session.update_clock()
        if session.sharded and not session.is_finished:
            with atomic(self._piece_path(vars(session.position), session.rank)) as temporary:
                torch.save(session.optimizer.state_dict(), temporary)
        process = {
            "random": get_random_state(session.device),
            "means": session.means.state(),
        }
        content = {
            "identity": self._identity(),
            "position": vars(session.position),
            "processes": gather_object([process]),
            "threads": torch.get_num_threads(),
        }
        if session.is_main:
            self._write(content)
        session.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _write(self, content: dict[str, Any]) -> None:
        session, current_pieces = self.session, ""
        if not session.is_finished:
            content |= self._trained_state()
            current_pieces = self._piece_path(vars(session.position), "*").name
        elif self.keep_weights:
            with session.averaged_weights():
                weights = session.model.state_dict()
                content |= {"model": {name: value.clone() for name, value in weights.items()}}
        with atomic(self.path) as temporary:
            torch.save(content, temporary)
        self._remove_pieces(current_pieces)

    def _trained_state(self) -> dict[str, Any]:
        session, scaler = self.session, self.session.accelerator.scaler
        return {
            "model": session.model.state_dict(),
            "optimizer": None if session.sharded else session.optimizer.state_dict(),
            "pieces": self.pieces,
            "scheduler": session.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "average": session.average.state_dict() if session.average else None,
        }

    def _identity(self) -> dict[str, Any]:
        """Config and settings as they come back from disk."""
        identity = {"config": self.config, "fit": self.settings}
        try:
            stored: dict[str, Any] = json.loads(json.dumps(identity))
        except TypeError as error:
            raise PerceptError(
                f"The config cannot be stored as JSON ({error}): keep numbers, texts, lists and"
                " dicts in it."
            ) from error
        return stored

    def _piece_path(self, position: dict[str, Any], rank: int | str) -> Path:
        """The optimizer's state in one process; state.pt is written after those of its step, and
        those of the one before are removed last.
        """
        steps = position["epoch"] * self.session.steps_per_epoch + position["step"]
        return self.folder / f"state-{steps}-{rank}.pt"

    def _remove_pieces(self, except_for: str = "") -> None:
        for piece in self.folder.glob("state-*.pt"):
            if not except_for or not piece.match(except_for):
                piece.unlink()

    # ---------------------------------------------------------------------------------- restoring
    def open(self, resume: bool) -> None:
        """Go on from the state on disk, or begin anew.

        Raises:
            PerceptError: if the state cannot be read, or is of other settings.
        """
        session = self.session
        session.accelerator.wait_for_everyone()
        # dropout and noise differ between processes
        seed_everything(session.batching.seed + session.rank)
        identity = self._identity()
        if resume and self.path.exists():
            content = self._read_state()
            check_same_settings(content["identity"]["config"], identity["config"], self.folder)
            check_same_settings(content["identity"]["fit"], identity["fit"], self.folder)
            self._check_trained_state(content)
            self._restore(content)
        elif not resume and session.is_main:
            for name in WRITTEN_BY_FIT:
                (self.folder / name).unlink(missing_ok=True)
            self._remove_pieces()
        session.accelerator.wait_for_everyone()

    def _read(self, path: Path) -> dict[str, Any]:
        # mapped for a GPU, whose process then reads only what it copies; the optimizer may keep its
        # piece as it is
        mapped = self.session.device.type == "cuda" and path == self.path
        content = load_plain_torch_file(path, self._remedy(path), mapped)
        if not isinstance(content, dict):
            raise self._refuse(path, f"holds a {type(content).__name__}, no state of a training")
        return content

    def _remedy(self, path: Path) -> str:
        state = "it" if path == self.path else self.path
        return f"delete {state}, or set resume_from_ckpt to False to begin anew"

    def _refuse(self, path: Path, problem: str) -> PerceptError:
        return PerceptError(f"{path} {problem}: {self._remedy(path)}.")

    def _read_state(self) -> dict[str, Any]:
        """Content of state.pt, of the form that this version writes and earlier ones wrote."""
        content = self._read(self.path)
        identity, position = content.get("identity"), content.get("position")
        is_described = isinstance(identity, dict) and {"config", "fit"} <= identity.keys()
        if not is_described or not isinstance(position, dict):
            raise self._refuse(self.path, "holds no settings and position of a training")
        self._check_position(position)
        return content

    def _check_trained_state(self, content: dict[str, Any]) -> None:
        """Refuse the state of a run that is not finished if a part of it is missing."""
        missing = [name for name in TRAINED_STATE if name not in content]
        if missing and content["position"]["epoch"] < self.session.batching.epochs:
            raise self._refuse(self.path, f"has no {', '.join(missing)} in it")

    def _check_position(self, position: dict[str, Any]) -> None:
        """Refuse a position that this version does not know, or that is none."""
        fields = vars(Position())
        unknown = sorted(set(position) - set(fields))
        if unknown:
            raise self._refuse(
                self.path,
                f"is of another version of this repository, it holds {', '.join(unknown)}, which"
                " this one does not know",
            )
        missing = {"epoch", "step"} - set(position)
        invalid = {n: v for n, v in position.items() if not _is_like(v, fields[n])}
        for name, value in (invalid | dict.fromkeys(missing)).items():
            raise self._refuse(self.path, f"has {value!r} for the {name} that it stands at")

    def _restore(self, content: dict[str, Any]) -> None:
        session = self.session
        session.position = Position(**content["position"])
        if session.is_finished:
            self._restore_finished(content.get("model"))
            return
        self._check_pieces(content.get("pieces", 0))
        try:
            self._restore_weights(content)
            session.scheduler.load_state_dict(content["scheduler"])
            if content["scaler"] and session.accelerator.scaler:
                session.accelerator.scaler.load_state_dict(content["scaler"])
            self._restore_process(content["processes"])
        except STATE_ERRORS as error:
            if is_out_of_memory(error):
                raise
            raise self._refuse(
                self.path, f"does not fit this training ({shorten(error, 100)})"
            ) from error
        self._compare_threads(content.get("threads"))
        position = session.position
        log.info("resuming %s at epoch %d, step %d", self.folder, position.epoch, position.step)

    def _compare_threads(self, before: int | None) -> None:
        """Say where a run goes on with another number of threads, which changes its last digits."""
        threads = torch.get_num_threads()
        if before not in (None, threads) and self.session.device.type == "cpu":
            log.warning(
                "%s goes on with %d threads and was begun with %d: it will not end with the same"
                " bits as a run that was not interrupted (set OMP_NUM_THREADS)",
                self.folder,
                threads,
                before,
            )

    def _restore_finished(self, weights: dict[str, Tensor] | None) -> None:
        path = self.path
        if weights is None:
            path = self.folder / "last.safetensors"
            if not path.exists():
                raise PerceptError(
                    f"The run in {self.folder} is finished, but its last.safetensors is gone: put"
                    " it back, or set resume_from_ckpt to False to train again."
                )
            weights = load_checkpoint(path)[0]
        load_strictly(self.session.model, weights, str(path))
        log.info("%s is finished: %d epochs", self.folder, self.session.position.epoch)

    def _check_pieces(self, saved: int) -> None:
        """Refuse a state that as many processes, with or without DeepSpeed, did not save."""
        if saved == self.pieces:
            return
        before, now = (
            f"by {pieces} processes under DeepSpeed" if pieces else "without DeepSpeed"
            for pieces in (saved, self.pieces)
        )
        raise PerceptError(
            f"{self.path} was saved {before} and cannot be resumed {now}: launch as before, or"
            " set resume_from_ckpt to False to begin anew."
        )

    def _restore_process(self, processes: list[dict[str, Any]]) -> None:
        """Random state and running means of this process, or a fair substitute when their number
        has changed.
        """
        session = self.session
        if len(processes) == session.processes:
            process = processes[session.rank]
            session.means.load([process["means"]])
            set_random_state(process["random"], session.device)
            return
        log.warning(
            "%d processes go on with a run of %d: random numbers differ from here",
            session.processes,
            len(processes),
        )
        session.means.load([p["means"] for p in processes] if session.is_main else [])
        seed_everything(session.batching.seed + session.rank + 1000 * session.steps_done)

    def _restore_weights(self, content: dict[str, Any]) -> None:
        session = self.session
        load_strictly(session.model, content["model"], str(self.path))
        optimizer_state = content["optimizer"]
        if session.sharded:
            # what it updates is a copy of the weights
            session.sharded.engine.optimizer.refresh_fp32_params()
            optimizer_state = self._read(self._piece_path(content["position"], session.rank))
        session.optimizer.load_state_dict(optimizer_state)
        if session.average is not None:
            session.average.load_state_dict(content["average"])
        self._check_moments()

    def _check_moments(self) -> None:
        """Refuse moments of an optimizer that are not finite or not of their parameters."""
        if self.session.sharded:
            return
        for parameter, moments in self.session.optimizer.state.items():
            for name, value in moments.items():
                if not isinstance(value, Tensor):
                    continue
                is_of_parameter = value.ndim == 0 or value.shape == parameter.shape
                if not is_of_parameter or not is_finite(value):
                    raise self._refuse(self.path, f"holds {name} that are not of this network")

    def roll_back(self) -> None:
        """Weights and moments of the last saved state; the learning rate stays that of the
        position.
        """
        optimizer = self.session.optimizer
        current = []
        for group in optimizer.param_groups:
            current.append({name: value for name, value in group.items() if name != "params"})
        self._restore_weights(self._read(self.path))
        for group, values in zip(optimizer.param_groups, current, strict=True):
            group.update(values)


def _is_like(value: Any, example: Any) -> bool:
    """Whether an entry of a stored position can be one, as the example is."""
    if isinstance(example, list):
        return isinstance(value, list) and all(isinstance(row, dict) for row in value)
    if isinstance(example, int):
        return isinstance(value, int) and value >= 0
    return isinstance(value, int | float) and not math.isnan(value)
