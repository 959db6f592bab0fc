# %% [markdown]
# # 05 · Search a large index: what would the brain find among a million pictures?
#
# **Question.** Which pictures of a large pool are nearest to what the brain says, how much do they
# resemble the picture that was seen, and would the seen picture itself be found among them?
#
# **Reads** `results/<run>/reconstructions.safetensors` of a run with one embedding an image
# (recipe `mindeye_retrieval`) and an index: a folder under `data/indices/`, made here from a
# folder of pictures, a webdataset or stored embeddings, or a clip-retrieval server. **Writes** the
# index; into `results/<run>/`: `found.parquet`, the rows `retrieved` and `retrieved_ceiling` of
# `reconstructions.safetensors`, its part of `metrics.json`, figures, and the published
# `<run>_laion_retrievals_top16.pt` and `all_images.pt`.
#
# Test pictures that the pool holds, and pictures nearly the same, are left out of every search
# unless `keep_test_images` is set.
#
# Cost: embedding 1,500 pictures a second on a consumer GPU (clip-retrieval's figure, not run
# here); searching a million rows a few seconds for all test images; mini about a minute on two CPU
# cores. Up to 5.5 billion pictures: docs/large_index.md.
#
# Source: MindEye, arXiv 2305.18274, section 3.2 and appendix A.7, which searched LAION-5B while
# its public server was up.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
subj = 1  # subject, at least 1
index = "data/indices/pool"  # folder of the index; what is missing is made here
pool = ""  # images for the index, a folder of images or of tar files, or mini
pool_images = 10000  # of the mini world's pool, at least 1
url = ""  # a clip-retrieval server to ask instead, e.g. http://localhost:1234/knn-service
qdrant = ""  # address of a Qdrant server, or folder of its engine, to search instead of an index
indice_name = "laion5B-L-14"  # which of the server's indices, or of Qdrant's collections
server_timeout = 5.0  # seconds that the server may take for an answer, more than 0
server_failure = "stop"  # one of stop, published; published goes on without the server
deduplicate = True  # the server leaves out images that it has twice
use_safety_model = True  # the server leaves out what its safety model finds unsafe
use_violence_detector = True  # the server leaves out what its detector finds violent
index_kind = "auto"  # one of auto, Flat, SQfp16, SQ8, IVF-PQ; auto: the most exact in memory_gb
memory_gb = 4.0  # memory for the index, in GB, more than 0
mapped = False  # leave the index on disk while searching
shard_rows = 1000000  # rows a shard of the index, at least 1
jobs = 1  # processes that build shards side by side, at least 1
keep_test_images = False  # search the test images of the pool, too
near_duplicate = 0.94  # cosine from which a pool image counts as a test image, at most 1
picture_size = 512  # side of the images that are stored, in pixels, at least 8
picture_timeout = 5.0  # seconds that an image may take to come, more than 0
private_pictures = False  # also fetch images from addresses that are not public

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
checkpoint = "last"  # one of last, best; best is chosen on validation images
token_run = ""  # run whose tokens choose among the k images, by default the nearest one is taken
selection = "tokens"  # one of tokens, brain; brain: what makes the measured voxels most likely
encoder_name = ""  # run of the encoding model that selection brain asks, by default this one

# optimisation
seed = 42  # of everything random here

# evaluation
k = 16  # images to find for each test image, at least 1
candidates = 300  # results to go through until k images could be fetched, at least 1

# %%
from src.parameters import configure

run = configure(globals(), "05_search_index")
run

# %%
import json
import shutil

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from src import miniworld
from src.data import cache_targets, check_made_from, open_training_split
from src.decoding import (
    compute_in_chunks,
    find_decoder,
    load_encoder,
    load_reconstructions,
    read_decoder_config,
    select_best,
)
from src.encoding import open_brain_agreement
from src.evaluation import add_results, derangements, make_record, provenance
from src.figures import plot_contact_sheet, save_figure
from src.metrics import resize
from src.pretrained import Clipper
from src.retrieval import load_run_embeddings

# %%
from src.search import (
    Embeddings,
    LocalIndex,
    build_index,
    choose_index,
    embed_images,
    needs_building,
)

