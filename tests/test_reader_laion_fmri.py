"""src.readers.laion_fmri: the mini world through `write` and back, a bucket made with plain
nibabel, h5py and pandas as the description has it, the bundled splits, and what is refused.
"""

import hashlib
import io
import json

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from src.data.subject import open_subject
from src.miniworld.cortex import simulate
from src.miniworld.formats import SourceData
from src.miniworld.formats import laion_fmri as laion_format
from src.pipeline.download import fetch
from src.readers import laion_fmri
from src.readers.laion_splits import find_ood_kind
from src.utils import PerceptError

GRID = (9, 10, 8)
AFFINE = np.diag([1.8, 1.8, 1.8, 1.0])
OOD = "shared_4rep_OOD_unusual_Screenshot 2024-05-06 at 14.45.09 .jpg"
SHARED = [
    "shared_12rep_LAION_cluster_1003_i0.jpg",
    "shared_12rep_THINGS+_kmeans_0_balloon.jpg",
    "shared_4rep_NSD_special1000_404.jpg",
    "shared_4rep_LAION_cluster_7_i1.jpg",
]
UNIQUE = {
    1: ["unique_LAION_fillup_cluster_9_i0_p01.jpg", "unique_THINGS+_dog_p01.jpg"],
    3: ["unique_LAION_new_cluster_4_i2_p04.jpg", "unique_THINGS_cat_p04.jpg"],
}
ALL = [*SHARED, OOD, *UNIQUE[1], *UNIQUE[3]]


def encode(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return np.frombuffer(buffer.getvalue(), np.uint8)


class Bucket:
    """Two subjects with two sessions each, and a ses-31 that is not released."""

    def __init__(self, root):
        self.root, rng = root, np.random.default_rng(0)
        self.general = rng.random(GRID) < 0.3
        self.labels, self.betas = {}, {}
        (root / "stimuli").mkdir(parents=True)
        metadata = pd.DataFrame({"image_name": ALL, "dataset": "x", "participant": "n/a"})
        metadata["unique_or_shared"], metadata["n_reps"] = "shared", "4rep"
        metadata.to_csv(root / "stimuli/task-images_metadata.csv", index=False)
        with h5py.File(root / "stimuli/task-images_stimuli.h5", "w") as file:
            images = file.create_dataset("images", (len(ALL),), h5py.vlen_dtype(np.uint8))
            for row in range(len(ALL)):
                images[row] = encode(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        captions = [(name, index, f"{name} {index}") for name in ALL for index in (0, 2, 1)]
        table = pd.DataFrame(captions, columns=["image_name", "caption_idx", "caption"])
        table["source"] = np.where(table["caption_idx"] == 0, "ai", "human")
        table.to_csv(root / "stimuli/task-images_desc-captions.csv", index=False)
        for subj in (1, 3):
            self.write_subject(subj, rng)

    def write_subject(self, subj, rng):
        label = f"sub-{subj:02d}"
        betas = self.root / f"derivatives/glmsingle-tedana/{label}"
        for session in (1, 2, 31):
            folder = betas / f"ses-{session:02d}/func"
            folder.mkdir(parents=True)
            names = [*SHARED, OOD, *UNIQUE[subj], *SHARED[: session + 1]]
            start = f"{label}_ses-{session:02d}_task-images"
            volumes = rng.standard_normal((*GRID, len(names))).astype(np.float32)
            volumes[tuple(np.argwhere(self.general)[0])] = np.nan if session == 2 else 1.5
            path = folder / f"{start}_space-T1w_stat-effect_desc-SingletrialBetas_statmap.nii.gz"
            nibabel.save(nibabel.Nifti1Image(volumes, AFFINE), path)
            table = pd.DataFrame({"session": [f"ses-{session:02d}"] * len(names)})
            table["run"] = 1 + np.arange(len(names)) // 5
            table["beta_index"], table["label"] = np.arange(len(names)), names
            path = folder / f"{start}_desc-SingletrialBetas_trials.tsv"
            table.to_csv(path, sep="\t", index=False)
            self.labels[subj, session], self.betas[subj, session] = names, volumes
        self.save_map(subj, "stat-rsquare_desc-R2mean", 20.0 * np.ones(GRID))
        ceiling = np.linspace(0, 90, 720).reshape(GRID)
        self.save_map(subj, "desc-Noiseceiling12rep", ceiling)
        face = np.zeros(GRID)
        face[4] = 1
        for name, mask in {"laion-general": self.general, "FFA-1": face}.items():
            folder = self.root / f"derivatives/rois/{label}/laion"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{label}_space-T1w_res-1pt8_label-{name}_mask.nii.gz"
            nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), AFFINE), path)
        pool = [*SHARED, *UNIQUE[subj]]
        self.write_split(label, "tau", [n for n in pool if n not in SHARED[:2]], SHARED[:2])
        self.write_split(label, "ood", pool, [OOD])
        self.write_split("shared", "tau", SHARED[1:], SHARED[:1])

    def save_map(self, subj, name, values):
        label = f"sub-{subj:02d}"
        path = self.root / f"derivatives/glmsingle-tedana/{label}"
        path = path / f"{label}_task-images_space-T1w_{name}_statmap.nii.gz"
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), AFFINE), path)

    def write_split(self, pool, name, train, test, **changes):
        content = {"name": name, "pool": "sub-04 full pool", "splitter": "x", "params": {}}
        content |= {"n_train": len(train), "n_test": len(test)}
        content["variants"] = [{"variant_id": 0, "train_ids": train, "test_ids": test}]
        path = self.root / f"splits/{pool}/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | changes))
        return path

    def find(self, pattern, session=1):
        return next(self.root.glob(f"**/sub-01/ses-{session:02d}/func/*{pattern}"))


