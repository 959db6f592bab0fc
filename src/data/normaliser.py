"""The normaliser of voxels, fitted on training trials only and stored with the model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.utils.extmath import randomized_svd

from src.data.subject import Subject
from src.utils import PerceptError, atomic


class Normaliser:
    """z-score of each voxel with the mean and standard deviation of training trials, for each
    session or for all together; if asked, of the voxels of some regions alone, and followed by a
    projection on the first principal components of the training trials.

    It is given whole rows of betas whatever it selects, and stored with the model: each network
    finds its own voxels.

    Args:
        mean: float32 (sessions, selected), selected being all voxels unless `columns` says which.
        std: float32 (sessions, selected), 1 where a voxel is constant.
        sessions: int64 (sessions,), or None for one row that holds for every session.
        components: float32 (selected, components), which z-scored voxels are multiplied with, or
            None.
        columns: int64 (selected,), the voxels that are taken, or None for all.
        rois: names of the regions that these are of.
        n_voxels: voxels of the rows that `apply` is given; needed with `columns`.
        masked: `apply` gives all voxels, those that are not taken as 0, instead of the selected
            ones.
    """

    def __init__(
        self,
        mean: np.ndarray,
        std: np.ndarray,
        sessions: np.ndarray | None,
        components: np.ndarray | None = None,
        columns: np.ndarray | None = None,
        rois: tuple[str, ...] = (),
        n_voxels: int = 0,
        masked: bool = False,
    ):
        self.mean, self.std, self.sessions, self.components = mean, std, sessions, components
        self.columns, self.rois, self.n_voxels, self.masked = (
            columns,
            rois,
            n_voxels or mean.shape[1],
            masked,
        )

    @property
    def n_features(self) -> int:
        """Columns that `apply` gives: voxels (the selected ones; all if masked) or components."""
        if self.masked:
            return self.n_voxels
        return self.mean.shape[1] if self.components is None else self.components.shape[1]

    @classmethod
    def fit(
        cls,
        subject: Subject,
        by_session: bool = True,
        n_components: int = 0,
        seed: int = 42,
        rois: str = "",
        masked: bool = False,
    ) -> Normaliser:
        """Fit on trials of split train only, in float64 (the components in float32).

        Args:
            subject: from `open_subject`.
            by_session: z-score each session by itself.
            n_components: number of principal components (of the selected voxels), 0 for the voxels
                themselves.
            seed: of the randomised search for components.
            rois: regions whose voxels are taken, as for `Subject.select_rois`, "" or "-" for all
                voxels.
            masked: keep all voxels, those of no such region as 0 (the published form of the ROI
                project), instead of the selected ones alone.

        Raises:
            PerceptError: for components of a masked selection, if there are fewer than two training
                trials, or fewer dimensions in them than components are asked for, or none of the
                regions.

        Warns:
            UserWarning: naming sessions with fewer than two training trials, which are z-scored
                with the training trials of all sessions; with the number of voxels that are
                constant in some session, which become 0. Also as `Subject.select_rois`.
        """
        if masked and n_components:
            raise PerceptError(
                "Components are made of the selected voxels: leave masked at False, or n_components"
                " at 0."
            )
        columns, found = subject.select_rois(rois) if rois.strip() not in ("", "-") else (None, ())
        trials = subject.trials
        train, session = (trials["split"] == "train").to_numpy(), trials["session"].to_numpy()
        if not train.any():
            raise PerceptError(
                f"Subject {subject.subj} of {subject.folder.name} has no training trials to fit a "
                "normaliser on."
            )
        sessions = subject.sessions if by_session else None
        if train.sum() < 2:
            raise PerceptError(
                f"Subject {subject.subj} of {subject.folder.name} has one training trial, too few"
                " for a z-score."
            )
        groups = (
            [np.flatnonzero(train)]
            if sessions is None
            else [np.flatnonzero(train & (session == s)) for s in sessions]
        )
        few = [i for i, rows in enumerate(groups) if len(rows) < 2]
        if (
            few and sessions is not None
        ):  # sessions of test trials alone, as in GOD: their own statistics would be the test set's
            warnings.warn(
                f"Sessions {sessions[few].tolist()[:10]} have fewer than two training trials: they"
                " are z-scored with all training trials.",
                stacklevel=2,
            )
            groups = [np.flatnonzero(train) if i in few else rows for i, rows in enumerate(groups)]
        moments = [compute_moments(subject.betas, rows, columns) for rows in groups]
        mean, std = (np.stack(values) for values in zip(*moments, strict=True))
        constant = std <= 1e-7 * np.abs(mean)
        if constant.any():
            warnings.warn(
                f"{int(constant.any(0).sum())} of {mean.shape[1]} voxels do not vary over the"
                " training trials of some session; they become 0.",
                stacklevel=2,
            )
        std[constant] = 1.0
        made = cls(
            mean.astype(np.float32),
            std.astype(np.float32),
            sessions,
            None,
            columns,
            found,
            subject.betas.shape[1],
            masked and columns is not None,
        )
        if n_components:
            made.components = _components(subject, made, n_components, seed)
        return made

    def apply(self, betas: np.ndarray, sessions: Sequence[int] | np.ndarray) -> np.ndarray:
        """z-score, and project where there are components.

        Args:
            betas: (trials, voxels), all of the subject's.
            sessions: (trials,) the session of each.

        Returns:
            float32 (trials, selected), (trials, components), or (trials, voxels) if masked.

        Raises:
            PerceptError: if the number of voxels is another one than that of the fit, or a session
                was not there.
        """
        betas, sessions = np.asarray(betas), np.asarray(sessions)
        if betas.ndim != 2 or betas.shape[1] != self.n_voxels or sessions.shape != betas.shape[:1]:
            raise PerceptError(
                f"The normaliser is for (trials, {self.n_voxels}) voxels, these are {betas.shape} "
                f"with {sessions.shape} sessions: "
                "they belong to another subject or another selection of voxels."
            )
        row = np.zeros(len(betas), np.int64)
        if self.sessions is not None:
            row = np.searchsorted(self.sessions, sessions).clip(max=len(self.sessions) - 1)
            unseen = sessions[self.sessions[row] != sessions]
            if len(unseen):
                raise PerceptError(
                    f"The normaliser was fitted without session {unseen[0]}: fit it again with "
                    "by_session=False."
                )
        out = (
            betas.astype(np.float32)
            if self.columns is None
            else betas[:, self.columns].astype(np.float32)
        )
        for r in np.unique(row):  # one session after the other: no copy of mean and std a trial
            mine = row == r
            out[mine] = (out[mine] - self.mean[r]) / self.std[r]
        if self.masked:
            whole = np.zeros((len(out), self.n_voxels), np.float32)
            whole[:, self.columns] = out
            return whole
        return out if self.components is None else out @ self.components

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {"mean": self.mean, "std": self.std}
        if self.sessions is not None:
            tensors["sessions"] = np.asarray(self.sessions, np.int64)
        if self.components is not None:
            tensors["components"] = np.ascontiguousarray(self.components)
        if self.columns is not None:
            tensors["columns"] = np.asarray(self.columns, np.int64)
        with atomic(path) as temporary:
            told = {
                "rois": ",".join(self.rois),
                "n_voxels": str(self.n_voxels),
                "masked": "yes" if self.masked else "",
            }
            save_file(tensors, temporary, metadata=told)

    @classmethod
    def for_checkpoint(cls, path: str | Path) -> Normaliser | None:
        """The normaliser that a decoder was trained with, from the folder of its file or the one
        above (train_logs/<run>/low_level/last.safetensors); None for a released file (.pth), which
        is for betas as they are.

        Raises PerceptError as `load`.
        """
        if Path(path).suffix == ".pth":
            return None
        near = [folder / "normaliser.safetensors" for folder in Path(path).parents[:2]]
        return cls.load(next((file for file in near if file.exists()), near[-1]))

    @classmethod
    def load(cls, path: str | Path) -> Normaliser:
        """Read a file of `save`. Raises PerceptError if it is missing or something else."""
        if not Path(path).exists():
            raise PerceptError(
                f"The normaliser {path} is missing: run the training notebook of this run first."
            )
        try:
            with safe_open(path, framework="np") as file:
                # noqa: SIM118 (the file is no dict)
                tensors, told = (
                    {key: file.get_tensor(key) for key in file.keys()},
                    file.metadata() or {},
                )
        except SafetensorError as error:
            raise PerceptError(
                f"{path} is no safetensors file ({error}): run the training notebook of this run"
                " again."
            ) from error
        if not {"mean", "std"} <= set(tensors):
            raise PerceptError(
                f"{path} holds {sorted(tensors)}, not the mean and std of a normaliser."
            )
        rois = tuple(name for name in told.get("rois", "").split(",") if name)
        sessions, components, columns = (
            tensors.get(name) for name in ("sessions", "components", "columns")
        )
        return cls(
            tensors["mean"],
            tensors["std"],
            sessions,
            components,
            columns,
            rois,
            int(told.get("n_voxels", 0)),
            bool(told.get("masked")),
        )


def compute_moments(
    betas: np.ndarray, rows: np.ndarray, columns: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (of the population) over rows, float64 (voxels,), in blocks and
    shifted by the first row; of some columns where they are given.
    """
    chosen = slice(None) if columns is None else columns
    shift = betas[rows[0]][chosen].astype(np.float64)
    total, square = np.zeros_like(shift), np.zeros_like(shift)
    for start in range(0, len(rows), 256):
        x = betas[rows[start : start + 256]][:, chosen].astype(np.float64) - shift
        total += x.sum(0)
        square += np.einsum("tv,tv->v", x, x)
    mean = total / len(rows)
    return shift + mean, np.sqrt(np.maximum(square / len(rows) - mean**2, 0.0))