# %%
from src.search import (
    FetchOptions,
    ImageCache,
    QdrantIndex,
    RemoteIndex,
    RequestOptions,
    check_neighbours,
    check_pictures,
    decode_sent_images,
    describe_encoder,
    fetch_images,
    find_near_duplicates,
    find_picture_source,
    iterate_parts,
    load_local_images,
    make_storable,
    select_available_images,
    write_tars,
)
from src.utils import HOME, PerceptError, atomic, resolve

# %% [markdown]
# ## What the brain says
# One embedding an image, predicted by the 1 x 768 model: the very vector that CLIP gives a
# picture, so that pictures can be looked up by it.

# %%
subject = open_training_split(dataset, subj, run.logs)
tensors, metadata = load_reconstructions(run.results)
check_made_from(metadata, subject.identity, run.name)
main, image_ids, seen = metadata["main"], tensors["image_ids"].numpy(), tensors["seen"].float()
encoder = load_encoder(
    read_decoder_config(find_decoder(run.logs, "high_level", checkpoint)), weights, run.device
)
brain = tensors[f"projected_{main}"].float()
if not isinstance(encoder, Clipper) or encoder.hidden:
    raise PerceptError(
        f"{run.name} predicts {tuple(brain.shape[1:])} tokens an image, and an index is searched by"
        " one embedding: train the recipe mindeye_retrieval."
    )
brain, true = brain.flatten(1).numpy(), tensors["true_tokens"].float().flatten(1).numpy()
print(f"(test images, dim) = {brain.shape} of {encoder.fingerprint()['model']}")

# %% [markdown]
# ## The index
# Exact as long as it fits into the memory given, compressed beyond; whatever it is, the pictures
# that it finds are ordered by their true cosine. Only what is new in the pool is embedded, and
# only the shards that grew are made again. An `image.index` that somebody else built is searched as
# it is, and left as it is; with an `index_kind` other than `auto`, ours is built beside it.

# %%
made_by = {
    name: value
    for name, value in encoder.fingerprint().items()
    if name in ("model", "revision", "variant")
}
folder, source = resolve(index), resolve(pool)
if pool == "mini":
    source = write_tars(
        miniworld.generate_pool(pool_images),
        HOME / "data" / "mini" / f"pool_{pool_images}",
        pool_images,
    )
if pool:
    embed_images(source, folder, encoder.encode_pixels, made_by, encoder.size)
builds = not url and not qdrant and needs_building(folder, index_kind)
if builds:
    stored = Embeddings(folder)
    plan, table = choose_index(len(stored), stored.dim, memory_gb, index_kind, mapped)
    print(
        f"{len(stored):,} embeddings of {stored.dim} numbers in"
        f" {folder}\n\n{table.to_string(index=False, float_format=lambda x: f'{x:.3g}')}"
    )

# %%
if url:
    options = RequestOptions(candidates, deduplicate, use_safety_model, use_violence_detector)
    searched = RemoteIndex(
        url, indice_name, options=options, timeout=server_timeout, on_failure=server_failure
    )
elif qdrant:
    searched = QdrantIndex(qdrant if "://" in qdrant else resolve(qdrant), indice_name)
    if (folder / "img_emb").is_dir():
        searched.fill(iterate_parts(folder))
else:
    if builds:
        build_index(folder, plan, shard_rows, jobs, seed)
    searched = LocalIndex(folder, run.device)
encoder_known = describe_encoder(searched, made_by)
print(f"{searched}\nencoder of the index: {encoder_known}")

# %% [markdown]
# ## Test pictures in the pool
# A pool that holds COCO holds what NSD showed. Such pictures, and near copies of them, are found
# by their embeddings: of the whole test set, also where only the first images of it were
# reconstructed.

