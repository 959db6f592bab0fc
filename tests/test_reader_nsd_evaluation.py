"""src.readers.nsd_synthetic and nsd_imagery: trees made with plain nibabel, h5py and scipy as the
descriptions have them, the mini world's test images as both, and what is refused.
"""

import json

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest
import scipy.io
from PIL import Image

from src.data.subject import open_subject
from src.miniworld.cortex import simulate
from src.miniworld.formats import WRITERS, SourceData
from src.readers import nsd_imagery, nsd_synthetic
from src.readers.nsd_imagery import RUNS, identify_among_means
from src.utils import PerceptError

GRID, VERSION = (6, 7, 5), "fithrf_GLMdenoise_RR"
CUES = {"A": "HRVLPE", "B": "WKBCDT", "C": "SZMYNF"}


def write_grid(root, betas, experiment):
    """nsdgeneral, and betas int16 (trials, x, y, z) as NSD has them; the mask."""
    folder = root / "nsddata/ppdata/subj01/func1pt8mm/roi"
    folder.mkdir(parents=True, exist_ok=True)
    general = np.random.default_rng(5).integers(-1, 2, GRID).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(general, np.eye(4)), folder / "nsdgeneral.nii.gz")
    folder = root / f"nsddata_betas/ppdata/subj01/func1pt8mm/{experiment}betas_{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"betas_{experiment}.hdf5", "w") as file:
        file["betas"] = betas.transpose(0, 3, 2, 1)
    return general > 0


def zscore(rows, groups):
    """By voxel within each group, by an independent formula."""
    scored = np.zeros(rows.shape)
    for group in np.unique(groups):
        part = rows[groups == group].astype(float)
        sd = np.sqrt(((part - part.mean(0)) ** 2).mean(0))
        scored[groups == group] = (part - part.mean(0)) / sd
    return scored


# ---------------------------------------------------------------------------------- NSD-synthetic
class Synthetic:
    """744 trials of 284 pictures; the common ones are 6 x 10 pixels."""

    def __init__(self, root):
        self.root, rng = root, np.random.default_rng(0)
        self.numbers = np.concatenate([np.arange(284), rng.integers(0, 284, 460)])
        self.numbers[[10, 200]] = self.numbers[[9, 199]]  # one-back targets
        self.betas = rng.integers(-3000, 3000, (744, *GRID)).astype(np.int16)
        self.mask = write_grid(root, self.betas, "nsdsynthetic")
        self.design = root / "nsddata/experiments/nsdsynthetic/nsdsynthetic_expdesign.mat"
        self.design.parent.mkdir(parents=True)
        pattern = np.zeros((1, 8, 107))
        pattern[:, :, :93] = 1
        content = {"masterordering": self.numbers[None] + 1.0, "stimpattern": pattern}
        scipy.io.savemat(self.design, content)
        self.stimuli = root / "nsddata_stimuli/stimuli/nsdsynthetic"
        self.stimuli.mkdir(parents=True)
        self.common = rng.integers(0, 256, (220, 6, 10, 3), dtype=np.uint8)
        self.colour = rng.integers(0, 256, (64, 6, 10, 3), dtype=np.uint8)
        for name, images in {"stimuli": self.common, "colorstimuli_subj01": self.colour}.items():
            with h5py.File(self.stimuli / f"nsdsynthetic_{name}.hdf5", "w") as file:
                file["imgBrick"] = images

    def read(self, tmp_path, **options):
        nsd_synthetic.read(self.root, tmp_path / "out", 1, **options)
        return open_subject(tmp_path / "out", 1)


@pytest.fixture
def synthetic(tmp_path):
    return Synthetic(tmp_path / "nsd")


def test_nsd_synthetic_is_a_test_set(synthetic, tmp_path):
    subject = synthetic.read(tmp_path, image_size=0, zscore="none")
    percent = synthetic.betas[:, synthetic.mask].astype(np.float32) / np.float32(300)
    np.testing.assert_array_equal(subject.betas, percent)
    assert subject.trials["image"].tolist() == synthetic.numbers.tolist()
    assert (subject.trials["split"] == "test").all()
    assert subject.trials["run"].tolist() == np.repeat(np.arange(8), 93).tolist()
    images = np.concatenate([synthetic.common, synthetic.colour])[:, :, 2:8]  # the central square
    present = subject.image_ids("test")
    np.testing.assert_array_equal(subject.images(present), images[present])
    assert subject.protocol == f"nsd-synthetic-{len(present)}"
    scored = synthetic.read(tmp_path)
    np.testing.assert_allclose(scored.betas, zscore(percent, np.zeros(744)), atol=1e-4)
    assert "statistics of these test data" in scored.attributes["normalisation"]


