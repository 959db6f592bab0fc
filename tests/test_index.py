"""The local index: every type against numpy, sources of all kinds, resuming, and the layout that
clip-retrieval reads.
"""

import io
import shutil
import signal
import subprocess
import sys

import faiss
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from src import miniworld
from src.search import (
    INDEX_KINDS,
    Embeddings,
    LocalIndex,
    build_index,
    building,
    choose_index,
    decode_image,
    embed_images,
    find_near_duplicates,
    find_new_parts,
    load_local_images,
    merge_shards,
    write_tars,
)
from src.utils import ROOT, PerceptError, read_json

DIM, SIZE = 32, 16
CLUSTERED = 11_000  # rows, enough to learn a compressed index from


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def store(folder, rows, parts=3, metadata=True):
    """Embeddings in clip-retrieval's layout."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for i, part in enumerate(np.array_split(np.arange(len(rows)), parts)):
        np.save(folder / "img_emb" / f"img_emb_{i}.npy", rows[part].astype(np.float16))
        if metadata:
            pd.DataFrame({"url": [f"https://x.org/{r}.jpg" for r in part]}).to_parquet(
                folder / "metadata" / f"metadata_{i}.parquet"
            )
    return folder


@pytest.fixture(scope="module")
def clusters():
    """Rows around 500 centres, as embeddings of pictures lie, and queries beside some of them."""
    rng = np.random.default_rng(0)
    rows = unit(
        rng.standard_normal((500, DIM))[rng.integers(500, size=CLUSTERED)]
        + 0.5 * rng.standard_normal((CLUSTERED, DIM))
    ).astype(np.float16)
    return rows.astype(np.float32), unit(
        rows[:40].astype(np.float32) + 0.1 * rng.standard_normal((40, DIM))
    )


def exact(rows, queries, k, excluded=()):
    scores = unit(queries) @ unit(rows).T
    scores[:, list(excluded)] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


@pytest.fixture(scope="module", params=INDEX_KINDS)
def built(request, clusters, tmp_path_factory):
    folder = store(tmp_path_factory.mktemp(request.param), clusters[0])
    plan, _ = choose_index(len(clusters[0]), DIM, kind=request.param)
    return build_index(folder, plan, shard_rows=4000)


def test_each_type_finds_what_numpy_finds(built, clusters):
    rows, queries = clusters
    result, (scores, order) = built.search(7 * queries, 10), exact(rows, queries, 10)
    hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(result.row, order, strict=True)])
    assert hits > (0.8 if built.kind == "IVF-PQ" else 0.999)
    same = result.row == order
    np.testing.assert_allclose(result.similarity[same], scores[same], atol=1e-3)
    assert (np.diff(result.similarity) <= 0).all()
    assert len(built.shards) == 3
    assert len(built) == CLUSTERED


def test_excluded_rows_are_never_found_and_others_take_their_place(built, clusters):
    rows, queries = clusters
    excluded = np.unique(built.search(queries, 5).row)
    result, (_, order) = built.search(queries, 5, excluded), exact(rows, queries, 5, excluded)
    assert not np.isin(result.row, excluded).any() and (result.row >= 0).all()
    assert (result.row == order).mean() > (0.6 if built.kind == "IVF-PQ" else 0.99)


def test_a_mapped_index_finds_the_same(built, clusters):
    result = built.search(clusters[1], 5)
    plan, _ = choose_index(CLUSTERED, DIM, kind=built.kind, mapped=True)
    mapped = build_index(built.folder, plan, shard_rows=4000)  # nothing is made anew
    np.testing.assert_array_equal(mapped.search(clusters[1], 5).row, result.row)
    assert plan.mapped and read_json(built.folder / "index.json")["index"]["mapped"]


def test_the_estimate_is_what_lies_on_disk(built):
    plan, _ = choose_index(CLUSTERED, DIM, kind=built.kind)
    files = [*built.folder.glob("image.index/0*.index"), *built.folder.glob("img_emb/*.npy")]
    centres = 3 if built.kind == "IVF-PQ" else 1  # which every shard has once more
    overhead = (centres - 1) * (plan.disk - CLUSTERED * (2 * DIM + 8 + 4))
    assert sum(file.stat().st_size for file in files) == pytest.approx(
        plan.disk + overhead, rel=0.1
    )


def test_joined_for_clip_retrieval(built, clusters):
    """As its `clip back` opens an index: populated.index of a folder, rows in the order of the
    metadata's files.
    """
    file = merge_shards(built.folder)
    plain = faiss.read_index(str(file), faiss.IO_FLAG_ONDISK_SAME_DIR)
    assert plain.ntotal == CLUSTERED
    metadata = pd.concat(
        pd.read_parquet(path) for path in sorted((built.folder / "metadata").glob("*.parquet"))
    )
    if built.kind == "IVF-PQ":
        faiss.extract_index_ivf(plain).nprobe = built.probes
    scores, rows = plain.search(clusters[1].astype(np.float32), 50)
    best = built.search(clusters[1], 1).row[:, 0]
    assert np.mean([b in neighbours for b, neighbours in zip(best, rows, strict=True)]) > 0.95
    assert metadata.iloc[best[0]]["url"] == built.get_metadata(best)["url"].iloc[0]


@pytest.mark.slow(reason="builds an index several times")
def test_shards_and_processes_change_nothing(built, clusters, tmp_path):
    shutil.copytree(built.folder, tmp_path / "index")
    plan, _ = choose_index(CLUSTERED, DIM, kind=built.kind)
    for rows, jobs, shards in ((3000, 2 if built.kind == "SQ8" else 1, 4), (20_000, 1, 1)):
        other = build_index(tmp_path / "index", plan, shard_rows=rows, jobs=jobs)
        assert len(other.shards) == shards
        np.testing.assert_array_equal(
            other.search(clusters[1], 8).row, built.search(clusters[1], 8).row
        )


def test_an_index_that_grows_makes_only_the_shards_that_grew(clusters, tmp_path):
    rows, queries = clusters
    folder = store(tmp_path / "index", rows[:5000], parts=2)
    plan, _ = choose_index(5000, DIM, kind="SQ8")
    build_index(folder, plan, shard_rows=2000)
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "image.index").iterdir()}
    np.save(folder / "img_emb" / "img_emb_2.npy", rows[5000:7000].astype(np.float16))
    pd.DataFrame({"url": [""] * 2000}).to_parquet(folder / "metadata" / "metadata_2.parquet")
    with pytest.raises(
        PerceptError, match="7,000 embeddings and an index of 5,000 rows: build the index again"
    ):
        LocalIndex(folder)
    grown = build_index(folder, plan, shard_rows=2000)
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "image.index").iterdir()}
    assert len(grown) == 7000
    assert {name for name in after if after[name] != before.get(name)} == {
        "0002.index",
        "0003.index",
    }
    np.testing.assert_array_equal(grown.search(queries, 1).row, exact(rows[:7000], queries, 1)[1])


def test_a_build_that_was_interrupted_goes_on(clusters, tmp_path, monkeypatch):
    folder, (plan, _) = (
        store(tmp_path / "index", clusters[0]),
        choose_index(CLUSTERED, DIM, kind="Flat"),
    )
    build_shard, calls = building._build_shard, []

    def broken(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(arguments)
        return build_shard(*arguments)

    monkeypatch.setattr(building, "_build_shard", broken)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, plan, shard_rows=4000)
    calls.append("go on")
    assert len(build_index(folder, plan, shard_rows=4000)) == CLUSTERED
    assert len(calls) == 4  # the first shard was not made again


KILLED = """
import os, signal, sys
import faiss
from src import search as index
write, written = faiss.write_index, []
def last(made, path):
    write(made, path)
    written.append(path)
    if len(written) == 3:  # what was learnt, a shard, and a second one that has not its name yet
        os.kill(os.getpid(), signal.SIGKILL)