def _components(subject: Subject, zscore: Normaliser, n_components: int, seed: int) -> np.ndarray:
    """First principal components of the z-scored training trials, each divided by its standard
    deviation over them, float32 (voxels, components).

    All training trials are held once, in float32. Their mean is 0 already. The search is that of
    Halko, Martinsson & Tropp 2011, with so many iterations that the variance kept is the most there
    is also where the spectrum falls slowly (tests/test_data.py).
    """
    size = (int((subject.trials["split"] == "train").sum()), zscore.n_features)
    if not 1 <= n_components <= min(size):
        raise PerceptError(
            f"n_components is {n_components}: choose 0 for all voxels, or at most {min(size)}, as"
            f" there are {size} (training trials, voxels)."
        )
    z, _ = subject.get_trials("train", zscore)
    _, _, axes = randomized_svd(
        z, n_components, n_oversamples=n_components + 10, n_iter=10, random_state=seed
    )  # axes (components, voxels)
    spread = (z @ axes.T).std(0, dtype=np.float64)
    if empty := int((spread <= 1e-4 * spread.max()).sum()):
        raise PerceptError(
            f"n_components is {n_components}, but the training trials vary in"
            f" {n_components - empty} dimensions only: choose at most that."
        )
    return np.ascontiguousarray((axes / spread[:, None]).T.astype(np.float32))
