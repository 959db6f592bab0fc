"""Pools as they are found: linked folders, tar files that end early or are two in one, and odd
files beside images. Nothing is missing without a word, and one bad item costs no other.
"""

import io
import json
import os
import tarfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from src.search import embed_images, find_new_parts, load_local_images
from src.search import images as search_images
from src.search.tables import MAX_FIELDS, clean_fields, make_storable, make_table
from src.utils import PerceptError, read_json

SIZE = 16


def png(value, size=(20, 20)):
    content = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255 - value)).save(content, "png")
    return content.getvalue()


def tar(members, format=tarfile.PAX_FORMAT):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as file:
        for name, member in members:
            info = tarfile.TarInfo(name)
            info.size = len(member)
            file.addfile(info, io.BytesIO(member))
    return content.getvalue()


def encode(pixels):
    """The colour of each image, which tells one from another."""
    return pixels.mean((1, 2)).astype(np.float32) + 1


def embed_pool(pool, folder):
    return embed_images(pool, folder, encode, {"model": "toy"}, SIZE)


def read_metadata(folder):
    tables = [pd.read_parquet(path) for path in sorted((folder / "metadata").iterdir())]
    return pd.concat(tables, ignore_index=True)


def check_rows(folder, stored):
    """Each row's embedding is that of the image which its metadata leads to."""
    pixels, available = load_local_images(read_metadata(folder), SIZE)
    assert available.all()
    expected = encode(pixels)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(stored.get_rows(range(len(stored))), expected, atol=2e-3)


# --------------------------------------------------------------------------------- linked folders
def test_linked_folders_are_searched_once_each(tmp_path):
    pool, disk = tmp_path / "pool", tmp_path / "disk2"
    for folder, names in ((pool / "own", "ab"), (disk / "deep", "cde")):
        folder.mkdir(parents=True)
        for i, name in enumerate(names):
            (folder / f"{name}.png").write_bytes(png(i))
    (pool / "linked").symlink_to(disk)
    (pool / "again").symlink_to(disk)
    (disk / "deep" / "circle").symlink_to(pool)
    (pool / "file.png").symlink_to(disk / "deep" / "c.png")
    (pool / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="1 links below .* lead nowhere .*gone.png"):
        stored = embed_pool(pool, tmp_path / "index")
    assert len(stored) == 6
    check_rows(tmp_path / "index", stored)


def test_names_that_are_no_text_are_left_out_and_named(tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "good.png").write_bytes(png(3))
    with open(os.fsencode(pool) + b"/bad\xff.png", "wb") as file:
        file.write(png(4))
    with pytest.warns(UserWarning, match=r"bad\\udcff.png"):
        assert len(embed_pool(pool, tmp_path / "index")) == 1


def test_what_is_passed_over_is_said(tmp_path):
    (tmp_path / "00000.tar").write_bytes(tar([("a.png", png(1))]))
    (tmp_path / "loose.png").write_bytes(png(2))
    (tmp_path / "00001.tar.gz").write_bytes(b"")
    with pytest.warns(UserWarning) as warned:
        assert [part.name for part in find_new_parts(tmp_path)] == ["00000.tar"]
    assert [str(w.message).split("such as ")[1].split(",")[0] for w in warned] == [
        "loose.png",
        "00001.tar.gz",
    ]


# -------------------------------------------------------------------------------------- tar files
WHOLE = [(f"{i:05d}.png", png(10 * i)) for i in range(6)]