@pytest.fixture
def bucket(tmp_path):
    return Bucket(tmp_path / "bucket")


def read(bucket, tmp_path, subj=1, **options):
    laion_fmri.read(bucket.root, tmp_path / "out", subj, **{"val_images": 1, **options})
    return open_subject(tmp_path / "out", subj)


def test_the_mini_world_comes_back(tmp_path):
    world = simulate(3, 24, 6, 8, trials_per_session=40)
    laion_format.write(tmp_path / "source", 3, SourceData.from_world(world))
    laion_fmri.read(tmp_path / "source", tmp_path / "out", 3, image_size=0)
    subject, trials = open_subject(tmp_path / "out", 3), world.scan.trials
    np.testing.assert_array_equal(subject.betas, world.scan.betas)
    columns = ["trial", "image", "session", "run", "repeat", "split"]
    pd.testing.assert_frame_equal(subject.trials[columns], trials[columns], check_dtype=False)
    ids = np.unique(trials["image"])
    in_order = world.images[np.searchsorted(world.image_ids, ids)]
    np.testing.assert_array_equal(subject.images(ids), in_order)
    ceiling = world.scan.voxels["noise_ceiling"]
    np.testing.assert_allclose(subject.voxels["noise_ceiling"], ceiling, rtol=1e-4)
    assert subject.protocol.startswith("laion-tau@sub-03-")


@pytest.mark.parametrize("subj", [1, 3])
def test_a_bucket_made_by_plain_libraries(bucket, tmp_path, subj):
    subject = read(bucket, tmp_path, subj)
    places = np.argwhere(bucket.general)
    np.testing.assert_array_equal(subject.voxels[["i", "j", "k"]], places)
    betas = np.concatenate(
        [np.moveaxis(bucket.betas[subj, s], -1, 0)[:, bucket.general] for s in (1, 2)]
    )
    betas[:, 0] = 0  # constant in one session, NaN in the other
    np.testing.assert_array_equal(subject.betas, betas)
    assert subject.voxels["flat_sessions"].tolist() == [2] + [0] * (len(places) - 1)
    labels = bucket.labels[subj, 1] + bucket.labels[subj, 2]
    assert subject.trials["image"].tolist() == [ALL.index(label) for label in labels]
    assert subject.trials["session"].tolist() == [0] * 9 + [1] * 10
    assert subject.trials["run"].tolist() == [0] * 5 + [1] * 4 + [0] * 5 + [1] * 5
    mean = np.linspace(0, 0.9, 720).reshape(GRID)[bucket.general]
    ceiling = mean / (mean + 12 * (1 - mean))
    np.testing.assert_allclose(subject.voxels["noise_ceiling"], ceiling, rtol=1e-5)
    np.testing.assert_allclose(subject.voxels["noise_ceiling_12rep"], mean, rtol=1e-5)
    np.testing.assert_array_equal(subject.voxels["FFA-1"], places[:, 0] == 4)
    split = subject.trials.drop_duplicates("image").set_index("image")["split"]
    assert [ALL[image] for image in split.index[split == "test"]] == SHARED[:2]
    assert split[ALL.index(OOD)] == "exclude" and (split == "val").sum() == 1
    path = bucket.root / f"splits/sub-{subj:02d}/tau.json"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert subject.protocol == f"laion-tau@sub-{subj:02d}-{digest[:8]}"
    assert subject.attributes["split_sha256"] == digest
    with h5py.File(bucket.root / "stimuli/task-images_stimuli.h5") as file:
        jpeg = np.asarray(Image.open(io.BytesIO(file["images"][4].tobytes())))
    np.testing.assert_array_equal(subject.images([4])[0], jpeg)
    captions = subject.captions[subject.captions["image"] == 0]["caption"].tolist()
    assert captions == [f"{ALL[0]} 1", f"{ALL[0]} 2"]  # people's, in their order
    names = subject.labels.set_index("image")
    assert names.loc[4, "name"] == OOD and names.loc[4, "ood_kind"] == "unusual"


