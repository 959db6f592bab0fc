"""The normaliser of voxels, fitted on training trials only and stored with the model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from src.data.files import Ids
from src.data.subject import Subject
from src.utils import PerceptError, atomic, open_tensors, require_file

FILE_NAME = "normaliser.safetensors"

REMEDY = "run the training notebook of this run again"


class Normaliser:
    """z-score of each voxel with the mean and standard deviation of training trials.

    These are of each session or of all together. If asked, only the voxels of some regions are
    used, and a projection on the first principal components of the training trials follows.

    It is given whole rows of betas whatever it selects, and stored with the model: each network
    finds its own voxels.

    Args:
        mean: float32 (sessions, selected), selected being all voxels unless `columns` says which.
        std: float32 (sessions, selected), 1 where a voxel is constant.
        sessions: int64 (sessions,), or None for one row that holds for every session.
        components: float32 (selected, components), which z-scored voxels are multiplied with, or
            None.
        columns: int64 (selected,), the voxels that are selected, or None for all.
        rois: names of the regions that these are of.
        n_voxels: voxels of the rows that `apply` is given; needed with `columns`.
        masked: `apply` gives all voxels, 0 for those that are not selected, instead of the selected
            ones alone.
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
        self.mean, self.std, self.sessions = mean, std, sessions
        self.components, self.columns, self.rois = components, columns, rois
        self.n_voxels = n_voxels or mean.shape[1]
        self.masked = masked

    @property
    def n_features(self) -> int:
        """Columns that `apply` gives: voxels (the selected ones; all if masked) or components."""
        if self.masked:
            return self.n_voxels
        columns = self.mean if self.components is None else self.components
        return int(columns.shape[1])

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
            rois: regions whose voxels are selected, as for `Subject.select_rois`, "" or "-" for all
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
        columns: np.ndarray | None = None
        regions: tuple[str, ...] = ()
        if rois.strip() not in ("", "-"):
            columns, regions = subject.select_rois(rois)
        sessions = subject.sessions if by_session else None
        groups = _group_training_rows(subject, sessions)
        mean, std = _fit_moments(subject.betas, groups, columns)
        normaliser = cls(
            mean.astype(np.float32),
            std.astype(np.float32),
            sessions,
            columns=columns,
            rois=regions,
            n_voxels=subject.betas.shape[1],
            masked=masked and columns is not None,
        )
        if n_components:
            normaliser.components = _fit_components(subject, normaliser, n_components, seed)
        return normaliser

    def apply(self, betas: np.ndarray, sessions: Ids) -> np.ndarray:
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
        selected = betas if self.columns is None else betas[:, self.columns]
        z = selected.astype(np.float32)
        positions = self._find_sessions(sessions)
        for position in np.unique(positions):  # no copy of mean and std for each trial
            rows = positions == position
            z[rows] = (z[rows] - self.mean[position]) / self.std[position]
        if self.masked:
            unmasked = np.zeros((len(z), self.n_voxels), np.float32)
            unmasked[:, self.columns] = z
            return unmasked
        return z if self.components is None else z @ self.components

    def _find_sessions(self, sessions: np.ndarray) -> np.ndarray:
        """Row of `mean` and `std` for each trial, int64 (trials,)."""
        if self.sessions is None:
            return np.zeros(len(sessions), np.int64)
        positions = np.searchsorted(self.sessions, sessions).clip(max=len(self.sessions) - 1)
        unseen = sessions[self.sessions[positions] != sessions]
        if len(unseen):
            raise PerceptError(
                f"The normaliser was fitted without session {unseen[0]}: fit it again with "
                "by_session=False."
            )
        return positions

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {"mean": self.mean, "std": self.std}
        if self.sessions is not None:
            tensors["sessions"] = np.asarray(self.sessions, np.int64)
        if self.components is not None:
            tensors["components"] = np.ascontiguousarray(self.components)
        if self.columns is not None:
            tensors["columns"] = np.asarray(self.columns, np.int64)
        metadata = {
            "rois": ",".join(self.rois),
            "n_voxels": str(self.n_voxels),
            "masked": "yes" if self.masked else "",
        }
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def for_checkpoint(cls, path: str | Path) -> Normaliser | None:
        """Load the normaliser that a decoder was trained with.

        It lies in the folder of the checkpoint or the one above
        (train_logs/<run>/low_level/last.safetensors).

        Returns:
            None for a released file (.pth), which is for betas as they are.

        Raises:
            PerceptError: as `load`.
        """
        if Path(path).suffix == ".pth":
            return None
        candidates = [folder / FILE_NAME for folder in Path(path).parents[:2]]
        existing = [file for file in candidates if file.exists()]
        return cls.load(existing[0] if existing else candidates[-1])

    @classmethod
    def load(cls, path: str | Path) -> Normaliser:
        """Read a file of `save`.

        Raises:
            PerceptError: if it is missing or something else.
        """
        path = require_file(path, "normaliser", "run the training notebook of this run first")
        with open_tensors(path, framework="np", remedy=REMEDY) as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
            texts = file.metadata() or {}
        if not {"mean", "std"} <= set(arrays):
            raise PerceptError(
                f"{path} holds {sorted(arrays)}, not the mean and std of a normaliser."
            )
        _check_dimensions(arrays, path)
        n_voxels = texts.get("n_voxels", str(arrays["mean"].shape[1]))
        _check_arrays(arrays, n_voxels, path)
        return cls(
            arrays["mean"],
            arrays["std"],
            arrays.get("sessions"),
            arrays.get("components"),
            arrays.get("columns"),
            tuple(name for name in texts.get("rois", "").split(",") if name),
            int(n_voxels),
            bool(texts.get("masked")),
        )


