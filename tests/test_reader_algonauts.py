"""src.readers.algonauts: both flavours written with plain numpy and read, each test set, the
regions, and every refusal.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
from PIL import Image

from src import miniworld
from src.data.subject import open_subject
from src.miniworld.formats import SourceData
from src.miniworld.formats import algonauts as algonauts_format
from src.readers import algonauts
from src.safe_pickle import unpickle_npy
from src.utils import PerceptError

N, LEFT, RIGHT = 10, 5, 7
NSD = [13, 27, 40, 41, 50, 61, 70, 82, 90, 104]
BODIES = np.array(
    [1, 1, 2, 0, 0, 0, 0, 0, 0, 1, 0, 2]
)  # EBA at 0, 1, 9; FBA-1 at 2, 11; FBA-2 nowhere
STREAMS = np.array([5, 0, 0, 0, 0, 5, 5, 0, 0, 0, 0, 1])


@pytest.fixture
def responses():
    return np.random.default_rng(0).standard_normal((N, LEFT + RIGHT)).astype(np.float32)


@pytest.fixture
def pictures():
    return np.random.default_rng(1).integers(0, 256, (N, 6, 6, 3), dtype=np.uint8)


def make(
    source,
    responses,
    pictures,
    *,
    subj=1,
    names="train-{row:04d}_nsd-{nsd:05d}.png",
    masks="{}_challenge_space.npy",
    first=1,
):
    """The published files, from their description alone."""
    folder = source / f"subj{subj:02d}"
    fmri, images, rois = (
        folder / "training_split" / "training_fmri",
        folder / "training_split" / "training_images",
        folder / "roi_masks",
    )
    for place in (fmri, images, rois):
        place.mkdir(parents=True, exist_ok=True)
    np.save(fmri / "lh_training_fmri.npy", responses[:, :LEFT])
    np.save(fmri / "rh_training_fmri.npy", responses[:, LEFT:])
    for row, picture in enumerate(pictures):
        Image.fromarray(picture).save(images / names.format(row=row + first, nsd=NSD[row]))
    for kind, labels in (("floc-bodies", BODIES), ("streams", STREAMS)):
        np.save(rois / masks.format(f"lh.{kind}"), labels[:LEFT])
        np.save(rois / masks.format(f"rh.{kind}"), labels[LEFT:])
    np.save(
        rois / "mapping_floc-bodies.npy",
        {0: "Unknown", 1: "EBA", 2: "FBA-1", 3: "FBA-2"},
        allow_pickle=True,
    )
    np.save(
        rois / "mapping_streams.npy", {0: "Unknown", 1: "early", 5: "ventral"}, allow_pickle=True
    )
    return folder


def read(tmp_path, **options):
    options = {"test": "random", "test_images": 2, "val_images": 2, **options}
    algonauts.read(tmp_path, tmp_path / "out", options.pop("subj", 1), **options)
    return open_subject(tmp_path / "out", 1)


def test_official_files(tmp_path, responses, pictures):
    folder = make(tmp_path, responses, pictures)
    subject = read(tmp_path)
    np.testing.assert_array_equal(subject.betas, responses)
    np.testing.assert_array_equal(subject.images(NSD), pictures)
    trials = subject.trials
    assert trials["image"].tolist() == NSD and trials["trial"].tolist() == list(range(N))
    assert (
        (trials["session"] == 0).all()
        and (trials["run"] == -1).all()
        and (trials["repeat"] == 0).all()
    )
    assert trials["split"].value_counts().to_dict() == {"train": 6, "val": 2, "test": 2}
    assert (
        subject.protocol == "algonauts-random2-seed42"
        and "averaged over repeats" in subject.attributes["normalisation"]
    )
    voxels = subject.voxels
    assert list(voxels) == [
        "vertex",
        "left",
        "right",
        "EBA",
        "FBA-1",
        "early",
        "ventral",
    ]  # no column for FBA-2, which has no vertex
    assert voxels["left"].sum() == LEFT and (voxels["left"] != voxels["right"]).all()
    assert np.flatnonzero(voxels["EBA"]).tolist() == [0, 1, 9] and np.flatnonzero(
        voxels["ventral"]
    ).tolist() == [0, 5, 6]
    other = read(tmp_path, seed=7)
    assert other.test_set != subject.test_set and other.protocol.endswith("seed7")
    algonauts.read(folder, tmp_path / "alone", 1, test="random", test_images=1, val_images=0)
    assert len(open_subject(tmp_path / "alone", 1).image_ids("test")) == 1


def test_course_files(tmp_path, responses, pictures):
    make(tmp_path, responses, pictures, names="{row}.png", masks="{}_space.npy", first=0)
    with pytest.warns(UserWarning, match="drawn at random"):
        subject = read(tmp_path, test="auto")
    np.testing.assert_array_equal(
        subject.images(np.arange(N)), pictures
    )  # 10.png would not come before 2.png
    np.testing.assert_array_equal(subject.betas, responses)
    assert subject.voxels["EBA"].sum() == 3
    np.save(tmp_path / "shared1000.npy", np.arange(5))
    with pytest.raises(PerceptError, match="NSD numbers"):
        read(tmp_path, test="shared1000")


def test_images_are_made_smaller(tmp_path, responses, pictures):
    make(tmp_path, responses, pictures)
    assert read(tmp_path, image_size=4).images(NSD).shape == (N, 4, 4, 3)


@pytest.mark.parametrize(
    "name", ["nsd_expdesign.mat", "shared1000.txt", "shared1000.npy", "numbers.npy"]
)
def test_shared_images_become_the_test_set(tmp_path, responses, pictures, name):
    make(tmp_path, responses, pictures)
    shared = np.array([27, 82, 104, 72999])
    path = tmp_path / name
    if path.suffix == ".mat":
        scipy.io.savemat(path, {"sharedix": shared[None] + 1})
    elif path.suffix == ".txt":
        path.write_text("\n".join(map(str, shared)))
    else:
        np.save(path, shared if name == "numbers.npy" else np.isin(np.arange(73000), shared))
    subject = read(tmp_path, test="shared1000", shared_path=str(path))
    assert (
        subject.image_ids("test").tolist() == [27, 82, 104]
        and subject.protocol == "algonauts-shared3"
    )
    if name != "numbers.npy":
        assert read(tmp_path, test="auto").test_set == subject.test_set


def test_official_test_set(tmp_path, responses, pictures):
    folder = make(tmp_path, responses, pictures)
    for place in ("test_fmri", "test_images"):
        (folder / "test_split" / place).mkdir(parents=True)
    held_out = responses[:3] + 1
    np.save(folder / "test_split" / "test_fmri" / "lh_test_fmri.npy", held_out[:, :LEFT])
    np.save(folder / "test_split" / "test_fmri" / "rh_test_fmri.npy", held_out[:, LEFT:])
    for row, nsd in enumerate((200, 201, 202)):
        Image.fromarray(255 - pictures[row]).save(
            folder / "test_split" / "test_images" / f"test-{row + 1:04d}_nsd-{nsd:05d}.png"
        )
    subject = read(tmp_path, test="auto", rois="EBA")
    assert (
        subject.image_ids("test").tolist() == [200, 201, 202]
        and subject.protocol == "algonauts-official"
    )
    np.testing.assert_array_equal(
        subject.betas, np.concatenate([responses, held_out])[:, [0, 1, 9]]
    )
    assert subject.trials["split"].value_counts().to_dict() == {"train": 8, "val": 2, "test": 3}
    assert (
        len(read(tmp_path, test="random").trials) == N
    )  # asked for by name, the held-out responses stay out
    (folder / "test_split" / "test_images" / "test-0003_nsd-00202.png").rename(
        folder / "test_split" / "test_images" / "test-0003_nsd-00013.png"
    )
    with pytest.raises(PerceptError, match=r"Image 13 is in .*test"):
        read(tmp_path, test="official")
    shutil.rmtree(folder / "test_split" / "test_fmri")
    with pytest.raises(PerceptError, match="withhold"):
        read(tmp_path, test="official")


def test_regions(tmp_path, responses, pictures):
    make(tmp_path, responses, pictures)
    subject = read(tmp_path, rois="EBA, ventral")
    assert subject.voxels["vertex"].tolist() == [0, 1, 5, 6, 9]
    np.testing.assert_array_equal(subject.betas, responses[:, [0, 1, 5, 6, 9]])
    with pytest.warns(UserWarning, match="FBA-2, RSC"):
        assert read(tmp_path, rois="FBA-2,early,RSC").voxels["vertex"].tolist() == [11]
    with pytest.raises(PerceptError, match="no vertices of FBA-2"):
        read(tmp_path, rois="FBA-2")
    with pytest.raises(PerceptError, match="no region V9.*EBA"):
        read(tmp_path, rois="V9")


def spoil(folder, what, responses):
    fmri, images, rois = (
        folder / "training_split" / "training_fmri",
        folder / "training_split" / "training_images",
        folder / "roi_masks",
    )
    if what == "missing":
        (fmri / "rh_training_fmri.npy").unlink()
    elif what == "truncated":
        content = (fmri / "lh_training_fmri.npy").read_bytes()
        (fmri / "lh_training_fmri.npy").write_bytes(content[:-8])
    elif what == "transposed":
        np.save(fmri / "rh_training_fmri.npy", responses[:, LEFT:].T)
    elif what == "integers":
        np.save(fmri / "rh_training_fmri.npy", np.zeros((N, RIGHT), int))
    elif what == "image":
        (images / "train-0004_nsd-00041.png").unlink()
    elif what == "names":
        (images / "train-0004_nsd-00041.png").rename(images / "a.png")
    elif what == "picture":
        (images / "train-0004_nsd-00041.png").write_bytes(b"no picture")
    elif what == "mask":
        np.save(rois / "lh.streams_challenge_space.npy", STREAMS[: LEFT - 1])
    elif what == "code":
        np.save(
            rois / "mapping_streams.npy", np.array(shutil.rmtree, dtype=object), allow_pickle=True
        )


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "rh_training_fmri.npy .* is missing"),
        ("truncated", "cut off"),
        ("transposed", "transposed"),
        ("integers", "floating-point"),
        ("image", "Image 4 of"),
        ("names", "all named like"),
        ("picture", "cannot be decoded"),
        ("mask", "masks of this very subject"),
        ("code", "cannot be read safely"),
    ],
)
def test_refusals(tmp_path, responses, pictures, what, words):
    folder = make(tmp_path, responses, pictures)
    spoil(folder, what, responses)
    with pytest.raises(PerceptError, match=words):
        read(tmp_path)
    assert not (tmp_path / "out" / "subj01").exists()


@pytest.mark.parametrize(
    ("widths", "words"),
    [((18978, 20220), "fits subject 6, not subject 1"), ((20544, 19004), "swapped")],
)
def test_another_subjects_vertices(tmp_path, pictures, widths, words):
    make(tmp_path, np.zeros((2, 12), np.float32), pictures[:2])
    for side, width in zip(("lh", "rh"), widths, strict=True):
        np.save(
            tmp_path / "subj01" / "training_split" / "training_fmri" / f"{side}_training_fmri.npy",
            np.zeros((2, width), np.float32),
        )
    with pytest.raises(PerceptError, match=words):
        read(tmp_path)


def test_wrong_options_and_folders(tmp_path, responses, pictures):
    folder = make(tmp_path, responses, pictures)
    with pytest.raises(PerceptError, match="subj02"):
        read(tmp_path, subj=2)
    with pytest.raises(PerceptError, match="not of subject 2"):
        algonauts.read(folder, tmp_path / "out", 2)
    with pytest.raises(PerceptError, match="test='held-out'"):
        read(tmp_path, test="held-out")
    with pytest.raises(PerceptError, match="test_images is 9"):
        read(tmp_path, test_images=9)
    with pytest.raises(PerceptError, match="shared_path"):
        read(tmp_path, test="shared1000")
    (tmp_path / "shared1000.txt").write_text("1\n2\n")
    with pytest.raises(PerceptError, match="None of the 10"):
        read(tmp_path, test="shared1000")
    (tmp_path / "shared1000.txt").write_text("one")
    with pytest.raises(PerceptError, match="shared1000.txt .*cannot be read .*give nsd_exp"):
        read(tmp_path, test="shared1000")


# -------------------------------------------------------------------------------- the mini world
@pytest.fixture(scope="module")
def world():
    return {subj: miniworld.simulate(subj, 40, 10, 12, trials_per_session=62) for subj in (1, 2)}


def averaged(experiment):
    """Ids in the order of first showing, mean responses, split of each."""
    trials = experiment.scan.trials
    groups = list(trials.groupby("image", sort=False))
    means = np.stack(
        [experiment.scan.betas[rows.index].astype(np.float64).mean(axis=0) for _, rows in groups]
    ).astype(np.float32)
    return [image for image, _ in groups], means, [rows["split"].iloc[0] for _, rows in groups]


def write(source, subj, e, **options):
    return algonauts_format.write(source, subj, SourceData.from_world(e), **options)


def test_mini_world_two_subjects(tmp_path, world):
    for subj, experiment in world.items():
        write(tmp_path / "source", subj, experiment)
        algonauts.read(
            tmp_path / "source", tmp_path / "out", subj, attributes={"source": "the mini world"}
        )
    for subj, experiment in world.items():
        ids, means, splits = averaged(experiment)
        subject = open_subject(tmp_path / "out", subj)
        np.testing.assert_array_equal(subject.betas, means)
        assert (
            subject.trials["image"].tolist() == ids and subject.trials["split"].tolist() == splits
        )
        np.testing.assert_array_equal(subject.images(experiment.image_ids), experiment.images)
        for area in experiment.scan.voxels.select_dtypes("bool"):
            np.testing.assert_array_equal(subject.voxels[area], experiment.scan.voxels[area])
        assert (
            subject.protocol == "algonauts-own12"
            and subject.attributes["source"] == "the mini world"
        )
        assert (
            set(experiment.image_ids) <= set(subject.captions["image"]) and "kind" in subject.labels
        )


def test_mini_world_as_the_course_subset(tmp_path, world):
    write(tmp_path / "source", 1, world[1], flavour="course", n_left=100)
    write(
        tmp_path / "source", 1, world[1], flavour="course", n_left=100
    )  # in place of what was there
    algonauts.read(tmp_path / "source", tmp_path / "out", 1)
    ids, means, splits = averaged(world[1])
    subject = open_subject(tmp_path / "out", 1)
    np.testing.assert_array_equal(subject.betas, means)
    assert subject.trials["split"].tolist() == splits and subject.trials["image"].tolist() == list(
        range(len(ids))
    )
    assert subject.voxels["left"].sum() == 100
    caption = world[1].captions.set_index("image").loc[[ids[5]], "caption"].tolist()
    assert subject.captions.set_index("image").loc[[5], "caption"].tolist() == caption
    assert not list((tmp_path / "source").glob(".*"))


def test_write_refuses(tmp_path, world):
    e = world[1]
    with pytest.raises(PerceptError, match="do not fit each other"):
        algonauts_format.write(
            tmp_path, 1, SourceData(e.scan.betas[1:], e.scan.trials, e.images, e.image_ids)
        )
    with pytest.raises(PerceptError, match="flavour='other'"):
        write(tmp_path, 1, e, flavour="other")
    overlap = pd.DataFrame(
        {"EBA": np.ones(e.scan.betas.shape[1], bool), "FBA-1": np.ones(e.scan.betas.shape[1], bool)}
    )
    with pytest.raises(PerceptError, match="overlap"):
        algonauts_format.write(
            tmp_path,
            1,
            dataclasses.replace(SourceData.from_world(e), voxels=overlap),
        )
    assert not list(tmp_path.iterdir())


def test_few_images_with_the_defaults_and_an_empty_folder_of_test_responses(
    tmp_path, responses, pictures
):
    make(tmp_path / "source", responses, pictures)
    (tmp_path / "source" / "subj01" / "test_split" / "test_fmri").mkdir(parents=True)
    with pytest.warns(
        UserWarning, match="only 10 training images: 1 of them instead of 300 become test images"
    ):
        algonauts.read(tmp_path / "source", tmp_path / "few", 1)
    assert open_subject(tmp_path / "few", 1).trials["split"].value_counts().to_dict() == {
        "train": 8,
        "val": 1,
        "test": 1,
    }


def test_a_mapping_without_masks_is_a_class_without_regions(tmp_path, responses, pictures):
    make(tmp_path / "source", responses, pictures)
    masks = tmp_path / "source" / "subj01" / "roi_masks"
    for side in ("lh", "rh"):
        (masks / f"{side}.streams_challenge_space.npy").unlink()
    algonauts.read(
        tmp_path / "source", tmp_path / "out", 1, test="random", test_images=2, val_images=2
    )
    voxels = pd.read_parquet(tmp_path / "out" / "subj01" / "voxels.parquet")
    assert "EBA" in voxels and "ventral" not in voxels


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_are_read_without_running_anything(tmp_path):
    path, ran = tmp_path / "pickled.npy", tmp_path / "ran"
    contents = [
        {0: "Unknown", np.int64(2): np.str_("V1v")},
        {0: np.arange(3), 1: np.array(["a", None], dtype=object)},
        np.array([["two dogs", "b"]], dtype=object),
    ]
    for content in contents:
        np.save(path, content, allow_pickle=True)
        assert repr(unpickle_npy(path)) == repr(content)
    np.save(path, np.array([Command(ran)], dtype=object), allow_pickle=True)
    with pytest.raises(PerceptError, match=r"cannot be read safely.*asks for"):
        unpickle_npy(path)
    assert not ran.exists()


def test_a_forged_shape_is_not_trusted(tmp_path):
    """NumPy's own unpickling takes 229 objects from a list of three, and the process ends."""
    path = tmp_path / "forged.npy"
    np.save(path, np.array(["a", "b", None], dtype=object), allow_pickle=True)
    content = path.read_bytes()
    forged = content.replace(b"K\x01K\x03\x85\x94h", b"K\x01K\xe5\x85\x94h")
    assert forged != content
    for damaged in (forged, content[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(PerceptError, match="cannot be read safely"):
            unpickle_npy(path)