def test_options_choose_voxels_sessions_and_splits(bucket, tmp_path):
    subject = read(
        bucket, tmp_path, rois="FFA1", sessions="2", split_name="ood", ood_types="unusual"
    )
    assert subject.betas.shape == (10, 80) and set(subject.trials["session"]) == {1}
    assert [ALL[image] for image in subject.image_ids("test")] == [OOD]
    assert "laion-ood@sub-01-" in subject.protocol
    assert subject.protocol.endswith("+unusual+sessions-2")
    shared = read(bucket, tmp_path, pool="shared", rois="all", val_images=0)
    assert shared.betas.shape == (19, 720)
    assert {ALL[image] for image in shared.image_ids("train")} == set(SHARED[1:])
    mask = np.zeros(GRID, np.uint8)
    mask[4, :2] = 1
    nibabel.save(nibabel.Nifti1Image(mask, AFFINE), bucket.root / "own.nii.gz")
    own = read(bucket, tmp_path, mask="own.nii.gz", rois="FFA-1")
    np.testing.assert_array_equal(own.voxels[["i", "j", "k"]], np.argwhere(mask))
    ids = [ALL.index(name) for name in (UNIQUE[1][0], SHARED[2], SHARED[0])]
    table = pd.DataFrame({"image": ids, "split": ["val", "train", "test"]})
    table.to_csv(bucket.root / "splits.csv", index=False)
    moved = read(bucket, tmp_path)
    assert moved.image_ids("val").tolist() == [ids[0]]
    assert moved.image_ids("train").tolist() == [ids[1]]
    table.replace("test", "train").to_csv(bucket.root / "splits.csv", index=False)
    with pytest.raises(PerceptError, match="in training or validation, which is tested by tau"):
        read(bucket, tmp_path)


def test_early_files_and_a_folder_of_pictures(bucket, tmp_path):
    """Other names and columns of the tables, and pictures as files."""
    for session in (1, 2):
        path = bucket.find("_trials.tsv", session)
        table = pd.read_csv(path, sep="\t").rename(columns={"label": "stimulus_id"})
        table[["run", "stimulus_id"]].to_csv(
            path.with_name("sub-01_desc-GLMsingle_events.tsv"), sep="\t", index=False
        )
        path.unlink()
        betas = bucket.find("_statmap.nii.gz", session)
        betas.rename(betas.with_name("sub-01_desc-singletrial_stat-effect_statmap.nii.gz"))
    images = bucket.root / "stimuli/images"
    images.mkdir()
    with h5py.File(bucket.root / "stimuli/task-images_stimuli.h5") as file:
        for row, name in enumerate(ALL):
            (images / name).write_bytes(file["images"][row].tobytes())
    (bucket.root / "stimuli/task-images_stimuli.h5").unlink()
    subject = read(bucket, tmp_path)
    labels = bucket.labels[1, 1] + bucket.labels[1, 2]
    assert subject.trials["image"].tolist() == [ALL.index(label) for label in labels]
    pixels = np.asarray(Image.open(images / OOD))
    np.testing.assert_array_equal(subject.images([ALL.index(OOD)])[0], pixels)


def test_the_download_is_what_a_reading_needs(bucket, tmp_path):
    """The bucket as a mirror that is a folder: all but pictures, splits and later sessions."""
    fetch("laion_fmri", tmp_path / "copy", mirror=str(bucket.root), subj=1, categories="laion")
    copied = {p.relative_to(tmp_path / "copy") for p in (tmp_path / "copy").rglob("*.*")}
    names = {path.name for path in copied if path.suffix}
    assert {"task-images_metadata.csv", "task-images_desc-captions.csv"} <= names
    assert not any("stimuli.h5" in name or "ses-02" in name or "sub-03" in name for name in names)
    for part in ("stimuli/task-images_stimuli.h5", "splits"):
        (bucket.root / part).rename(tmp_path / "copy" / part)
    bucket.root = tmp_path / "copy"
    assert read(bucket, tmp_path).betas.shape[0] == 9
    with pytest.raises(PerceptError, match="choose of body"):
        fetch("laion_fmri", tmp_path / "copy", mirror=str(bucket.root), categories="legs")


def test_kinds_of_images_out_of_distribution():
    assert find_ood_kind(OOD) == "unusual" and find_ood_kind(SHARED[0]) == ""
    assert find_ood_kind("shared_4rep_OOD_illusion-natural_x.png") == "illusion-natural"
    assert find_ood_kind("shared_4rep_OOD_illusion_classic_1.jpg") == "illusion-classic"