def _check_dimensions(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Refuse arrays of a file that have another number of axes than those of a normaliser."""
    for name, axes in {"mean": 2, "std": 2, "components": 2, "sessions": 1, "columns": 1}.items():
        if name in arrays and arrays[name].ndim != axes:
            raise PerceptError(f"{path} holds a {name} of shape {arrays[name].shape}: {REMEDY}.")


def _check_arrays(arrays: dict[str, np.ndarray], n_voxels: str, path: Path) -> None:
    """Refuse the arrays of a file that are no normaliser of so many voxels.

    Raises:
        PerceptError: naming the file and what is wrong.
    """
    mean, std = arrays["mean"], arrays["std"]
    n_rows, selected = mean.shape
    sessions, columns = arrays.get("sessions"), arrays.get("columns")
    components = arrays.get("components")
    voxels = int(n_voxels) if n_voxels.isdecimal() else -1
    problem = ""
    if std.shape != mean.shape:
        problem = f"a mean of {mean.shape} and a std of {std.shape}"
    elif n_rows != (1 if sessions is None else len(sessions)):
        problem = f"{n_rows} rows, which are not one a session"
    elif sessions is not None and not _is_ascending(sessions):
        problem = "sessions that are no ascending numbers"
    elif columns is None and voxels != selected:
        problem = f"{selected} voxels, where its texts say {n_voxels}"
    elif columns is not None and not _are_positions(columns, selected, voxels):
        problem = f"columns that are not {selected} of {n_voxels} voxels"
    elif components is not None and len(components) != selected:
        problem = f"components of {len(components)} voxels for {selected}"
    elif not _are_finite(mean, std, components) or not (std > 0).all():
        problem = "NaN, infinity or a std that is not above 0"
    if problem:
        raise PerceptError(f"{path} holds {problem}: {REMEDY}.")


def _are_finite(*arrays: np.ndarray | None) -> bool:
    """Whether these are fractions, and all of them finite."""
    loaded = [array for array in arrays if array is not None]
    return all(array.dtype.kind == "f" and np.isfinite(array).all() for array in loaded)


def _is_ascending(numbers: np.ndarray) -> bool:
    """Whether these are whole numbers (n,), each larger than the one before."""
    return numbers.ndim == 1 and numbers.dtype.kind == "i" and bool((np.diff(numbers) > 0).all())


def _are_positions(columns: np.ndarray, count: int, stop: int) -> bool:
    """Whether these are `count` ascending positions from 0 to `stop`, without it."""
    if len(columns) != count or not _is_ascending(columns):
        return False
    return bool(count == 0 or (columns[0] >= 0 and columns[-1] < stop))


def _group_training_rows(subject: Subject, sessions: np.ndarray | None) -> list[np.ndarray]:
    """Rows of the training trials of each session, of all together where `sessions` is None.

    Sessions with fewer than two training trials, such as those of test trials alone in GOD, are
    given the training trials of all sessions: their own statistics would be those of the test set.
    """
    owner = f"Subject {subject.subj} of {subject.folder.name}"
    is_train = (subject.trials["split"] == "train").to_numpy()
    if not is_train.any():
        raise PerceptError(f"{owner} has no training trials to fit a normaliser on.")
    if is_train.sum() < 2:
        raise PerceptError(f"{owner} has one training trial, too few for a z-score.")
    all_rows = np.flatnonzero(is_train)
    if sessions is None:
        return [all_rows]
    session = subject.trials["session"].to_numpy()
    groups = [np.flatnonzero(is_train & (session == number)) for number in sessions]
    small = [position for position, rows in enumerate(groups) if len(rows) < 2]
    if small:
        warnings.warn(
            f"Sessions {sessions[small].tolist()[:10]} have fewer than two training trials: they"
            " are z-scored with all training trials.",
            stacklevel=3,
        )
    for position in small:
        groups[position] = all_rows
    return groups


def _fit_moments(
    betas: np.ndarray, groups: Sequence[np.ndarray], columns: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each group of rows, float64 (groups, selected).

    The standard deviation of a constant voxel is 1, so that the voxel becomes 0.
    """
    moments = [compute_moments(betas, rows, columns) for rows in groups]
    mean = np.stack([group_mean for group_mean, _ in moments])
    std = np.stack([group_std for _, group_std in moments])
    constant = std <= 1e-7 * np.abs(mean)
    if constant.any():
        warnings.warn(
            f"{int(constant.any(0).sum())} of {mean.shape[1]} voxels do not vary over the"
            " training trials of some session; they become 0.",
            stacklevel=3,
        )
    std[constant] = 1.0
    return mean, std


def compute_moments(
    betas: np.ndarray, rows: np.ndarray, columns: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (of the population) over rows, in blocks.

    Betas are shifted by the first row, so that squares of small numbers are added.

    Args:
        betas: (trials, voxels).
        rows: of the trials to use.
        columns: of the voxels to use, None for all.

    Returns:
        Both float64 (voxels,).
    """
    selection = slice(None) if columns is None else columns
    shift = betas[rows[0]][selection].astype(np.float64)
    total, square = np.zeros_like(shift), np.zeros_like(shift)
    for start in range(0, len(rows), 256):
        block = betas[rows[start : start + 256]][:, selection]
        x = block.astype(np.float64) - shift
        total += x.sum(0)
        square += np.einsum("tv,tv->v", x, x)
    mean = total / len(rows)
    variance = np.maximum(square / len(rows) - mean**2, 0.0)
    return shift + mean, np.sqrt(variance)


def _fit_components(
    subject: Subject, zscore: Normaliser, n_components: int, seed: int
) -> np.ndarray:
    """First principal components of the z-scored training trials, float32 (voxels, components).

    Each is divided by its standard deviation over these trials. All training trials are held once,
    in float32. Their mean is 0 already. The search is that of Halko, Martinsson & Tropp 2011, with
    so many iterations that the variance kept is the most there is also where the spectrum falls
    slowly (tests/test_data.py).
    """
    from sklearn.utils.extmath import randomized_svd

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
    n_empty = int((spread <= 1e-4 * spread.max()).sum())
    if n_empty:
        raise PerceptError(
            f"n_components is {n_components}, but the training trials vary in"
            f" {n_components - n_empty} dimensions only: choose at most that."
        )
    scaled = (axes / spread[:, None]).T
    return np.ascontiguousarray(scaled.astype(np.float32))