def test_nsd_synthetic_tasks_and_one_back_targets(synthetic, tmp_path):
    subject = synthetic.read(tmp_path, task="fixation", one_back="exclude", linear_display=True)
    excluded = set(subject.trials.loc[subject.trials["split"] == "exclude", "trial"])
    expected = {trial for trial in range(744) if trial // 93 % 2}
    numbers = synthetic.numbers
    expected |= {
        t for t in range(1, 744) if t % 93 and numbers[t] == numbers[t - 1]
    }  # a repeat across runs is none
    assert excluded == expected and {10, 200} <= excluded
    assert subject.protocol.startswith("nsd-synthetic-") and subject.protocol.endswith("-fixation")
    image = subject.images([3])[0]
    square = synthetic.common[3][:, 2:8] / 255
    np.testing.assert_array_equal(image, np.rint(np.sqrt(square) * 255))


def drop_colour(tree):
    (tree.stimuli / "nsdsynthetic_colorstimuli_subj01.hdf5").unlink()


def lose_trials(tree):
    write_grid(tree.root, tree.betas[:743], "nsdsynthetic")


def count_from_zero(tree):
    scipy.io.savemat(tree.design, {"masterordering": tree.numbers[None] + 0.0})


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (drop_colour, {}, "colorstimuli_subj01.hdf5 .* is missing"),
        (lose_trials, {}, "has 743 trials, the design has 744"),
        (count_from_zero, {}, "must hold numbers from 1 to 284"),
        (None, {"task": "rest"}, "task is 'rest'"),
        (None, {"zscore": "mean"}, "zscore is 'mean'"),
        (None, {"space": "fsaverage"}, "space is 'fsaverage': choose func1pt8mm or func1mm"),
        (None, {"betas_version": "betas_fithrf"}, "betas_nsdsynthetic.hdf5 is missing"),
        (None, {"roi": "V9"}, "There is no ROI file"),
    ],
)
def test_nsd_synthetic_refusals(synthetic, tmp_path, spoil, options, message):
    if spoil is not None:
        spoil(synthetic)
    with pytest.raises(PerceptError, match=message) as caught:
        synthetic.read(tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "subj01").exists()


# ------------------------------------------------------------------------------------ NSD-Imagery
class Imagery:
    """12 runs with a pattern for each stimulus; what was shown is CONDITION, imagined is CUE."""

    def __init__(self, root, grouped=False):
        self.root, rng = root, np.random.default_rng(0)
        self.experiment = root / "nsddata/experiments/nsdimagery"
        self.bdata = root / "nsddata/bdata/nsdimagery"
        self.experiment.mkdir(parents=True)
        self.bdata.mkdir(parents=True)
        self.labels, rows = {}, []
        patterns = rng.standard_normal((18, *GRID))
        for number, (run, length) in enumerate(RUNS.items()):
            labels = rng.permutation(np.arange(length) % 6)
            self.labels[run] = labels
            order = np.sort(labels) if grouped else labels
            first = 6 * "ABC".index(run[3])
            rows.append(patterns[first + order] + 0.3 * rng.standard_normal((length, *GRID)))
            if not run.startswith("att"):
                self.write_run(run, number, labels)
        self.betas = np.rint(np.concatenate(rows) * 300).astype(np.int16)
        self.mask = write_grid(root, self.betas, "nsdimagery")
        for name, cues in CUES.items():
            pairs = np.empty((6, 3), object)
            for index, cue in enumerate(cues):
                pairs[5 - index] = [float(index + 1), f"target {name}.{index}.png", cue]
            scipy.io.savemat(self.experiment / f"{name}_pair_list.mat", {"pair_list": pairs})
        for name in "AB":
            folder = self.experiment / f"rawtargetimages/set{name}"
            folder.mkdir(parents=True)
            for index in range(6):
                pixels = np.full((5, 5, 3), 20 * index + (100 if name == "B" else 0), np.uint8)
                Image.fromarray(pixels).save(folder / f"target {name}.{index}.png")

    def write_run(self, run, number, labels):
        cued = labels.copy()
        if run.startswith("vis"):  # the cue is wrong in half of the trials
            cued[::2] = (cued[::2] + 1) % 6
        table = pd.DataFrame({"SUBJECT": 1, "SESSION": 1, "RUN": number + 1}, index=range(48))
        table["TRIAL"] = np.arange(1, 49)
        table["CONDITION"] = labels + 1 if run.startswith("vis") else 1
        table["CUE"] = [CUES[run[3]][label] for label in cued]
        table.to_csv(self.bdata / f"nsdimagery_subj01_{run}.tsv", sep="\t", index=False)

    def read(self, tmp_path, **options):
        nsd_imagery.read(self.root, tmp_path / "out", 1, **options)
        return open_subject(tmp_path / "out", 1)