# %%
test_ids = subject.image_ids("test")
true_embeddings = cache_targets(
    dataset,
    "clip_tokens",
    encoder.fingerprint(),
    subject.all_images,
    encoder.encode_pixels,
    encoder.target_shape,
)
twins = find_near_duplicates(
    searched, true_embeddings.rows(test_ids).reshape(len(test_ids), -1), test_ids, near_duplicate
)
barred = np.empty(0, int) if keep_test_images else twins["row"].unique()
exact = np.isin(test_ids, twins.loc[twins["exact"], "image"])
in_pool = (
    "yes"
    if keep_test_images and exact.all()
    else f"of {exact.sum()} of {len(exact)}"
    if keep_test_images and exact.any()
    else "no"
)
size = "an unknown number of"
if not url:
    size = f"{len(searched) - len(barred):,}"

# %%
print(
    f"In the pool are {exact.sum()} of {len(exact)} test pictures; {twins['row'].nunique()} of its"
    f" pictures have a cosine of {near_duplicate} or more with one."
)
print(f"{len(barred)} are left out, {size} pictures are searched. Exact image in pool: {in_pool}.")

# %% [markdown]
# ## The search
# By what the brain says, and by the true embedding of what was seen: the nearest picture that
# there is, which no brain can beat.

# %%
picture_source = ""
if not url:
    check_neighbours(searched, barred, k)
    picture_source = find_picture_source(searched)
wide = k if picture_source == "local" else max(k, candidates)
results_by_query = {
    "retrieved": searched.search(brain, wide, barred),
    "retrieved_ceiling": searched.search(true, wide, barred),
}
if url:
    picture_source = find_picture_source(searched, results_by_query["retrieved"].row)
pd.DataFrame(
    {name: neighbours.similarity[:, :k].mean(0) for name, neighbours in results_by_query.items()},
    index=[f"cosine of number {i + 1}" for i in range(k)],
).T.round(3)

# %% [markdown]
# ## Would the seen picture be found?
# Were it in the pool, it would come after those that are more similar to what the brain says:
# top-1 and top-`k` among so many pictures. A tie is lost.

# %%
clean = (
    results_by_query["retrieved"]
    if not keep_test_images
    else searched.search(brain, k, twins["row"].unique())
)
unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (brain, true)]


def reached(order, places):
    """Whether the seen picture would be among the first places, each brain being asked for the
    picture of `order`.
    """
    true_similarity = (unit[0] * unit[1][order]).sum(1)
    return (clean.similarity[:, places - 1] < true_similarity).astype(float)


n_candidates = 0
if not url:
    n_candidates = len(searched) - twins["row"].nunique() + 1
n_others = (
    f"{n_candidates - 1:,}" if n_candidates else size
)  # without any test picture, whether or not they were searched above
hits = {places: reached(np.arange(len(brain)), places) for places in sorted({1, k})}

# %%
records = [
    make_record(
        f"pool_top{places}",
        values,
        baselines={
            "shuffled": np.stack([reached(o, places) for o in derangements(len(brain), 3, seed)], 1)
        },
        upper_bound="the seen picture is put into the pool, so 1",
        better="higher",
        protocol=metadata["protocol"],
        test_set=metadata["test_set"],
        chance=places / n_candidates if n_candidates else 0.0,
        description=(
            f"the seen picture, put into a pool of {n_others} others, is among the {places} nearest"
            " to what the brain says"
        ),
        source="docs/large_index.md",
        exact_in_pool="yes",
    )
    for places, values in hits.items()
]
pd.DataFrame(records)[["name", "value", "low", "high", "n", "chance", "exact_in_pool"]]

# %% [markdown]
# ## The pictures
# Those that can be had, in the order of the search. A test image without any stops the notebook:
# nothing is scored in its place. With `token_run` all the tokens of another run
# choose one of the `k`, as the paper's second-order selection does; with `selection` brain it is
# the likelihood of the measured voxels, as an encoding model sees it; otherwise the nearest one
# is taken. What was seen plays no part.

# %%
cache = ImageCache(HOME / "data" / "pictures")
fetch_options = FetchOptions(picture_size, picture_timeout, allow_private=private_pictures)
usable = {}
for name, neighbours in results_by_query.items():
    rows = usable[name] = neighbours.row[:, :k]
    if picture_source == "url":
        at = select_available_images(
            searched.get_metadata(neighbours.row.ravel())["url"]
            .to_numpy()
            .reshape(neighbours.row.shape),
            k,
            cache,
            fetch_options,
        )
        usable[name] = np.where(at < 0, -1, np.take_along_axis(neighbours.row, at.clip(0), 1))
