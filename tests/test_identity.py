"""What prepared data are: their identity, how they were prepared, and what is refused for it."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from src import readers, utils
from src.data import check_made_from, check_trained_on, format_identity, open_subject
from src.data.batches import BrainDataset
from src.data.identity import (
    compare_identities,
    find_identity,
    read_preparation,
    survey_files,
)
from src.data.layout import write_subject
from src.data.normaliser import Normaliser
from src.training import Batching, Execution, Optimisation, check_run, fit, record_training
from src.utils import PerceptError, save_checkpoint
from tests.toy_data import ATTRIBUTES, make_world


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path / "toy")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A HOME of its own, with an npz of twelve images in it."""
    monkeypatch.setattr("src.utils.HOME", tmp_path)
    monkeypatch.setattr("src.utils.HOME", tmp_path)
    write_npz(tmp_path / "my.npz")
    return tmp_path


def write_npz(path, seed=0):
    rng = np.random.default_rng(seed)
    np.savez(
        path,
        betas=rng.standard_normal((36, 5)).astype(np.float32),
        images=np.random.default_rng(9).integers(0, 256, (12, 4, 4, 3), np.uint8),
        image_index=np.repeat(np.arange(12), 3),
        session=np.tile(np.arange(3), 12),
    )


# ----------------------------------------------------------------------------------- the identity
def test_an_identity_follows_betas_trials_voxels_and_images(world):
    identity = world.subject.identity
    assert identity == open_subject(world.folder, 1).identity
    assert (identity["source"], identity["protocol"], identity["sessions"]) == ("test", "toy", 2)
    assert world.subject.select_first_sessions(1).identity == identity  # as they were prepared
    later = world.trials.assign(session=world.trials["session"] + 1)
    changes = {
        "betas": (-world.betas, world.trials, ATTRIBUTES),
        "trials": (world.betas, later, ATTRIBUTES),
        "protocol": (world.betas, world.trials, ATTRIBUTES | {"protocol": "other"}),
    }
    for name, (betas, trials, attributes) in changes.items():
        write_subject(world.folder / "subj02", betas, trials, None, attributes)
        other = open_subject(world.folder, 2).identity
        assert [key for key in identity if other[key] != identity[key]] == [name]
    assert "betas was" in compare_identities(identity, identity | {"betas": "x"})


def test_other_pixels_under_the_same_ids_are_other_data(world):
    before = world.subject.identity
    (world.folder / "images.h5").unlink()
    from src.data.images import write_images

    write_images(world.folder / "images.h5", 255 - world.images, world.ids)
    assert open_subject(world.folder, 1).identity != before


def test_samples_know_their_data(world):
    samples = BrainDataset(world.subject, "train")
    assert find_identity(samples) == {"subj01": world.subject.identity}
    assert find_identity(torch.utils.data.Subset(samples, [0])) == find_identity(samples)
    assert find_identity([1, 2]) == {}


# ------------------------------------------------------------------------------------- a training
class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(7, 1)

    def forward(self, voxels):
        return self.linear(voxels).square().mean()


def train(subject, folder, begin=None, epochs=1, resume=True):
    from src.training import Checkpointing

    return fit(
        Network(),
        lambda model, batch, epoch: (model(batch["voxels"]), {}),
        BrainDataset(subject, "train"),
        folder=folder,
        config={"model": "toy"},
        batching=Batching(epochs, 3),
        optimisation=Optimisation(1e-3),
        execution=Execution("cpu"),
        checkpointing=Checkpointing(resume=resume),
        begin=begin,
    )


