"""Folders of an index that others made or that went wrong: what is theirs stays as it is, and
nothing is searched as what it is not.
"""

import threading

import faiss
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from src.files.ownership import lock_folder
from src.search import (
    Embeddings,
    LocalIndex,
    build_index,
    check_neighbours,
    check_pictures,
    choose_index,
    describe_encoder,
    embed,
    embed_images,
    find_foreign_index,
    find_picture_source,
    load_local_images,
    needs_building,
    write_tars,
)
from src.utils import PerceptError, read_json

DIM = 8


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def random_rows(n=60, seed=0):
    return unit(np.random.default_rng(seed).standard_normal((n, DIM))).astype(np.float32)


def store(folder, rows, parts=2):
    """Embeddings as clip-retrieval writes them."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for i, part in enumerate(np.array_split(np.arange(len(rows)), parts)):
        np.save(folder / "img_emb" / f"img_emb_{i}.npy", rows[part].astype(np.float16))
        lines = pd.DataFrame({"image_path": [f"{row}.jpg" for row in part]})
        lines.to_parquet(folder / "metadata" / f"metadata_{i}.parquet")
    return folder


def write_foreign(path, rows, factory="Flat", metric=faiss.METRIC_INNER_PRODUCT):
    index = faiss.index_factory(rows.shape[1], factory, metric)
    index.add(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(path))
    return path


def read_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flat(rows=60):
    return choose_index(rows, DIM, kind="Flat")[0]


def encode(pixels):
    flat_pixels = pixels.reshape(len(pixels), -1).astype(np.float32)
    return flat_pixels[:, ::31][:, :DIM] + 1


def draw(folder, names, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    return folder


def embed_pool(pool, folder, **options):
    return embed_images(pool, folder, encode, {"model": "toy"}, 16, **options)


def list_paths(folder):
    return [path for part in sorted((folder / "metadata").iterdir())
            for path in pd.read_parquet(part)["image_path"]]  # fmt: skip


# --------------------------------------------------------------------------- what others have made
@pytest.mark.parametrize("name", ["image.index", "image.index/populated.index"])
def test_an_index_of_others_is_searched_and_left_as_it_is(tmp_path, name):
    rows = random_rows()
    folder = store(tmp_path / "theirs", rows)
    write_foreign(folder / name, rows, "HNSW16")
    before = read_files(folder)
    assert find_foreign_index(folder) == folder / "image.index"
    assert not needs_building(folder)
    assert LocalIndex(folder).search(rows, 1).row[:, 0].tolist() == list(range(60))
    assert read_files(folder) == before
    assert needs_building(folder, "SQ8")
    ours = build_index(folder, choose_index(60, DIM, kind="SQ8")[0])
    assert ours.paths[0].parent == folder / "percept.index" and ours.kind == "SQ8"
    assert build_index(folder, flat()).kind == "Flat"  # ours is replaced, theirs is not
    after = read_files(folder)
    assert {path: after[path] for path in before} == before
    assert LocalIndex(folder).kind == "Flat"


def test_images_are_not_mixed_into_embeddings_of_an_unknown_encoder(tmp_path):
    pool = draw(tmp_path / "pool", ["1.png"])
    for folder in (store(tmp_path / "embeddings", random_rows()), tmp_path / "index"):
        if folder.name == "index":
            write_foreign(folder / "image.index", random_rows())
        before = read_files(folder)
        with pytest.raises(PerceptError, match="encoder is not recorded"):
            embed_pool(pool, folder)
        assert read_files(folder) == before


def test_an_index_json_of_others_is_not_replaced(tmp_path):
    folder = store(tmp_path / "theirs", random_rows())
    write_foreign(folder / "image.index", random_rows())
    (folder / "index.json").write_text('{"pages": []}')
    assert len(LocalIndex(folder)) == 60
    for work in (lambda: build_index(folder, flat()), lambda: embed_pool(tmp_path, folder)):
        draw(tmp_path, ["1.png"])
        with pytest.raises(PerceptError, match="not written by this program"):
            work()
    assert (folder / "index.json").read_text() == '{"pages": []}'


def test_a_call_that_is_refused_keeps_the_index_that_is_there(tmp_path):
    folder = store(tmp_path / "index", random_rows())
    build_index(folder, flat())
    before = read_files(folder)
    with pytest.raises(PerceptError, match="too few"):
        build_index(folder, choose_index(60, DIM, kind="IVF-PQ")[0])
    assert read_files(folder) == before


def test_encoders_are_named_or_refused(tmp_path):
    folder = store(tmp_path / "theirs", random_rows())
    write_foreign(folder / "image.index", random_rows())
    assert describe_encoder(LocalIndex(folder), {"model": "toy"}).startswith("not recorded")
    embed_pool(draw(tmp_path / "pool", ["1.png", "2.png"]), tmp_path / "ours")
    build_index(tmp_path / "ours", flat(2))
    index = LocalIndex(tmp_path / "ours")
    assert describe_encoder(index, {"model": "toy"}) == "recorded: toy"
    with pytest.raises(PerceptError, match="same encoder"):
        describe_encoder(index, {"model": "other"})


# ------------------------------------------------------------------------------ what it compares by
@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "SQ8", "IDMap2,Flat"])
def test_distances_become_cosines(tmp_path, factory):
    rows = random_rows()
    index = faiss.index_factory(DIM, factory, faiss.METRIC_L2)
    index.train(rows)
    if factory.startswith("IDMap2"):
        index.add_with_ids(rows, np.arange(60))
    else:
        index.add(rows)
    faiss.write_index(index, str(tmp_path / "image.index"))
    result = LocalIndex(tmp_path).search(rows, 3, exclude=[7])
    others = np.delete(np.arange(60), 7)
    assert result.row[others, 0].tolist() == others.tolist() and 7 not in result.row
    cosines = np.take_along_axis(rows @ rows.T, result.row, 1)
    np.testing.assert_allclose(result.similarity, cosines, atol=0.03)


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L1])
def test_rows_that_cosines_cannot_be_told_of_are_refused(tmp_path, metric):
    lengths = np.linspace(0.5, 3, 60, dtype=np.float32)[:, None]
    write_foreign(tmp_path / "image.index", random_rows() * lengths, metric=metric)
    with pytest.raises(PerceptError, match="length one|metric"):
        LocalIndex(tmp_path)


def test_with_embeddings_beside_it_distances_only_propose(tmp_path):
    rows = random_rows()
    folder = store(tmp_path / "theirs", rows)
    write_foreign(folder / "image.index", rows, metric=faiss.METRIC_L2)
    result = LocalIndex(folder).search(rows, 2)
    assert result.row[:, 0].tolist() == list(range(60))
    np.testing.assert_allclose(result.similarity[:, 0], 1, atol=1e-3)


def test_an_index_of_other_rows_is_refused(tmp_path):
    rows = random_rows()
    folder = store(tmp_path / "theirs", rows)
    write_foreign(folder / "image.index", random_rows(seed=1))
    with pytest.raises(PerceptError, match="is not of the embeddings"):
        LocalIndex(folder)
    wide = np.concatenate([rows, rows], 1)
    write_foreign(folder / "image.index", wide)
    with pytest.raises(PerceptError, match=r"different numbers a row \(8, 16\)"):
        LocalIndex(folder)


def test_an_index_without_rows_or_with_ids_of_its_own_is_refused(tmp_path):
    write_foreign(tmp_path / "none" / "image.index", np.empty((0, DIM), np.float32))
    with pytest.raises(PerceptError, match="holds no rows"):
        LocalIndex(tmp_path / "none")
    index = faiss.index_factory(DIM, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(random_rows(5), np.arange(5) + 1000)
    faiss.write_index(index, str(tmp_path / "image.index"))
    with pytest.raises(PerceptError, match="ids of their own"):
        LocalIndex(tmp_path).search(random_rows(2), 2)


# ------------------------------------------------------------------------------------ damaged files
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((40, DIM), np.nan, np.float16), "img_emb_0.npy holds NaN"),
        (np.zeros((40, DIM), np.float16), "img_emb_0.npy holds NaN, infinite values or nothing"),
        (np.full((40, DIM), "a"), "img_emb_0.npy holds <U1 and no floating-point"),
        (np.ones((40, DIM), np.int64), "img_emb_0.npy holds int64"),
        (np.empty((0, DIM), np.float16), "are empty"),
        (np.ones(DIM, np.float16), "not all \\(rows, dim\\)"),
    ],
)
def test_embeddings_that_are_none_are_named(tmp_path, values, message):
    (tmp_path / "img_emb").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", values)
    with pytest.raises(PerceptError, match=message):
        build_index(tmp_path, flat(40))


def test_one_embedding_that_is_nan_is_found_where_it_lies(tmp_path):
    rows = random_rows()
    rows[47, 3] = np.inf
    folder = store(tmp_path / "index", rows)
    with pytest.raises(PerceptError, match=r"img_emb_1.npy holds .* embedding 17 \(row 47 "):
        build_index(folder, flat())
    with pytest.raises(PerceptError, match="img_emb_1.npy"):
        Embeddings(folder).search_exact(random_rows(2), 3)


@pytest.mark.parametrize(
    "content",
    ["", "{", "\x00", '{"parts": 3}', '{"parts": [{"number": 0}]}', '{"index": [], "shards": []}',
     '{"index": {"kind": "Flat"}, "shards": [[5, 2]]}'],
)  # fmt: skip
def test_a_damaged_index_json_is_named(tmp_path, content):
    folder = store(tmp_path / "index", random_rows())
    (folder / "index.json").write_text(content)
    for work in (lambda: build_index(folder, flat()), lambda: LocalIndex(folder)):
        with pytest.raises(PerceptError, match="index.json"):
            work()
    assert (folder / "index.json").read_text() == content


def test_parts_that_do_not_belong_together_are_named(tmp_path):
    folder = store(tmp_path / "index", random_rows())
    (folder / "metadata" / "metadata_1.parquet").rename(folder / "metadata" / "metadata_3.parquet")
    with pytest.raises(PerceptError, match="img_emb_1.npy and .*metadata_3.parquet"):
        Embeddings(folder)
    ours = tmp_path / "ours"
    embed_pool(draw(tmp_path / "pool", ["1.png", "2.png"]), ours)
    np.save(ours / "img_emb" / "more.npy", random_rows())
    with pytest.raises(PerceptError, match="more.npy is not among the files"):
        Embeddings(ours)


def test_files_that_a_mac_adds_are_passed_over(tmp_path):
    folder = store(tmp_path / "index", random_rows())
    for name in ("img_emb/._img_emb_0.npy", "metadata/._metadata_0.parquet"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    assert len(Embeddings(folder)) == 60


@pytest.mark.parametrize("k", [0, -1, 2**40])
def test_numbers_of_neighbours_have_limits(tmp_path, k):
    index = build_index(store(tmp_path / "index", random_rows()), flat())
    with pytest.raises(PerceptError, match="at least one, and at most"):
        index.search(random_rows(2), k)
    assert index.search(random_rows(2), 500).row.shape == (2, 500)
    with pytest.raises(PerceptError, match="k = 61 pictures .* 60 rows"):
        check_neighbours(index, [], 61)
    with pytest.raises(PerceptError, match="has no row 60"):
        index.get_metadata([3, 60])


# ------------------------------------------------------------------------- kills, and second owners
@pytest.mark.parametrize("call", range(1, 11))
def test_killed_anywhere_every_picture_is_embedded_once(tmp_path, monkeypatch, call):
    rng = np.random.default_rng(0)
    samples = ((rng.integers(0, 255, (20, 20, 3), np.uint8), f"c{i}", {}) for i in range(24))
    write_tars(samples, tmp_path / "tars", 24, 8)
    n_calls, save, write = [0], np.save, embed.write_json

    def stop_at(work):
        def stopping(*arguments):
            n_calls[0] += 1
            if n_calls[0] == call:
                raise KeyboardInterrupt
            work(*arguments)

        return stopping

    monkeypatch.setattr(embed, "write_json", stop_at(write))
    monkeypatch.setattr(np, "save", stop_at(save))
    with pytest.raises(KeyboardInterrupt):
        embed_pool(tmp_path / "tars", tmp_path / "index")
    monkeypatch.undo()
    assert len(embed_pool(tmp_path / "tars", tmp_path / "index")) == 24
    assert len(list((tmp_path / "index" / "img_emb").iterdir())) == 3
    assert read_json(tmp_path / "index" / "index.json")["unwritten"] == []


def test_a_second_owner_is_refused(tmp_path):
    pool = draw(tmp_path / "pool", ["1.png"])
    folder = store(tmp_path / "index", random_rows())
    refused = []

    def work():
        for call in (
            lambda: embed_pool(pool, tmp_path / "new"),
            lambda: build_index(folder, flat()),
        ):
            try:
                call()
            except PerceptError as error:
                refused.append(str(error))

    with (
        lock_folder(tmp_path / "new", "embedding images"),
        lock_folder(folder, "building the index"),
    ):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(refused) == 2 and all("is being written by process" in text for text in refused)


# ------------------------------------------------------------------ replaced, moved and lost images
def test_a_replaced_image_is_embedded_again(tmp_path):
    pool = draw(tmp_path / "pool", [f"{i}.png" for i in range(4)])
    embed_pool(pool, tmp_path / "index", part_rows=2)
    build_index(tmp_path / "index", flat(4), shard_rows=2)
    draw(pool, ["2.png"], seed=9)
    stored = embed_pool(pool, tmp_path / "index", part_rows=2)
    assert sorted(path.rsplit("/")[-1] for path in list_paths(tmp_path / "index")) == [
        f"{i}.png" for i in range(4)
    ]
    index = build_index(tmp_path / "index", flat(4), shard_rows=2)
    pixels, available = load_local_images(index.get_metadata(range(4)), 16)
    assert available.all()
    np.testing.assert_allclose(stored.get_rows(range(4)), unit(encode(pixels)), atol=2e-3)
    assert index.search(encode(pixels), 1).row[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("as_tars", [False, True])
def test_a_moved_pool_is_followed_and_not_embedded_twice(tmp_path, as_tars):
    pool = tmp_path / "pool"
    if as_tars:
        rng = np.random.default_rng(0)
        write_tars(
            ((rng.integers(0, 255, (20, 20, 3), np.uint8), "", {}) for _ in range(6)), pool, 6, 3
        )
    else:
        draw(pool, [f"{i}.png" for i in range(6)])
    embed_pool(pool, tmp_path / "index")
    build_index(tmp_path / "index", flat(6))
    pool.rename(tmp_path / "elsewhere")
    index = LocalIndex(tmp_path / "index")
    with pytest.raises(PerceptError, match="None of 6 pictures .* is on this machine"):
        find_picture_source(index)
    assert len(embed_pool(tmp_path / "elsewhere", tmp_path / "index")) == 6
    index = LocalIndex(tmp_path / "index")
    assert find_picture_source(index) == "local"
    assert load_local_images(index.get_metadata(range(6)), 16)[1].all()


def test_two_pools_with_the_same_names_are_both_embedded(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        samples = ((rng.integers(0, 255, (20, 20, 3), np.uint8), "", {}) for _ in range(3))
        write_tars(samples, tmp_path / name, 3, 3)
        embed_pool(tmp_path / name, tmp_path / "index")
    assert len(Embeddings(tmp_path / "index")) == 6


def test_unreadable_images_are_counted_once_however_often_they_are_tried(tmp_path):
    pool = draw(tmp_path / "pool", ["1.png", "2.png"])
    (pool / "bad.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 of . images could not be read .*bad.png"):
            embed_pool(pool, tmp_path / "index")
        record = read_json(tmp_path / "index" / "index.json")
        assert record["unread"] == 1 and record["unread_names"] == [str(pool / "bad.png")]


def test_an_embedding_that_is_no_number_is_left_out_and_all_are_refused(tmp_path):
    pool = draw(tmp_path / "pool", [f"{i}.png" for i in range(4)])

    def encode_badly(pixels, bad=slice(1, 2)):
        rows = encode(pixels)
        rows[bad] = np.nan
        return rows

    with pytest.warns(UserWarning, match="1.png"):
        stored = embed_images(pool, tmp_path / "index", encode_badly, {"model": "toy"}, 16)
    assert len(stored) == 3
    with pytest.raises(PerceptError, match="encoder gives NaN"):
        embed_images(
            pool, tmp_path / "none", lambda x: encode_badly(x, slice(None)), {"model": "toy"}, 16
        )


def test_test_images_without_a_picture_stop_the_scores():
    check_pictures([True, True], [5, 6], "retrieved")
    with pytest.raises(PerceptError, match=r"1 of 2 test images .* \(retrieved: 6\)"):
        check_pictures(np.array([True, False]), [5, 6], "retrieved")


class Known:
    """An index of three rows with the given metadata."""

    def __init__(self, **columns):
        self.metadata = pd.DataFrame(columns)

    def __len__(self):
        return len(self.metadata)

    def get_metadata(self, rows):
        return self.metadata.iloc[rows].reset_index(drop=True)


def test_where_pictures_are(tmp_path):
    pool = draw(tmp_path, ["1.png"])
    assert find_picture_source(Known(image_path=["key", "k2", str(pool / "1.png")])) == "local"
    assert find_picture_source(Known(image_path=["key"] * 3, url=[None, None, "http://x"])) == "url"
    assert find_picture_source(Known(image=["AAAA"] * 3), rows=[[0, -1]]) == "sent"
    with pytest.raises(PerceptError, match="says of no row"):
        find_picture_source(Known(caption=["a"] * 3))
    with pytest.raises(PerceptError, match="says of no row"):  # a server names no files here
        find_picture_source(Known(image_path=[str(pool / "1.png")] * 3), rows=[[0]])
    with pytest.raises(PerceptError, match="No rows"):
        find_picture_source(Known(url=["http://x"]), rows=[[-1]])