tokens, chooser = None, None

# %%
if token_run and selection == "brain":
    raise PerceptError(
        f"token_run is {token_run}, but selection brain chooses: leave one of them at its default."
    )
if token_run:
    tokens = load_run_embeddings(HOME / "results" / token_run, image_ids)[0].float()
    chooser = load_encoder(
        read_decoder_config(
            find_decoder(HOME / "train_logs" / token_run, "high_level", checkpoint)
        ),
        weights,
        run.device,
    )
agreement = None
if selection == "brain":
    encoder_logs = HOME / "train_logs" / encoder_name if encoder_name else run.logs
    agreement = open_brain_agreement(encoder_logs, subject, weights, run.device)
    test_ids = subject.image_ids("test")
    measured = agreement.measure(subject, "test", int(metadata["repeats"]))
    measured = measured[np.searchsorted(test_ids, image_ids)]


# %%
def pictures(rows):
    """Pictures (images, k, 3, height, width) of rows (images, k), and whether there is one; where
    there is none another one of that image stands.
    """
    lines = searched.get_metadata(rows.ravel())
    if picture_source == "url":
        urls = lines["url"].tolist() if "url" in lines else [None] * len(lines)
        fetched = fetch_images(urls, cache, fetch_options)
        candidate_images, ok = fetched.images, fetched.ok
    else:
        read = load_local_images if picture_source == "local" else decode_sent_images
        pixels, ok = read(lines, picture_size)
        candidate_images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    candidate_images, ok = candidate_images.unflatten(0, rows.shape), ok.reshape(rows.shape)
    first = np.where(ok, np.arange(rows.shape[1]), ok.argmax(1)[:, None])
    return candidate_images[torch.arange(len(rows))[:, None], torch.from_numpy(first)], ok


# %%
def chosen(name, part):
    """One picture of each image, its place among the k, and whether there is any."""
    candidate_images, ok = pictures(usable[name][part])
    at = torch.from_numpy(ok.argmax(1))
    if chooser is not None and name == "retrieved":
        at = select_best(chooser, tokens[part], candidate_images)[1]
    if agreement is not None and name == "retrieved":
        at = agreement.select_best(measured[part], candidate_images)[1]
    picked = candidate_images[torch.arange(len(candidate_images)), at]
    return {name: picked.half(), f"{name}_place": at, f"{name}_ok": torch.from_numpy(ok.any(1))}


# %%
run.record_parameters()
unfinished = run.results / ".searching"
rows = {}
for name in results_by_query:
    lines = searched.get_metadata(usable[name].ravel()).filter(["url", "image_path", "tar_offset"])
    mark = [name, run.parameters, usable[name].tolist(), lines.astype(str).to_numpy().tolist()]
    rows |= compute_in_chunks(
        lambda part, name=name: chosen(name, part), len(brain), 32, unfinished, mark
    )
places, had = (
    {name: rows.pop(f"{name}_place").numpy() for name in results_by_query},
    {name: rows.pop(f"{name}_ok").numpy() for name in results_by_query},
)
lost = {name: int((~ok).sum()) for name, ok in had.items()}
print(f"without a picture: {lost} of {len(brain)} test images")
if any(lost.values()):
    shutil.rmtree(unfinished, ignore_errors=True)
for name, available in had.items():
    check_pictures(available, image_ids, name)

# %% [markdown]
# ## Into the run's reconstructions
# What notebook 03 stored stays as it is; the retrieved pictures join it, and notebook 06 scores
# them as it scores any decoder. `retrieved_ceiling` is the picture nearest to the true embedding.

# %%
about = {"pool": str(searched), "pictures": size, "exact image in pool": in_pool}
about |= {"encoder of the index": encoder_known}
about |= {
    "test pictures left out": int(exact.sum()) * (not keep_test_images),
    "pictures left out, near copies included": len(barred),
}
about |= {"without a picture": lost["retrieved"]}
about |= {"chosen by": f"the tokens of {token_run}, of {k}" if token_run else "the nearest"}
if agreement is not None:
    name = encoder_name or run.name
    about |= {"chosen by": f"the likelihood of the encoding model of {name}, of {k}"}