def cut_between_members(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as file:
        return content[: [member.offset for member in file][3]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_between_members, "cut off after"),
        (lambda content: content[: len(content) // 2], "cut off after"),
        (lambda content: content[:100], "truncated header"),
        (lambda content: content + b"what follows" * 100, "is not of a tar file"),
        (lambda content: cut_between_members(content) + bytes(17 * 2**20), "are zeros"),
        (lambda content: b"", "empty file"),
    ],
)
def test_a_tar_that_ends_early_costs_no_other_and_is_read_when_mended(tmp_path, damage, message):
    pool, whole = tmp_path / "pool", tar(WHOLE)
    pool.mkdir()
    (pool / "00000.tar").write_bytes(damage(whole))
    (pool / "00001.tar").write_bytes(tar([("x.png", png(200))]))
    with pytest.raises(PerceptError, match=f"begins with 00000.tar cannot be read.*{message}"):
        embed_pool(pool, tmp_path / "index")
    assert list(read_metadata(tmp_path / "index")["image_path"]) == ["x"]
    (pool / "00000.tar").write_bytes(whole)
    stored = embed_pool(pool, tmp_path / "index")
    assert len(stored) == 7
    check_rows(tmp_path / "index", stored)


def test_tars_that_are_several_in_one_are_read_to_their_end(tmp_path):
    second = [("00000.png", png(90)), ("00000.txt", b"second"), ("00001.png", png(91))]
    first = [("00000.png", png(1)), ("00000.txt", b"first")]
    (tmp_path / "pool").mkdir()
    content = tar(first) + tar(second) + tar(WHOLE[3:])
    (tmp_path / "pool" / "00000.tar").write_bytes(content)
    stored = embed_pool(tmp_path / "pool", tmp_path / "index")
    assert len(stored) == 6
    captions = read_metadata(tmp_path / "index")["caption"]
    assert captions[:2].tolist() == ["first", "second"] and captions[2:].isna().all()
    check_rows(tmp_path / "index", stored)


def test_a_tar_that_was_fetched_again_replaces_its_rows(tmp_path):
    (tmp_path / "pool").mkdir()
    path = tmp_path / "pool" / "00000.tar"
    path.write_bytes(tar(WHOLE[:2]))
    (tmp_path / "pool" / "00001.tar").write_bytes(tar([("x.png", png(200))]))
    embed_pool(tmp_path / "pool", tmp_path / "index")
    path.write_bytes(tar(WHOLE))
    stored = embed_pool(tmp_path / "pool", tmp_path / "index")
    assert sorted(read_metadata(tmp_path / "index")["image_path"]) == [
        *(name.removesuffix(".png") for name, _ in WHOLE),
        "x",
    ]
    check_rows(tmp_path / "index", stored)


def test_unsorted_tars_keep_captions_with_their_images(tmp_path):
    members = [
        ("b.txt", b"of b"),
        ("a.png", png(1)),
        ("._a.png", b"\x00\x05\x16\x07 of a Mac"),
        ("__MACOSX/._b.png", b"\x00\x05\x16\x07"),
        ("b.png", png(2)),
        ("photo.2019.jpg", png(3)),
        ("a.json", b'{"key": "of a"}'),
        ("a.txt", b"of a"),
        ("photo.2019.txt", b"of the photo"),
        ("a.cls", b"1"),
    ]
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "mac.tar").write_bytes(tar(members))
    stored = embed_pool(tmp_path / "pool", tmp_path / "index")
    lines = read_metadata(tmp_path / "index")
    assert lines["image_path"].tolist() == ["a", "b", "photo.2019"]
    assert lines["caption"].tolist() == ["of a", "of b", "of the photo"]
    assert lines["key"][0] == "of a" and lines["key"][1:].isna().all()
    assert read_json(tmp_path / "index" / "index.json")["unread"] == 0
    check_rows(tmp_path / "index", stored)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_in_tars_that_are_long_or_foreign_are_found_again(tmp_path, format):
    names = ["n" * 180 + ".png", "d" * 90 + "/" + "e" * 90 + ".png", "ä/ö.png", "./plain.png"]
    (tmp_path / "pool").mkdir()
    content = tar([(name, png(40 * i)) for i, name in enumerate(names)], format)
    (tmp_path / "pool" / "x.tar").write_bytes(content)
    stored = embed_pool(tmp_path / "pool", tmp_path / "index")
    assert len(stored) == 4
    check_rows(tmp_path / "index", stored)


