"""MindEye2's public files as they are, read after a download of some of them."""

import shutil

import numpy as np
import pytest
import torch
from real_files import write_mindeye2

from src.data.subject import open_subject
from src.readers import mindeye2, prepare_if_missing
from src.safe_pickle import load_texts
from src.utils import PerceptError


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mindeyev2")
    world = write_mindeye2(folder)[1]
    return folder, world


@pytest.fixture
def one_session(release, tmp_path):
    """What a download of one session leaves."""
    folder = tmp_path / "source"
    shutil.copytree(release[0], folder)
    for path in (folder / "wds" / "subj01" / "train").glob("*.tar"):
        if path.stem != "0":
            path.unlink()
    return folder


def test_one_session_is_the_first_of_all(release, one_session, tmp_path):
    mindeye2.read(release[0], tmp_path / "all", 1, val_images=20)
    mindeye2.read(one_session, tmp_path / "one", 1, val_images=20, min_sessions=1)
    whole = open_subject(tmp_path / "all", 1).select_first_sessions(1)
    single = open_subject(tmp_path / "one", 1).select_first_sessions(1)
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(single.image_ids(split), whole.image_ids(split))
        rows, all_rows = (s.rows_by_image(split) for s in (single, whole))
        for a, b in zip(rows, all_rows, strict=True):
            np.testing.assert_array_equal(single.betas[a], whole.betas[b])
    assert len(single.image_ids("val")) < 20


def test_a_part_is_not_taken_for_the_whole(one_session, tmp_path):
    with pytest.raises(PerceptError, match=r"in no training tar: .*run.py download mindeye2 .*-p"):
        mindeye2.read(one_session, tmp_path / "out", 1)
    with pytest.raises(PerceptError, match="session 2 of subject 1.* is missing"):
        mindeye2.read(one_session, tmp_path / "out", 1, min_sessions=2)
    mindeye2.read(one_session, tmp_path / "out", 1, min_sessions=1)
    with pytest.raises(PerceptError, match="first 1 of 6 sessions.*num_sessions 1"):
        open_subject(tmp_path / "out", 1).select_first_sessions(0)


def test_how_many_sessions_must_be_there_is_no_other_preparation(one_session, tmp_path):
    dataset = tmp_path / "out"
    prepare_if_missing("mindeye2", str(one_session), str(dataset), 1, min_sessions=1)
    prepare_if_missing("mindeye2", str(one_session), str(dataset), 1)
    assert "min_sessions" not in (dataset / "subj01" / "prepared.json").read_text()


def test_captions_of_people_come_with_the_files(release, tmp_path):
    folder, _ = release
    mindeye2.read(folder, tmp_path / "out", 1)
    subject = open_subject(tmp_path / "out", 1)
    texts = np.load(folder / "COCO_73k_annots_curated.npy")
    for image, part in subject.captions.groupby("image"):
        assert part["caption"].tolist() == [text for text in texts[image] if text]
    assert set(subject.captions["image"]) == set(subject.all_images)


@pytest.mark.parametrize("with_shared", [True, False])
def test_without_them_the_test_images_have_one_each(release, tmp_path, with_shared):
    folder = tmp_path / "source"
    shutil.copytree(release[0], folder)
    (folder / "COCO_73k_annots_curated.npy").unlink()
    if not with_shared:
        (folder / "shared1000.npy").unlink()
    mindeye2.read(folder, tmp_path / "out", 1)
    captions = open_subject(tmp_path / "out", 1).captions.set_index("image")["caption"]
    subject = open_subject(tmp_path / "out", 1)
    people = load_texts(folder / "evals" / "all_captions.pt")
    assert captions[subject.image_ids("test")].tolist() == people


def test_what_git_wrote_of_the_test_images_is_kept(release, tmp_path):
    mindeye2.read(release[0], tmp_path / "out", 1)
    subject = open_subject(tmp_path / "out", 1)
    people = load_texts(release[0] / "evals" / "all_captions.pt")
    table = subject.git_captions.set_index("image")["caption"]
    assert table[subject.image_ids("test")].tolist() == [f"git sees {text}" for text in people]


def test_captions_of_other_images_are_not_taken(release, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(release[0], folder)
    (folder / "COCO_73k_annots_curated.npy").unlink()
    images = torch.load(folder / "evals" / "all_images.pt", weights_only=True)
    torch.save(images.flip(0), folder / "evals" / "all_images.pt")
    with pytest.warns(UserWarning, match="all_captions.pt are left out.*all_images.pt shows other"):
        mindeye2.read(folder, tmp_path / "out", 1)
    assert open_subject(tmp_path / "out", 1).captions is None


def test_texts_of_a_file_that_runs_code_are_refused(tmp_path):
    torch.save(torch.nn.ReLU(), tmp_path / "x.pt")
    with pytest.raises(PerceptError, match="x.pt cannot be read"):
        load_texts(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(PerceptError, match="x.pt holds no list of texts"):
        load_texts(tmp_path / "x.pt")