with atomic(run.results / "reconstructions.safetensors") as path:
    save_file(
        {key: value.contiguous() for key, value in (tensors | rows).items()},
        path,
        metadata=metadata | {"retrieved": json.dumps(about)},
    )
shutil.rmtree(unfinished, ignore_errors=True)
with atomic(run.results / f"{run.name}_laion_retrievals_top16.pt") as path:
    torch.save(rows["retrieved"].float(), path)
tables = []

# %%
for name, neighbours in results_by_query.items():
    order = [
        [list(neighbours.row[q]).index(row) if row >= 0 else -1 for row in usable[name][q]]
        for q in range(len(brain))
    ]
    similarity = np.take_along_axis(neighbours.similarity, np.array(order).clip(0), 1)
    part = pd.DataFrame(
        {
            "search": name,
            "image": np.repeat(image_ids, k),
            "place": np.tile(np.arange(k), len(brain)),
            "row": usable[name].ravel(),
        }
    )
    part = part.assign(
        similarity=similarity.ravel(), chosen=part["place"] == np.repeat(places[name], k)
    )
    lines = searched.get_metadata(part["row"]).filter(["url", "image_path", "caption"])
    tables.append(pd.concat([part, lines], axis=1))
with atomic(run.results / "found.parquet") as path:
    lines = pd.concat(tables, ignore_index=True).query("row >= 0")
    make_storable(lines).to_parquet(path, index=False)

# %%
pd.Series(about)

# %%
scores = [
    pd.DataFrame(
        {"metric": f"pool_top{places}", "row": "system", "image": image_ids, "value": values}
    )
    for places, values in hits.items()
]
lines = [
    {
        "score": r["description"],
        "value": r["value"],
        "low": r["low"],
        "high": r["high"],
        "chance": r["chance"],
        "exact image in pool": "yes",
    }
    for r in records
]
note = (
    f"{searched}. {exact.sum()} test pictures that were in the pool, and near copies"
    f" ({twins['row'].nunique()} rows in all), took no part; the seen picture is put in."
)
result_tables = [
    {"title": "Search of a large index", "note": note, "rows": lines},
    {"title": "Retrieved pictures", "note": "What is scored as retrieved.", "rows": [about]},
]

# %%
origin = {"subject": subj, "dataset": dataset, "data": subject.identity}
what = provenance(run.recipe or run.name, {"all": seed}, [], **origin)
add_results(
    run.results, run.stage, pd.concat(scores, ignore_index=True), records, what, result_tables
)

# %% [markdown]
# ## The sheet
# The first test images in their own order; nothing is selected.

# %%
candidate_images = pictures(usable["retrieved"][:12, : min(4, k)])[0]
side = max(seen.shape[-1], min(picture_size, 128))
columns = {"seen": resize(seen[:12], side)} | {
    f"number {i + 1}": resize(candidate_images[:, i], side)
    for i in range(candidate_images.shape[1])
}
if token_run or agreement is not None:
    columns |= {"chosen": resize(rows["retrieved"][:12].float(), side)}
columns |= {"nearest there is": resize(rows["retrieved_ceiling"][:12].float(), side)}
save_figure(plot_contact_sheet(columns, n=12), run.results / "figures" / "found.png")

# %% [markdown]
# ## What we saw

# %%
for record in records:
    print(f"{record['description']}: {record['value']:.3f}", end=" ")
    print(f"[{record['low']:.3f}, {record['high']:.3f}], chance {record['chance']:.4f}")

# %% [markdown]
# Does the nearest picture share the scene, or the object, of the seen one? Where "nearest there
# is" does not resemble it either, the pool is too small, and not the brain at fault. A score of
# retrieved pictures says nothing without the pool it came from: more pictures are nearer, whatever
# the brain.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py mindeye_retrieval --mini`:
# - a small pool, in which less can be like the seen image: `python run.py mindeye_retrieval
#   --mini --from 05 --to 05 -p pool_images 400`.
#
# Next: notebook 06 scores the retrieved pictures; notebook 03 can begin its pictures at them
# (`start_run`).