@pytest.fixture
def imagery(tmp_path):
    return Imagery(tmp_path / "nsd")


STARTS = {"visA": 0, "imgA_1": 144, "visB": 192, "imgB_1": 336, "imgA_2": 576, "imgB_2": 624}


@pytest.mark.parametrize(("task", "repeats"), [("vision", 8), ("imagery", 16)])
def test_nsd_imagery_tasks(imagery, tmp_path, task, repeats):
    subject = imagery.read(tmp_path, task=task, image_size=0)
    runs = [run for run in STARTS if run.startswith(task[:3] if task == "vision" else "img")]
    trials = np.concatenate([STARTS[run] + np.arange(48) for run in runs])
    assert subject.trials["trial"].tolist() == trials.tolist()
    images = [imagery.labels[run] + (6 if run[3] == "B" else 0) for run in runs]
    assert subject.trials["image"].tolist() == np.concatenate(images).tolist()
    assert subject.trials["image"].value_counts().unique().tolist() == [repeats]
    percent = imagery.betas[:, imagery.mask].astype(np.float32) / np.float32(300)
    run_of_beta = np.repeat(np.arange(12), list(RUNS.values()))
    scored = zscore(percent, run_of_beta)[trials]
    np.testing.assert_allclose(subject.betas, scored, atol=1e-4)
    assert subject.images([8])[0, 0, 0].tolist() == [140] * 3
    assert subject.protocol == f"nsd-imagery-{task}"
    assert json.loads(subject.attributes["order_check"])["chronological"] > 0.9


def test_nsd_imagery_grouped_betas_are_noticed(tmp_path):
    tree = Imagery(tmp_path / "nsd", grouped=True)
    with pytest.warns(UserWarning, match="100% if they are grouped by condition"):
        tree.read(tmp_path)


def test_identification_among_means_by_hand():
    rows = np.array([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0.1, 0.8, 0.1], [0.9, 0.2, 0.1]])
    labels = np.array([0, 0, 1, 1, 1])
    assert identify_among_means(rows, labels).tolist() == [True, True, True, True, False]


def lose_pictures(tree):
    (tree.experiment / "rawtargetimages/setB/target B.3.png").unlink()


def rename_cue(tree):
    path = tree.bdata / "nsdimagery_subj01_imgA_1.tsv"
    path.write_text(path.read_text().replace("\tH\n", "\tX\n"))


def cut_table(tree):
    path = tree.bdata / "nsdimagery_subj01_visA.tsv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lose_pictures, {}, "has no picture 'target B.3.png'"),
        (
            rename_cue,
            {"task": "imagery"},
            "has 'X' in CUE, which is none of the stimuli 1 target A",
        ),
        (cut_table, {}, "visA.tsv has 47 rows, run visA has 48 betas"),
        (None, {"sets": "A,C"}, "setC .the pictures of set C. is missing: set C are words"),
        (None, {"sets": "D"}, "sets 'D': choose"),
        (None, {"task": "attention"}, "task is 'attention'"),
    ],
)
def test_nsd_imagery_refusals(imagery, tmp_path, spoil, options, message):
    if spoil is not None:
        spoil(imagery)
    with pytest.raises(PerceptError, match=message) as caught:
        imagery.read(tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "subj01").exists()


@pytest.mark.filterwarnings("ignore:Of the vision trials")
@pytest.mark.parametrize("name", ["nsd_synthetic", "nsd_imagery"])
def test_the_mini_world_as_an_evaluation_set(tmp_path, name):
    world = simulate(1, 12, 4, 16, trials_per_session=40)
    WRITERS[name](tmp_path / "nsd", 1, SourceData.from_world(world))
    reader = {"nsd_synthetic": nsd_synthetic, "nsd_imagery": nsd_imagery}[name]
    reader.read(tmp_path / "nsd", tmp_path / "out", 1, image_size=0, zscore="none")
    subject, trials = open_subject(tmp_path / "out", 1), world.scan.trials
    ids = np.unique(trials.loc[trials["split"] == "test", "image"])
    n_images = {"nsd_synthetic": 16, "nsd_imagery": 12}[name]
    np.testing.assert_array_equal(subject.image_ids("test"), np.arange(n_images))
    in_order = world.images[np.searchsorted(world.image_ids, ids)]
    np.testing.assert_array_equal(subject.images(np.arange(n_images)), in_order[:n_images])
    first = subject.trials.iloc[0]
    repeats = world.scan.betas[(trials["image"] == ids[first["image"]]).to_numpy()]
    np.testing.assert_allclose(subject.betas[0], repeats[0], atol=1 / 300)
