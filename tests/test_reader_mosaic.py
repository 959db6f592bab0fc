"""src.readers.mosaic: the three forms of its files made with plain h5py, the mini world through
`write` and back, and what is refused.
"""

import json

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest
from nibabel.cifti2 import BrainModelAxis, LabelAxis
from PIL import Image

from src.data.subject import open_subject
from src.miniworld.cortex import simulate
from src.miniworld.formats import SourceData
from src.miniworld.formats import mosaic as mosaic_format
from src.readers import mosaic
from src.utils import PerceptError

V, OWNER = 40, "sub-01_NSD"
PHASES = {"a.b.png": "train", "dog.png": "train", "n_phase-x.png": "test", "word.png": "test"}
STIMULI = [*PHASES, "extra.png"]
PHASES["extra.png"] = "train"


class Study:
    """Five pictures (the word is artificial), two to eleven repeats, in one of three forms."""

    def __init__(self, root, form="single"):
        self.root, self.form, rng = root, form, np.random.default_rng(0)
        (root / "images").mkdir(parents=True)
        for name in STIMULI:
            pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name)
        counts = {"a.b.png": 11}
        self.order = [(n, r) for n in sorted(STIMULI) for r in range(counts.get(n, 2))]
        self.betas = rng.standard_normal((len(self.order), V))
        self.betas[3, 7] = np.nan
        ceiling = np.linspace(0, 80, V)
        folder = root / "NaturalScenesDataset"
        folder.mkdir()
        self.path = folder / f"{OWNER}.hdf5" if form == "single" else folder / "merged.hdf5"
        with h5py.File(self.path, "w") as file:
            group = file if form == "single" else file.create_group(OWNER)
            if form == "chunks":
                values = self.betas.astype(np.float32)
                group.create_dataset("betas", data=values, chunks=(4, V))
                names = [name for name, _ in self.order]
                group["presented_stimulus_filename"] = names
                group["phase"] = [PHASES[name] for name in names]
            else:
                self.write_trials(group.create_group("betas"))
            group[f"noiseceilings/{OWNER}_phase-test_n-1_nc"] = ceiling
            group[f"noiseceilings/{OWNER}_phase-test_n-avg_nc"] = ceiling + 1
        self.atlas()

    def write_trials(self, group):
        for (name, repeat), row in zip(self.order, self.betas, strict=True):
            stem = name.removesuffix(".png")
            key = f"{OWNER}_stimulus-{stem}_phase-{PHASES[name]}_rep-{repeat}"
            trial = group.create_dataset(key, data=row)
            trial.attrs["presented_stimulus_filename"] = name
            trial.attrs["phase"], trial.attrs["repetition"] = PHASES[name], repeat

    def atlas(self):
        left = BrainModelAxis.from_mask(np.ones(25, bool), name="CortexLeft")
        right = BrainModelAxis.from_mask(np.ones(15, bool), name="CortexRight")
        self.labels = np.arange(V) % 3
        table = {0: ("???", (0, 0, 0, 0)), 1: ("L_V1", (1, 0, 0, 1)), 2: ("R_FFC", (0, 1, 0, 1))}
        names = LabelAxis(["parcels"], [table])
        image = nibabel.Cifti2Image(self.labels[None].astype(np.float32), (names, left + right))
        nibabel.save(image, self.root / "mmp.dlabel.nii")

    def read(self, tmp_path, **options):
        if self.form != "single":
            options = {"file": "NaturalScenesDataset/merged.hdf5", **options}
        mosaic.read(self.root, tmp_path / "out", 1, **{"val_images": 0, **options})
        return open_subject(tmp_path / "out", 1)


@pytest.mark.parametrize("form", ["single", "ind", "chunks"])
def test_three_forms_of_files(tmp_path, form):
    study = Study(tmp_path / "mosaic", form)
    subject = study.read(tmp_path)
    trials, names = subject.trials, subject.labels.set_index("image")["name"]
    # by name and repeat, whatever the order of the names is
    expected = dict(zip(study.order, np.nan_to_num(study.betas).astype(np.float32), strict=True))
    for row, trial in trials.iterrows():
        key = (names[trial["image"]], trial["repeat"])
        np.testing.assert_allclose(subject.betas[row], expected[key], rtol=1e-6)
    assert len(trials) == len(study.order) and set(trials["session"]) == {0}
    split = trials.drop_duplicates("image").set_index("image")["split"]
    assert {names[image]: side for image, side in split.items()} == PHASES
    assert subject.voxels["nan_trials"].tolist() == [int(v == 7) for v in range(V)]
    np.testing.assert_allclose(subject.voxels["noise_ceiling"], np.linspace(0, 0.8, V))
    assert subject.protocol == "mosaic-NSD-2"
    with Image.open(study.root / "images/dog.png") as image:
        number = int(names.index[names == "dog.png"][0])
        np.testing.assert_array_equal(subject.images([number])[0], np.asarray(image))


