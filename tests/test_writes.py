"""Every write that fails ends in one sentence, and leaves earlier files as they were."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from src.data import ImageStore, cache_targets, write_image_table, write_images
from src.files import ownership
from src.files.ownership import replace_folder, restore_folder
from src.utils import PerceptError, atomic, make_folder, save_checkpoint, write_errors, write_json

MUCH = 1 << 20  # bytes, more than the disk of these tests has free


def write_tar(path):
    with tarfile.open(path, "w") as tar:
        tar.add(__file__)
        for _ in range(200):
            tar.add(__file__)


def write_figure(path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6))
    noise = np.random.default_rng(0).random((600, 600))
    figure.subplots().imshow(noise, interpolation="nearest")
    figure.savefig(path, format="png", dpi=200)


def write_index(path):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(64)
    index.add(np.ones((MUCH // 64, 64), np.float32))
    faiss.write_index(index, str(path))


def write_h5(path):
    with h5py.File(path, "w") as file:
        file["a"] = np.random.default_rng(0).random(MUCH)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", bytes(MUCH))


NOISE = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)

WRITERS = {
    "text": lambda path: path.write_text("x" * MUCH),
    "npy": lambda path: np.save(open(path, "wb"), np.ones(MUCH)),  # noqa: SIM115
    "npz": lambda path: np.savez(open(path, "wb"), a=np.ones(MUCH)),  # noqa: SIM115
    "torch": lambda path: torch.save({"a": torch.ones(MUCH)}, path),
    "safetensors": lambda path: save_file({"a": torch.ones(MUCH)}, path),
    "parquet": lambda path: pd.DataFrame({"a": np.random.random(MUCH)}).to_parquet(path),
    "csv": lambda path: pd.DataFrame({"a": np.arange(MUCH)}).to_csv(path),
    "hdf5": write_h5,
    "picture": lambda path: Image.fromarray(NOISE).save(path, "PNG"),
    "figure": write_figure,
    "tar": write_tar,
    "zip": write_zip,
    "faiss": write_index,
}

GUARDED = {
    "json": lambda path: write_json(path, ["x" * MUCH]),
    "checkpoint": lambda path: save_checkpoint(path, {"a": torch.ones(MUCH)}, {}),
}


def list_files(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != "filler")


def check_sentence(message, *words):
    assert "\n" not in message and len(message) < 700
    for word in ("could not be written", *words):
        assert word in message, message


def write_guarded(path, name):
    """By a function of ours that guards itself, or by a library within `atomic`."""
    if name in GUARDED:
        GUARDED[name](path)
        return
    with atomic(path) as temporary:
        WRITERS[name](temporary)


@contextlib.contextmanager
def small_disk(folder, options="size=4m"):
    """A disk of its own, where this may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(disk, leave):
    """Fill a disk up to about `leave` bytes."""
    free = shutil.disk_usage(disk).free
    with open(disk / "filler", "wb") as file:
        file.write(bytes(free - leave))


@pytest.mark.parametrize("name", [*WRITERS, *GUARDED])
def test_a_full_disk_is_one_sentence_whatever_writes(tmp_path, name):
    with small_disk(tmp_path / "disk") as disk:
        (disk / "earlier").write_text("before")
        fill(disk, 1 << 16)
        with pytest.raises(PerceptError) as raised:
            write_guarded(disk / "earlier", name)
        check_sentence(
            str(raised.value), str(disk / "earlier"), "filled up", "free", "PERCEPT_HOME"
        )
        assert (disk / "earlier").read_text() == "before"
        assert list_files(disk) == ["earlier"]