def test_a_training_does_not_go_on_with_other_data_of_the_same_shape(world, tmp_path):
    logs = tmp_path / "logs"
    train(world.subject, logs / "high_level")
    write_subject(world.folder / "subj01", world.betas * 2, world.trials, None, ATTRIBUTES)
    other = open_subject(world.folder, 1)
    began = []
    with pytest.raises(PerceptError, match="data.subj01.betas was .* resume_from_ckpt"):
        train(other, logs / "high_level", lambda: began.append(1))
    assert not began
    with pytest.raises(
        PerceptError, match="last.safetensors was trained on other data .*betas was"
    ):
        check_trained_on(logs, other.key, other.identity)
    with pytest.raises(PerceptError, match="trained on other data"):
        check_run(logs, {}, [other], resume=True)
    check_run(logs, {}, [other], resume=False)
    train(other, logs / "high_level", lambda: began.append(1), resume=False)
    assert began == [1]
    check_trained_on(logs, other.key, other.identity)


def test_the_decoders_of_a_run_share_their_voxels(world, tmp_path):
    config = {"training": {"rois": "", "num_sessions": 0}, "data": {}}
    save_checkpoint(tmp_path / "low_level_ridge.safetensors", {"w": torch.zeros(1)}, config)
    check_run(tmp_path, config, [world.subject], resume=True)
    other = {"training": {"rois": "V1", "num_sessions": 0}}
    with pytest.raises(PerceptError, match="low_level_ridge.* with rois '', now it is 'V1'"):
        check_run(tmp_path, other, [world.subject], resume=True)
    check_run(tmp_path, other, [world.subject], resume=False)


def test_a_record_is_written_when_the_training_begins_and_not_before(world, tmp_path):
    class Run:
        logs = tmp_path / "logs"
        recorded = 0

        def record_parameters(self):
            self.recorded += 1

    run, subject = Run(), world.subject.select_first_sessions(2)
    run.logs.mkdir()
    begin = record_training(run, subject, Normaliser.fit(subject))
    assert not list(run.logs.iterdir()) and not run.recorded
    begin()
    assert sorted(path.name for path in run.logs.iterdir()) == [
        "normaliser.safetensors",
        "sessions.json",
    ]
    assert run.recorded == 1


def test_reconstructions_of_other_data_are_refused(world):
    identity = world.subject.identity
    check_made_from({"data": format_identity(identity)}, identity, "mine")
    check_made_from({}, identity, "mine")
    with pytest.raises(PerceptError, match="of mine were made from other data .*betas was 'x'"):
        check_made_from({"data": format_identity(identity | {"betas": "x"})}, identity, "mine")


# ------------------------------------------------------------------------- what is prepared again
def prepare(home, path="my.npz", overwrite=False, reader="npz", options=""):
    """Notebook 00 in short; whether something was prepared."""
    asked = readers.describe_preparation(reader, home / path, options)
    if not readers.needs_preparing(asked, "mine", 1, overwrite):
        return False
    readers.read_source(reader, home / path, "mine", 1, options)
    return True


def test_prepared_data_are_used_again_as_they_are(home):
    assert prepare(home)
    assert not prepare(home)
    recorded = read_preparation(home / "data" / "mine" / "subj01")
    assert (recorded.reader, recorded.options) == ("npz", {})
    assert not prepare(home, options="{seed: 42}")  # the default in words
    assert open_subject("mine", 1).identity["options"] == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": "{seed: 1}"}, "with seed='its default', and seed=1 is asked for"),
        ({"reader": "mindeye"}, r"my.npz read by npz, and .* read by mindeye is asked for"),
        ({"path": "other.npz"}, "my.npz read by npz, and .*other.npz has other files now"),
    ],
)
def test_other_data_than_are_there_are_refused_naming_both(home, change, said):
    prepare(home)
    write_npz(home / "other.npz", seed=1)
    before = open_subject("mine", 1).identity
    with pytest.raises(PerceptError, match=said + ".*overwrite True.*another dataset"):
        prepare(home, **change)
    assert open_subject("mine", 1).identity == before


def test_a_file_that_changes_under_its_name_is_noticed(home):
    prepare(home)
    write_npz(home / "my.npz", seed=1)
    with pytest.raises(PerceptError, match="has other files now: my.npz"):
        prepare(home)
    with pytest.raises(PerceptError, match="my.npz has other files"):
        readers.prepare_if_missing("mindeye", str(home / "my.npz"), "mine", 1)
    assert prepare(home, overwrite=True)
    assert not prepare(home)
    (home / "my.npz").unlink()  # prepared here, and used where the source is not
    assert not prepare(home)