# ------------------------------------------------------------------------------------- refusals
def cut_betas(bucket):
    path = bucket.find("_statmap.nii.gz")
    path.write_bytes(path.read_bytes()[:-300])


def drop_row(bucket):
    path = bucket.find("_trials.tsv")
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def swap_rows(bucket):
    path = bucket.find("_trials.tsv")
    table = pd.read_csv(path, sep="\t").iloc[::-1]
    table.to_csv(path, sep="\t", index=False)


def drop_table(bucket):
    bucket.find("_trials.tsv").unlink()


def move_region(bucket):
    path = next(bucket.root.glob("**/sub-01*label-FFA-1*"))
    values = np.asarray(nibabel.load(path).dataobj)
    nibabel.save(nibabel.Nifti1Image(values, AFFINE + 0.1 * np.eye(4)), path)


def lose_pictures(bucket):
    (bucket.root / "stimuli/task-images_stimuli.h5").unlink()


def spoil_picture(bucket):
    with h5py.File(bucket.root / "stimuli/task-images_stimuli.h5", "r+") as file:
        file["images"][0] = np.arange(9, dtype=np.uint8)


def forget_name(bucket):
    path = bucket.root / "stimuli/task-images_metadata.csv"
    path.write_text(path.read_text().replace(SHARED[0], "another.jpg"))


def overlap(bucket):
    bucket.write_split("sub-01", "tau", SHARED, SHARED[:1])


def train_on_ood(bucket):
    bucket.write_split("sub-01", "tau", [*SHARED[1:], OOD], SHARED[:1])


def add_variant(bucket):
    bucket.write_split("sub-01", "tau", SHARED[1:], SHARED[:1], variants=[{}, {}])


def miscount(bucket):
    bucket.write_split("sub-01", "tau", SHARED[1:], SHARED[:1], n_train=897)


def name_strangers(bucket):
    bucket.write_split("sub-01", "tau", [*SHARED[1:], "unique_x.jpg"], SHARED[:1])


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (cut_betas, {}, "SingletrialBetas_statmap.nii.gz is damaged or cut off"),
        (drop_row, {}, r"has 9 volumes, .*_trials.tsv has 8 rows"),
        (swap_rows, {}, "beta_index of .*does not count the volumes"),
        (drop_table, {}, r"no table of trials \(\*_trials.tsv\)"),
        (move_region, {}, "affine of .*FFA-1_mask.nii.gz differs"),
        (lose_pictures, {}, "stimuli.h5 .the pictures. is missing: accept the stimulus agreement"),
        (spoil_picture, {}, "Picture shared_12rep_LAION.*cannot be decoded"),
        (forget_name, {}, "shared_12rep_LAION.*1003"),
        (overlap, {}, "in training and in test"),
        (train_on_ood, {}, "out-of-distribution image .* in training"),
        (add_variant, {}, "tau.json is no split of a known version"),
        (miscount, {}, "tau.json is no split of a known version"),
        (name_strangers, {}, "names 'unique_x.jpg' .* of another version than the images"),
        (None, {"split_sha256": "00ff"}, "has the SHA-256 .*split_sha256 is 00ff"),
        (None, {"split_name": "random_0"}, "random_0.json is missing, sub-01 has ood, tau"),
        (None, {"pool": "sub-07"}, "sub-07/tau.json is missing, none is there"),
        (None, {"ood_types": "unusual"}, "split tau tests no such images"),
        (None, {"split_name": "ood", "ood_types": "odd"}, "ood_types is 'odd'"),
        (
            None,
            {"rois": "V9"},
            "sub-01 of LAION-fMRI has no region V9: it has FFA-1, laion-general",
        ),
        (None, {"sessions": "31"}, "sessions is '31', but the data set has 1 to 30"),
        (None, {"sessions": "1,3"}, "Session 3 of sub-01 is missing"),
        (None, {"mask": "nowhere.nii.gz"}, "nowhere.nii.gz .* is missing"),
    ],
)
def test_refusals(bucket, tmp_path, spoil, options, message):
    if spoil is not None:
        spoil(bucket)
    with pytest.raises(PerceptError, match=message) as caught:
        read(bucket, tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "subj01").exists()


def test_other_subjects_are_refused(bucket, tmp_path):
    with pytest.raises(PerceptError, match="subj is 2: LAION-fMRI has 1, 3, 5, 6, 7"):
        read(bucket, tmp_path, 2)
    with pytest.raises(PerceptError, match="no ses-YY/func"):
        read(bucket, tmp_path, 5)