@pytest.mark.parametrize("name", [*WRITERS, *GUARDED])
def test_a_write_that_the_system_refuses_is_one_sentence(tmp_path, name):
    """The same without the right to mount a disk: no file may be larger than 100 kB."""
    (tmp_path / "earlier").write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(PerceptError) as raised:
            write_guarded(tmp_path / "earlier", name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_sentence(str(raised.value), str(tmp_path / "earlier"))
    assert (tmp_path / "earlier").read_text() == "before"
    assert list_files(tmp_path) == ["earlier"]


@pytest.mark.parametrize("name", ["text", "torch", "safetensors", "faiss", "hdf5", "json"])
def test_a_read_only_disk_is_one_sentence(tmp_path, name):
    with small_disk(tmp_path / "disk") as disk:
        (disk / "earlier").write_text("before")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for path in (disk / "earlier", disk / "new" / "file"):
            with pytest.raises(PerceptError) as raised:
                write_guarded(path, name)
            check_sentence(str(raised.value), "read-only", "PERCEPT_HOME")
        assert (disk / "earlier").read_text() == "before"


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ENOSPC, "filled up"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "may not write"),
        (errno.EIO, "reports an error"),
        (errno.ESTALE, "vanished"),
        (errno.EFBIG, "larger than"),
    ],
)
def test_what_the_system_says_is_explained(tmp_path, number, word):
    with pytest.raises(PerceptError) as raised, atomic(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    check_sentence(str(raised.value), word, str(tmp_path / "file"))
    assert list_files(tmp_path) == []


def test_a_folder_that_vanishes_is_one_sentence(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(PerceptError) as raised, atomic(folder / "file") as temporary:
        temporary.write_text("x")
        shutil.rmtree(folder)
    check_sentence(str(raised.value), f"the folder {folder} has vanished")


def test_a_name_that_is_too_long_is_one_sentence(tmp_path):
    with pytest.raises(PerceptError) as raised:
        write_json(tmp_path / ("x" * 250), {})
    check_sentence(str(raised.value), "shorter")


def test_a_file_where_a_folder_is_needed_and_the_other_way_round(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(PerceptError) as raised:
        write_json(tmp_path / "file" / "a.json", {})
    check_sentence(str(raised.value), f"{tmp_path / 'file'}", "there is a file of that name")
    with pytest.raises(PerceptError) as raised:
        write_json(tmp_path / "file" / "b" / "a.json", {})
    check_sentence(str(raised.value), f"{tmp_path / 'file'} is a file where a folder is needed")
    with pytest.raises(PerceptError, match="a file of that name"):
        make_folder(tmp_path / "file")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(PerceptError, match="a folder of that name"):
        write_json(tmp_path / "folder", {})
    assert list_files(tmp_path) == ["file", "folder"]


def test_errors_of_other_files_and_of_the_program_pass(tmp_path):
    """What is read while something is written has its own errors."""
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "out" / "a") as temporary:
        shutil.copy(tmp_path / "source", temporary)
    with pytest.raises(OSError, match="open file"), atomic(tmp_path / "out" / "a"):
        h5py.File(tmp_path / "source.h5", "r")
    with pytest.raises(ValueError, match="of the program"), write_errors(tmp_path / "a"):
        raise ValueError("of the program")
    assert list_files(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["text", "torch", "safetensors", "npy", "json", "checkpoint"])
def test_files_have_ordinary_permissions(tmp_path, name):
    mask = os.umask(0o022)
    try:
        write_guarded(tmp_path / "a", name)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
        os.umask(0o002)
        write_guarded(tmp_path / "a", name)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o664
    finally:
        os.umask(mask)


# ------------------------------------------------------------------------------ folders, as a whole
def write_version(folder, version):
    with replace_folder(folder) as temporary:
        for name in ("betas", "trials"):
            (temporary / name).write_text(version)


def read_version(folder):
    return {path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("has_exchange", [True, False])
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(
    tmp_path, monkeypatch, has_exchange
):
    """Killed before each change of the disk in turn, until one goes through."""
    folder = tmp_path / "subj01"
    if not has_exchange:
        monkeypatch.setattr(ownership, "_exchange", lambda first, second: False)
    n_killed = 0
    while True:
        write_version(folder, "old")
        child = os.fork()
        if not child:
            kill_before_change(n_killed)
            write_version(folder, "new")
            os._exit(0)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        restore_folder(folder)
        version = read_version(folder)
        assert version in ({"old"}, {"new"}) and (was_killed or version == {"new"})
        write_version(folder, "newest")
        assert read_version(folder) == {"newest"}
        assert [path.name for path in tmp_path.iterdir()] == ["subj01"]
        if not was_killed:
            break
        n_killed += 1
    assert n_killed > 5


def kill_before_change(number):
    """End this process before the call `number` of those that change a disk."""
    calls = 0

    def count(function):
        def counted(*args, **options):
            nonlocal calls
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return function(*args, **options)

        return counted

    for name in ("replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, count(getattr(os, name)))
    ownership._exchange = count(ownership._exchange)


def test_a_folder_has_ordinary_permissions_whoever_wrote_its_files(tmp_path):
    mask = os.umask(0o022)
    try:
        with replace_folder(tmp_path / "model") as temporary:
            save_file({"a": torch.ones(3)}, temporary / "model.safetensors")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "model" / "model.safetensors").stat().st_mode) == 0o644


def test_a_link_to_a_folder_gives_way_to_a_folder(tmp_path):
    """The folder that it leads to is left alone."""
    write_version(tmp_path / "elsewhere" / "subj01", "old")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "subj01").symlink_to(tmp_path / "elsewhere" / "subj01")
    write_version(tmp_path / "data" / "subj01", "new")
    assert read_version(tmp_path / "data" / "subj01") == {"new"}
    assert read_version(tmp_path / "elsewhere" / "subj01") == {"old"}
    assert list_files(tmp_path / "data") == ["subj01"]


def test_a_folder_whose_write_fails_is_as_before(tmp_path):
    write_version(tmp_path / "subj01", "old")
    with pytest.raises(PerceptError, match="filled up"), replace_folder(tmp_path / "subj01") as new:
        (new / "betas").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert read_version(tmp_path / "subj01") == {"old"}
    assert list_files(tmp_path) == ["subj01"]


def test_a_folder_is_replaced_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "GRACE_SECONDS", 0.1)
    with replace_folder(tmp_path / "subj01") as temporary:
        (temporary / "betas").write_text("first")
        child = os.fork()
        if not child:
            try:
                write_version(tmp_path / "subj01", "second")
            except PerceptError:
                os._exit(3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert read_version(tmp_path / "subj01") == {"first"}


# ------------------------------------------------------------------------------------ prepared data
def make_images(ids):
    rows = np.arange(len(ids) * 12, dtype=np.uint8).reshape(len(ids), 2, 2, 3)
    return rows + np.asarray(ids, np.uint8)[:, None, None, None]


def test_subjects_prepared_at_once_lose_no_images(tmp_path):
    """Both add theirs to one file and to one table."""
    children = []
    for first in (0, 100):
        child = os.fork()
        if not child:
            try:
                for ids in np.arange(first, first + 12).reshape(4, 3):
                    write_images(tmp_path / "images.h5", make_images(ids), ids)
                    write_image_table(tmp_path / "labels.parquet", pd.DataFrame({"image": ids}))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    expected = [*range(12), *range(100, 112)]
    assert sorted(ImageStore(tmp_path / "images.h5").image_ids) == expected
    assert pd.read_parquet(tmp_path / "labels.parquet")["image"].tolist() == expected
    assert list_files(tmp_path) == ["images.h5", "labels.parquet"]


def cache(folder, encode, n=8, shape=(3,), **options):
    return cache_targets(folder, "x", {"a": 1}, np.arange(n), encode, shape, "float32", **options)


def encode_means(images):
    return images.reshape(len(images), -1).mean(1)[:, None].repeat(3, 1)


def test_targets_that_are_complete_are_read_without_a_write(tmp_path):
    with small_disk(tmp_path / "disk", "size=40m") as disk:
        write_images(disk / "images.h5", make_images(np.arange(8)), np.arange(8))
        made = cache(disk, encode_means).rows(np.arange(8))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        np.testing.assert_array_equal(cache(disk, None).rows(np.arange(8)), made)
        with pytest.raises(PerceptError, match="could not be written: .* read-only"):
            cache_targets(disk, "y", {}, np.arange(8), encode_means, (3,))


def test_a_disk_that_fills_up_while_targets_are_made_is_one_sentence(tmp_path):
    shape = (1 << 16,)

    def encode(images):
        if not (disk / "filler").exists():
            fill(disk, 1 << 18)
        return np.ones((len(images), *shape), np.float32)

    with small_disk(tmp_path / "disk", "size=40m") as disk:
        write_images(disk / "images.h5", make_images(np.arange(8)), np.arange(8))
        with pytest.raises(PerceptError) as raised:
            cache(disk, encode, shape=shape, batch_size=2)
        check_sentence(str(raised.value), "filled up", "targets")
        (disk / "filler").unlink()
        assert len(cache(disk, lambda x: np.ones((len(x), *shape)), shape=shape)) == 8


@pytest.mark.parametrize("damage", ["none", "shorter", "other", "state"])
def test_targets_go_on_after_an_interruption(tmp_path, damage):
    """And end as those that were not interrupted; what was damaged meanwhile is made again."""
    write_images(tmp_path / "images.h5", make_images(np.arange(40)), np.arange(40))
    n_encoded = 0

    def encode(images):
        nonlocal n_encoded
        n_encoded += len(images)
        if n_encoded == 35:
            raise KeyboardInterrupt
        return encode_means(images)

    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path, encode, n=40, batch_size=1)
    (folder,) = (tmp_path / "targets").iterdir()
    partial = folder / "part-000.partial"
    if damage == "shorter":
        partial.write_bytes(partial.read_bytes()[:200])
    elif damage == "other":
        partial.write_bytes(b"<html>" + partial.read_bytes()[6:])
    elif damage == "state":
        (folder / "progress.json").write_text("{")
    n_encoded = 100
    targets = cache(tmp_path, encode, n=40, batch_size=1)
    assert n_encoded - 100 == (8 if damage == "none" else 40)
    images = make_images(np.arange(40))
    np.testing.assert_array_equal(targets.rows(np.arange(40)), encode_means(images).astype("f4"))
    assert list_files(folder) == ["meta.json", "part-000.ids", "part-000.npy"]