def test_data_of_unknown_origin_are_not_taken_for_what_is_asked(home):
    readers.npz.read(home / "my.npz", "mine", 1)
    with pytest.raises(PerceptError, match="how they were prepared is not recorded"):
        prepare(home)
    (home / "data" / "mine" / "subj01" / "prepared.json").write_text("[")
    with pytest.raises(PerceptError, match="not recorded"):
        prepare(home)


def test_the_mini_world_is_asked_for_by_its_size(home):
    def ask(images):
        world = {"mini_images": images, "trials_per_session": 210}
        return readers.describe_preparation("npz", home / "made_here.npz", "", world)

    write_npz(home / "made_here.npz")
    world = {"mini_images": 400, "trials_per_session": 210}
    readers.read_source("npz", home / "made_here.npz", "mine", 1, "", world)
    write_npz(home / "made_here.npz", seed=2)  # written again by whoever simulates it
    assert not readers.needs_preparing(ask(400), "mine", 1)
    with pytest.raises(PerceptError, match="mini_images=400, and mini_images=600 is asked for"):
        readers.needs_preparing(ask(600), "mine", 1)


def test_another_protocol_than_was_prepared_is_refused(world):
    subject = world.subject
    readers.check_protocol(subject, "nsd-1000", ("nsd-1000", "nsd-982"))  # of another world
    subject.protocol = "nsd-982"
    with pytest.raises(PerceptError, match="with protocol nsd-982, nsd-1000 is asked for"):
        readers.check_protocol(subject, "nsd-1000", ("nsd-1000", "nsd-982"))


# ---------------------------------------------------------------------------- the files of a source
def test_files_of_a_source(tmp_path):
    for name in ("train/subj01_0.tar", "train/subj01_1.tar", "train/subj02_0.tar", "images.hdf5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".cache").write_text("")
    first = survey_files(tmp_path, 1)
    assert {name: n for name, (n, _) in first.items()} == {
        "images.hdf#": 1,
        "train/subj#_#.tar": 2,
    }
    (tmp_path / "train" / "subj02_1.tar").write_text("of another subject")
    assert survey_files(tmp_path, 1) == first
    (tmp_path / "train" / "subj01_2.tar").write_text("a further session")
    assert survey_files(tmp_path, 1) != first
    (tmp_path / "train" / "subj01_2.tar").unlink()
    os.utime(tmp_path / "images.hdf5", ns=(1, 1))
    assert survey_files(tmp_path, 1) != first
    os.symlink(tmp_path, tmp_path / "train" / "back")
    assert survey_files(tmp_path / "absent", 1) == {}


def test_further_files_of_other_kinds_and_prepared_ones_do_not_count(home):
    folder = home / "data" / "mine"
    folder.mkdir(parents=True)
    write_npz(folder / "my.npz")
    preparation = readers.describe_preparation("npz", folder)
    files = survey_files(folder, 1, folder)
    readers.read_source("npz", folder / "my.npz", "mine", 1)
    assert survey_files(folder, 1, folder) == files
    (folder / "rois.mgz").write_text("fetched for another recipe")
    recorded = replace(preparation, files=files)
    from src.data.identity import find_changed_files

    assert find_changed_files(recorded, folder, 1) == ""


def test_a_relative_home_is_refused(monkeypatch):
    monkeypatch.setenv("PERCEPT_HOME", "work")
    with pytest.raises(PerceptError, match="PERCEPT_HOME is 'work', a relative path"):
        utils.check_home()
    for right in ("/scratch/me", "~/work", ""):
        monkeypatch.setenv("PERCEPT_HOME", right)
        utils.check_home()


def test_a_record_is_plain_json(home):
    prepare(home)
    content = json.loads((home / "data" / "mine" / "subj01" / "prepared.json").read_text())
    assert content["source"] == str(home / "my.npz") and list(content["files"]) == ["my.npz"]