def test_an_image_of_a_tar_is_only_read_at_its_own_place(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "x.tar").write_bytes(tar(WHOLE))
    embed_pool(tmp_path / "pool", tmp_path / "index")
    lines = read_metadata(tmp_path / "index")
    assert load_local_images(lines, 8)[1].all()
    wrong = lines.assign(tar_offset=np.roll(lines["tar_offset"], 1))  # of another image
    assert not load_local_images(wrong, 8)[1].any()
    for column, value in (
        ("tar_offset", np.nan),
        ("tar_offset", -5),
        ("tar_offset", 2.0**70),
        ("tar_offset", "x"),
        ("tar_size", 1e12),
        ("tar_size", 0),
        ("tar_size", None),
        ("tar", str(tmp_path)),
        ("tar", "\0"),
    ):
        assert not load_local_images(lines.assign(**{column: value}), 8)[1].any(), (column, value)


# ------------------------------------------------------------------------------- beside an image
@pytest.mark.parametrize(
    ("content", "usable"),
    [
        (b"[1, 2]", False),
        (b"{bad", False),
        ('{"caption": "café"}'.encode("latin-1"), False),
        (b"", False),
        (b"[" * 100_000, False),
        (b'{"n": 1' + b"0" * 5000 + b"}", False),
        (json.dumps({"hash": 2**70, "deep": {"a": 1}, "list": [1]}).encode(), True),
        (b'{"text": "\\ud800", "\\udc80": 1, "inf": Infinity}', True),
        (json.dumps({f"field {i}": i for i in range(5000)}).encode(), True),
        (json.dumps({"tar": "/etc/passwd", "tar_offset": 0, "image_path": "/etc"}).encode(), True),
    ],
)
def test_odd_sidecars_stop_nothing(tmp_path, content, usable, recwarn):
    pool = tmp_path / "pool"
    pool.mkdir()
    for i in range(3):
        (pool / f"{i}.png").write_bytes(png(i))
    (pool / "1.json").write_bytes(content)
    (pool / "2.json").write_text('{"hash": "text", "text": 5}')
    stored = embed_pool(pool, tmp_path / "index")
    assert len(stored) == 3
    messages = [str(warning.message) for warning in recwarn if "beside" in str(warning.message)]
    assert [str(pool / "1.png") in message for message in messages] == [True] * (not usable)
    lines = read_metadata(tmp_path / "index")
    assert len(lines.columns) <= MAX_FIELDS
    check_rows(tmp_path / "index", stored)


def test_large_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(search_images, "MAX_FILE_BYTES", 1000)
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "good.png").write_bytes(png(1))
    (pool / "large.png").write_bytes(png(1) + bytes(5000))
    with pytest.warns(UserWarning, match="1 of 2 images could not be read .*large.png"):
        assert len(embed_pool(pool, tmp_path / "index")) == 1
    (pool / "x.tar").write_bytes(tar([("good.png", png(1)), ("large.png", png(1) + bytes(5000))]))
    with pytest.warns(UserWarning, match="1 of 2 images could not be read .*x.tar:large.png"):
        assert len(embed_pool(pool, tmp_path / "other")) == 1


def test_tables_hold_what_others_wrote():
    table = make_table([
        clean_fields({"id": 1, "n": 2**60, "f": 1, "b": True, "s": "x"}),
        clean_fields({"id": "a2", "n": None, "f": 2.5, "b": None, "s": "\ud800"}),
        clean_fields([1]),
    ])  # fmt: skip
    assert table["id"][:2].tolist() == ["1", "a2"] and table["id"].isna().tolist()[2]
    assert table["n"][0] == str(2**60)  # a float would be another number
    assert table["f"][:2].tolist() == [1.0, 2.5] and table["b"].tolist() == [True, None, None]
    assert table["s"][1] == "\\ud800"
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    mixed = pd.DataFrame({"caption": [1, "a", np.nan], "rank": [1, 2, 3]})
    make_storable(mixed).to_parquet(buffer)
    assert make_storable(mixed)["caption"][:2].tolist() == ["1", "a"]