def test_regions_lists_and_artificial_pictures(tmp_path):
    study = Study(tmp_path / "mosaic")
    artificial = [{f"{OWNER}_stimulus-word.png": [f"{OWNER}_stimulus-word_phase-test_rep-0.npz"]}]
    (study.root / "artificial.json").write_text(json.dumps(artificial))
    subject = study.read(
        tmp_path, atlas="mmp.dlabel.nii", rois="L_V1", artificial_list="artificial.json"
    )
    assert subject.betas.shape[1] == (study.labels == 1).sum()
    assert subject.voxels["L_V1"].all() and "R_FFC" not in subject.voxels
    columns = np.flatnonzero(study.labels == 1)
    assert subject.voxels["hemi"].tolist() == ["L" if c < 25 else "R" for c in columns]
    assert subject.voxels["vertex"].tolist() == [c if c < 25 else c - 25 for c in columns]
    names = subject.labels.set_index("image")["name"]
    assert names[subject.image_ids("test")].tolist() == ["n_phase-x.png"]
    lists = {"train_list": ["a.b.png", "word.png", "extra.png"], "test_list": ["dog.png"]}
    for name, stimuli in lists.items():
        content = {f"{OWNER}_stimulus-{stimulus}": [] for stimulus in stimuli}
        (study.root / f"{name}.json").write_text(json.dumps(content))
    subject = study.read(tmp_path, **{name: f"{name}.json" for name in lists})
    assert names[subject.image_ids("test")].tolist() == ["dog.png"]
    assert set(names[subject.image_ids("train")]) == set(lists["train_list"])


def test_the_mini_world_comes_back(tmp_path):
    world = simulate(1, 24, 6, 8, trials_per_session=40)
    mosaic_format.write(tmp_path / "source", 1, SourceData.from_world(world))
    mosaic.read(tmp_path / "source", tmp_path / "out", 1, image_size=0)
    subject, trials = open_subject(tmp_path / "out", 1), world.scan.trials
    for split in ("train", "val", "test"):
        ids = np.unique(trials.loc[trials["split"] == split, "image"])
        np.testing.assert_array_equal(subject.image_ids(split), ids)
        in_order = world.images[np.searchsorted(world.image_ids, ids)]
        np.testing.assert_array_equal(subject.images(ids), in_order)
    scores = pd.DataFrame(world.scan.betas.astype(float))
    is_train = trials["split"] != "test"
    means = scores[is_train].groupby(trials["session"]).mean()
    spreads = scores[is_train].groupby(trials["session"]).std(ddof=0)
    session = trials["session"].to_numpy()
    scores = (scores - means.loc[session].to_numpy()) / spreads.loc[session].to_numpy()
    order = trials.set_index(["image", "repeat"]).index
    rows = order.get_indexer(subject.trials.set_index(["image", "repeat"]).index)
    np.testing.assert_allclose(subject.betas, scores.to_numpy()[rows], atol=1e-5)
    ceiling = world.scan.voxels["noise_ceiling"]
    np.testing.assert_allclose(subject.voxels["noise_ceiling"], ceiling)


# ------------------------------------------------------------------------------------- refusals
def cut_file(study):
    study.path.write_bytes(study.path.read_bytes()[:-2000])


def lose_file(study):
    study.path.unlink()


def lengthen_trial(study):
    with h5py.File(study.path, "r+") as file:
        key = next(iter(file["betas"]))
        attributes = dict(file["betas"][key].attrs)
        del file["betas"][key]
        file["betas"][key] = np.zeros(V + 1)
        file["betas"][key].attrs.update(attributes)


def rename_phase(study):
    with h5py.File(study.path, "r+") as file:
        next(iter(file["betas"].values())).attrs["phase"] = "rest"


def lose_picture(study):
    (study.root / "images/dog.png").unlink()


def shift_phase(study):
    with h5py.File(study.path, "r+") as file:
        file[f"betas/{OWNER}_stimulus-dog_phase-train_rep-0"].attrs["phase"] = "test"


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (cut_file, {}, "sub-01_NSD.hdf5 .*(cut off|cannot be read)"),
        (lose_file, {}, "has no sub-01_NSD.hdf5: fetch it from the bucket"),
        (lengthen_trial, {}, r"have the shapes .*\(4[01],\)"),
        (rename_phase, {}, "the phase 'rest': train or test is expected"),
        (lose_picture, {}, "has no picture 'dog.png'"),
        (shift_phase, {}, "Image .* is in (test|train)"),
        (None, {"rois": "L_V1"}, "has no region L_V1: it has none, as no atlas is given"),
        (None, {"rois": "V9", "atlas": "mmp.dlabel.nii"}, "no region V9: it has L_V1, R_FFC"),
        (None, {"part": "HAD"}, "part is 'HAD': choose one of NSD, .* show videos"),
        (None, {"file": "other.hdf5"}, "other.hdf5 .betas. is missing"),
        (None, {"test_list": "none.json"}, "none.json .a list of stimuli. is missing"),
        (None, {"image_size": 0, "images": "no"}, "no .the pictures that were shown. is missing"),
    ],
)
def test_refusals(tmp_path, spoil, options, message):
    study = Study(tmp_path / "mosaic")
    if spoil is not None:
        spoil(study)
    with pytest.raises(PerceptError, match=message) as caught:
        study.read(tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "subj01").exists()