faiss.write_index = last
index.build_index(sys.argv[1], index.choose_index(2000, 32, kind="SQ8")[0], shard_rows=500)
"""


@pytest.mark.slow(reason="builds an index in a process that is killed")
def test_a_build_that_was_killed_goes_on_to_the_same_index(clusters, tmp_path):
    plan = choose_index(2000, DIM, kind="SQ8")[0]
    complete, killed = (
        store(tmp_path / "whole", clusters[0][:2000]),
        store(tmp_path / "killed", clusters[0][:2000]),
    )
    build_index(complete, plan, shard_rows=500)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(killed)], cwd=ROOT, capture_output=True, text=True
    )
    file_names = sorted(path.name for path in (killed / "image.index").iterdir())
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert "0000.index" in file_names, process.stderr
    assert "0001.index" not in file_names, process.stderr
    assert any(name.endswith(".tmp") for name in file_names), process.stderr
    build_index(killed, plan, shard_rows=500)
    files = [
        {path.name: path.read_bytes() for path in (folder / "image.index").iterdir()}
        for folder in (complete, killed)
    ]
    assert files[0] == files[1] and len(files[0]) == 5


def test_equal_rows_come_in_order_and_what_is_not_there_is_minus_one(tmp_path):
    rows = np.zeros((6, 4))
    rows[:, 0] = 1
    rows[4:] = [0, 1, 0, 0]
    result = build_index(store(tmp_path / "index", rows), choose_index(6, 4)[0]).search(
        np.array([1.0, 0, 0, 0]), 8, exclude=[1]
    )
    assert result.row.tolist() == [[0, 2, 3, 4, 5, -1, -1, -1]]
    assert np.isneginf(result.similarity[0, 5:]).all()


def test_wrong_queries_are_refused(built):
    for queries, k, message in (
        (np.ones((2, 5)), 3, "Queries have 5 numbers and the index 32"),
        (np.full((1, DIM), np.nan), 3, "NaN"),
        (np.zeros((1, DIM)), 3, "zeros"),
        (np.ones((1, DIM)), 0, "at least one"),
    ):
        for search in (built.search, built.embeddings.search_exact):
            with pytest.raises(PerceptError, match=message):
                search(queries, k)


def test_the_scan_is_exact_and_tells_the_recall(built, clusters):
    rows, queries = clusters
    result = built.embeddings.search_exact(queries, 6, exclude=[0, 3])
    np.testing.assert_array_equal(result.row, exact(rows, queries, 6, [0, 3])[1])
    recall = built.measure_recall(10, queries=50)
    assert recall > (0.8 if built.kind == "IVF-PQ" else 0.999) and recall <= 1


# ------------------------------------------------------------------------------------- which index
def test_the_most_exact_index_that_fits_is_taken():
    million = [choose_index(1_000_000, 768, gigabytes)[0].kind for gigabytes in (4, 2, 1, 0.2)]
    assert million == ["Flat", "SQfp16", "SQ8", "IVF-PQ"]
    plan, table = choose_index(1_000_000_000, 768, 4)
    assert plan.kind == "IVF-PQ"
    assert plan.mapped
    assert plan.memory < 4e9
    assert table["chosen"].sum() == 1
    with pytest.raises(PerceptError, match="need at least 3.1 GB as Flat, and 1 GB are given"):
        choose_index(1_000_000, 768, 1, "Flat")
    with pytest.raises(PerceptError, match="choose auto or one of Flat"):
        choose_index(10, 4, kind="HNSW")


# ----------------------------------------------------------------------------------------- sources
class Encoder:
    """A fixed projection of the pixels, that counts what it is given."""

    def __init__(self, fail_after=10**9):
        self.n_encoded, self.fail_after = 0, fail_after
        self.weights = (
            np.random.default_rng(1).standard_normal((SIZE * SIZE * 3, DIM)).astype(np.float32)
        )

    def __call__(self, pixels):
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (SIZE, SIZE, 3)
        self.n_encoded += len(pixels)
        if self.n_encoded > self.fail_after:
            raise KeyboardInterrupt
        return (pixels.reshape(len(pixels), -1) / 255 - 0.5) @ self.weights


def draw(folder, names, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / name)


def deep_grey():
    """A PNG of 16 bits a pixel."""
    file = io.BytesIO()
    Image.fromarray(np.full((20, 20), 0x4080, np.uint16)).save(file, "png")
    return file.getvalue()


def test_a_folder_of_pictures_with_captions_and_a_broken_one(tmp_path):
    draw(tmp_path / "pictures", ["a/1.png", "a/2.webp", "b/3.JPG", "b/4.png"])
    Image.fromarray(np.full((25, 18), 77, np.uint8)).save(tmp_path / "pictures" / "grey.png")
    assert (decode_image(deep_grey(), SIZE) == 0x40).all()
    (tmp_path / "pictures" / "a" / "1.txt").write_text("one\n")
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    embeddings = embed_images(
        tmp_path / "pictures", tmp_path / "index", Encoder(), {"model": "toy"}, SIZE, part_rows=2
    )
    index = build_index(tmp_path / "index", choose_index(len(embeddings), DIM)[0])
    metadata = index.get_metadata(range(5))
    assert [path.rsplit("/", 1)[1] for path in metadata["image_path"]] == [
        "1.png",
        "2.webp",
        "3.JPG",
        "4.png",
        "grey.png",
    ]
    assert metadata["caption"][0] == "one"
    assert read_json(tmp_path / "index" / "index.json")["unread"] == 1
    assert index.encoder == {"model": "toy"}
    images, ok = load_local_images(index.get_metadata([4, -1, 0]), SIZE)
    assert ok.tolist() == [True, False, True]
    assert (images[0] == 77).all()
    assert (images[1] == 128).all()
    expected = unit(Encoder()(images[2:]))
    np.testing.assert_allclose(expected[0], index.embeddings.get_rows([0])[0], atol=2e-3)


def test_only_what_is_new_is_embedded_and_another_encoder_is_refused(tmp_path):
    draw(tmp_path / "pictures", [f"{i}.png" for i in range(5)])
    embed_images(tmp_path / "pictures", tmp_path / "index", Encoder(), {"model": "toy"}, SIZE)
    draw(tmp_path / "pictures", ["new/9.png", "0_first.png"], seed=1)
    encoder = Encoder()
    assert (
        len(
            embed_images(tmp_path / "pictures", tmp_path / "index", encoder, {"model": "toy"}, SIZE)
        )
        == 7
    )
    assert encoder.n_encoded == 2
    with pytest.raises(PerceptError, match="another encoder, toy and not other"):
        embed_images(tmp_path / "pictures", tmp_path / "index", Encoder(), {"model": "other"}, SIZE)
    with pytest.raises(PerceptError, match="holds no .tar files and no images"):
        find_new_parts(tmp_path / "nothing")


def test_embedding_that_was_interrupted_goes_on_with_the_part(tmp_path):
    draw(tmp_path / "pictures", [f"{i}.png" for i in range(9)])
    with pytest.raises(KeyboardInterrupt):
        embed_images(
            tmp_path / "pictures",
            tmp_path / "index",
            Encoder(fail_after=6),
            {"model": "toy"},
            SIZE,
            part_rows=3,
            batch_size=3,
        )
    encoder = Encoder()
    embeddings = embed_images(
        tmp_path / "pictures",
        tmp_path / "index",
        encoder,
        {"model": "toy"},
        SIZE,
        part_rows=3,
        batch_size=3,
    )
    assert len(embeddings) == 9 and encoder.n_encoded == 3 and len(embeddings.arrays) == 3


def test_a_webdataset_of_the_mini_world(tmp_path):
    tars = write_tars(miniworld.generate_pool(30, n_test=4), tmp_path / "tars", 30, rows=12)
    embeddings = embed_images(
        tars,
        tmp_path / "index",
        lambda pixels: Encoder()(pixels[:, ::2, ::2]),
        {"model": "toy"},
        32,
    )
    index = build_index(tmp_path / "index", choose_index(len(embeddings), DIM)[0])
    samples = list(miniworld.generate_pool(30, n_test=4))
    metadata = index.get_metadata([29, 13, 0])
    assert [samples[i][1] for i in (29, 13, 0)] == metadata["caption"].tolist()
    assert metadata["kind"].tolist() == [samples[i][2]["kind"] for i in (29, 13, 0)]
    images, ok = load_local_images(metadata, 32)
    assert ok.all() and all((images[j] == samples[i][0]).all() for j, i in enumerate((29, 13, 0)))
    # the last of the tars is kept as it is, so that there is nothing new
    write_tars(miniworld.generate_pool(36, n_test=4), tars, 36, rows=12)
    assert len(embed_images(tars, tmp_path / "index", Encoder(), {"model": "toy"}, 32)) == 30


def test_a_tar_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "00007.tar").write_bytes(b"half a download")
    with pytest.raises(PerceptError, match="begins with 00007.tar cannot be read"):
        embed_images(tmp_path, tmp_path / "index", Encoder(), {"model": "toy"}, SIZE)


def test_the_pool_begins_with_the_test_images_and_repeats_none():
    world = miniworld.simulate(1, n_train=20, n_val=4, n_test=6)
    test = world.images[np.isin(world.image_ids, miniworld.FIRST_ID["test"] + np.arange(6))]
    pool_images = [pixels for pixels, _, _ in miniworld.generate_pool(40, n_test=6)]
    np.testing.assert_array_equal(np.stack(pool_images[:6]), test)
    subject_images = {pixels.tobytes() for pixels in world.images}
    assert not any(pixels.tobytes() in subject_images for pixels in pool_images[6:])


def test_an_index_of_clip_retrieval_is_opened_as_it_is(clusters, tmp_path):
    """image.index a file, metadata, no embeddings and nothing of ours."""
    rows, queries = clusters
    folder = store(tmp_path / "theirs", rows)
    (folder / "img_emb").rename(tmp_path / "elsewhere")
    plain = faiss.index_factory(DIM, "IVF64,Flat", faiss.METRIC_INNER_PRODUCT)
    plain.train(rows)
    plain.add(rows)
    plain.nprobe = 64
    faiss.write_index(plain, str(folder / "image.index"))
    index = LocalIndex(folder)
    np.testing.assert_array_equal(
        index.search(queries, 4, [1, 2]).row, exact(rows, queries, 4, [1, 2])[1]
    )
    assert index.get_metadata([17])["url"][0] == "https://x.org/17.jpg"
    assert index.encoder == {}
    assert index.embeddings is None
    with pytest.raises(PerceptError, match="no embeddings"):
        index.measure_recall()
    with pytest.raises(PerceptError, match="holds no image.index"):
        LocalIndex(tmp_path / "elsewhere")


def test_embeddings_and_metadata_that_do_not_belong_together(clusters, tmp_path):
    folder = store(tmp_path / "index", clusters[0][:100])
    with pytest.raises(PerceptError, match="100 images are too few"):
        build_index(folder, choose_index(100, DIM, kind="IVF-PQ")[0])
    pd.DataFrame({"url": ["x"]}).to_parquet(folder / "metadata" / "metadata_1.parquet")
    with pytest.raises(PerceptError, match="differ in their rows from part 1 on"):
        Embeddings(folder)


@pytest.mark.parametrize(
    "name", ["image.index/0001.index", "img_emb/img_emb_1.npy", "metadata/metadata_1.parquet"]
)
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_file_that_is_cut_short_is_named(clusters, tmp_path, name, share):
    folder = store(tmp_path / "index", clusters[0][:2000])
    build_index(folder, choose_index(2000, DIM)[0], shard_rows=1000)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(PerceptError, match=f"{name} cannot be read, as it is cut short"):
        LocalIndex(folder)
    if name.startswith("image.index"):  # as the sentence says
        (folder / name).unlink()
        assert len(build_index(folder, choose_index(2000, DIM)[0], shard_rows=1000)) == 2000


def test_embeddings_of_another_encoder_and_missing_metadata_are_named(clusters, tmp_path):
    folder = store(tmp_path / "index", clusters[0][:90])
    index = build_index(folder, choose_index(90, DIM)[0])
    (folder / "metadata" / "metadata_2.parquet").unlink()
    with pytest.raises(PerceptError, match="differ in their rows from part 2 on"):
        LocalIndex(folder)
    with pytest.raises(PerceptError, match=f"Queries have 16 numbers and the index {DIM}"):
        index.search(np.ones((1, 16)), 1)
    np.save(folder / "img_emb" / "img_emb_2.npy", np.ones((30, 16), np.float16))
    with pytest.raises(PerceptError, match="with one dim"):
        Embeddings(folder)


# -------------------------------------------------------------------------- what must not be found
def test_copies_of_the_test_images_are_found_however_many(clusters, tmp_path):
    rng, rows = np.random.default_rng(3), clusters[0][:2000].copy()
    images = unit(rng.standard_normal((3, DIM)))
    rows[100:130], rows[500], rows[501] = (
        images[0],
        images[1],
        unit(images[1] + 0.04 * rng.standard_normal(DIM)),
    )
    index = build_index(store(tmp_path / "index", rows), choose_index(2000, DIM)[0])
    duplicates = find_near_duplicates(index, images, [7, 8, 9], threshold=0.94)
    assert sorted(duplicates.loc[duplicates.image == 7, "row"]) == list(range(100, 130))
    assert set(duplicates.loc[duplicates.image == 8, "row"]) == {500, 501}
    assert not (duplicates.image == 9).any()
    assert duplicates.loc[duplicates.row == 500, "exact"].item()
    assert not duplicates.loc[duplicates.row == 501, "exact"].item()
    assert not np.isin(index.search(images, 40, duplicates["row"]).row, duplicates["row"]).any()
