# %% [markdown]
# # 03 · Reconstruct with several voters: blurry picture, caption, repainted picture, vote
#
# **Question.** Several models of the brain each say what was seen. Can one choose among them
# without knowing the truth, and is choosing better than averaging?
#
# **Reads** the voters of notebook 02_train_roi_models (or any runs with a low level, named in
# `voters`), and, where there is one, the high level of notebook 01. **Writes** `results/<run>/`:
# `reconstructions.safetensors` (every row, for notebook 06), `captions.parquet`, and a sheet an
# image, `sheets/result_<i>.png`.
#
# Cost: full size about 4 s an image and voter on an A100 (estimated, not run here); mini about
# four minutes on two CPU cores.
#
# Source: the 2023 ROI project (github.com/Koios1143/Machine-Learning-Final): docs/roi_voting.md.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
subj = 1  # subject, at least 1
voters = ""  # names of the voters, separated by commas, by default all of this run
test_repeats = 0  # repeats averaged at test, 0 for all, at least 0
image_from = 0  # number of the first test image, at least 0
image_to = 0  # number of the test image before which it ends, 0 for all, at least 0

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
vd_cache_dir = ""  # where models from the hub are kept, by default the hub's own cache
decoder = "network"  # one of network, ridge, kernel, both, all; both is network and ridge
checkpoint = "best"  # one of last, best; best is chosen on validation images
vote = "published"  # one of published, medoid, agreement; the rule that chooses the reconstruction
tokens_from = ""  # run whose high level predicts CLIP tokens, by default this one, if it has any
strength = 0.75  # of img2img, 0 keeps the blurry images as they are, at least 0, at most 1
caption_guidance = 6.0  # classifier-free guidance towards the caption, at least 0
num_inference_steps = 50  # steps of the image generator's schedule, at least 1
published_pixels = False  # give the captioner pixels from 0 to 255, as published
without_word = "blurry "  # word taken out of captions, as published
token_map_images = 2000  # training images for the map from CLIP's to BLIP's tokens, at least 10
generator_batch = 16  # images generated at a time, at least 1

# optimisation
seed = 42  # of everything random here

# evaluation
sheets = 20  # test images for which a sheet is drawn, 0 for all, at least 0
untrained = False  # also reconstruct with untrained networks, as a baseline

# %%
from src.parameters import configure

run = configure(globals(), "03_vote")
run

# %%
import json
import shutil

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file

# %%
from src.data import (
    Normaliser,
    cache_targets,
    check_trained_on,
    format_identity,
    open_subject,
)
from src.decoding import (
    VOTES,
    PriorSampling,
    SelectionInputs,
    compute_in_chunks,
    find_decoder,
    find_voters,
    load_decoder,
    open_voter,
    oracle,
    predict_latents,
    predict_tokens,
    repaint_images,
)
from src.decoding import vote as choose

# %%
from src.figures import draw_vote_sheet, plot_contact_sheet, save_figure

# %%
from src.models import TokenMap
from src.networks import build_decoder
from src.files.ownership import replace_folder
from src.parameters import list_decoders
from src.metrics import pixcorr
from src.pretrained import (
    Captioner,
    Clipper,
    LatentAutoencoder,
    load_stable_diffusion_pipeline,
    strip_word,
)
from src.retrieval import find_nearest
from src.training import CLOSED_FORMS
from src.utils import HOME, PerceptError, atomic, read_json, seed_everything, write_json

# %% [markdown]
# ## Data: the test images, which no voter saw
# Repeats are averaged. Which voxels a voter is given comes from its own folder, and is checked
# against the regions that its checkpoint names.

# %%
subject = open_subject(dataset, subj)
folders, which = find_voters(run.logs, voters), slice(image_from, image_to or None)
image_ids = subject.image_ids("test")[which]
if not len(image_ids):
    raise PerceptError(
        f"image_from {image_from} and image_to {image_to} leave none of the"
        f" {len(subject.image_ids('test'))} test images: choose places among them."
    )
seen = torch.from_numpy(subject.images(image_ids)).permute(0, 3, 1, 2).float() / 255
files = {name: f"low_level_{name}.safetensors" for name in CLOSED_FORMS}
files["network"] = f"low_level/{checkpoint}.safetensors"
main, *baselines = list_decoders(decoder)
opened = {
    name: open_voter(folder, subject, files[main], run.device) for name, folder in folders.items()
}
made_by = {json.dumps(config.get("autoencoder", {})) for _, config, _ in opened.values()}
if len(made_by) > 1:
    raise PerceptError(
        f"The voters predict latents of different autoencoders {sorted(made_by)}: let those of one"
        " kind vote."
    )
autoencoder = LatentAutoencoder(weights, device=run.device, **json.loads(made_by.pop()))
shape, names = autoencoder.latent_shape, list(folders)


# %%
def measured(normaliser):
    """Voxels (images, voxels) of the test images as a model was trained on them, averaged."""
    return subject.get_mean_betas("test", repeats=test_repeats or None, normaliser=normaliser)[0][
        which
    ]


def read(decoder_of, normaliser):
    """Latents (images, channels, h, w) that a decoder predicts."""
    return predict_latents(decoder_of, measured(normaliser), shape, device=run.device)


latents = {
    f"voter_{name}": read(model, normaliser) for name, (model, _, normaliser) in opened.items()
}
latents["latent_mean"] = torch.stack(list(latents.values())).mean(0)
for baseline in baselines:
    baseline_voters = [
        open_voter(path, subject, files[baseline], run.device) for path in folders.values()
    ]
    predictions = [read(model, normaliser) for model, _, normaliser in baseline_voters]
    latents[baseline] = torch.stack(predictions).mean(0)

# %%
if untrained:
    seed_everything(seed)
    fresh = [
        build_decoder(config["model"]).to(run.device).eval() for _, config, _ in opened.values()
    ]
    latents["untrained"] = torch.stack(
        [read(model, n) for model, (_, _, n) in zip(fresh, opened.values(), strict=True)]
    ).mean(0)
latents["ceiling"] = autoencoder.encode(seen).cpu()
print(
    f"(test images, channels, height, width) = {tuple(latents['ceiling'].shape)}   voters"
    f" {', '.join(names)}   rows {', '.join(latents)}"
)

# %%
# The prepared validation images, which no voter saw either, say which voter is the best one.
train_tokens = cache_targets(
    dataset,
    "vae_latents",
    autoencoder.fingerprint(),
    subject.all_images,
    autoencoder.encode_pixels,
    shape,
)
of_val = torch.from_numpy(train_tokens.rows(subject.image_ids("val")).astype(np.float32))
off = {
    name: (
        (
            predict_latents(
                m, subject.get_mean_betas("val", normaliser=n)[0], shape, device=run.device
            )
            - of_val
        )
        .abs()
        .mean()
        .item()
    )
    for name, (m, _, n) in opened.items()
}

# %%
pd.DataFrame(
    [
        {
            "voter": name,
            "rois": config["training"].get("rois", ""),
            "voxels": n.n_features,
            "bag seed": config["training"].get("bag_seed", ""),
            "error of validation latents": off[name],
            "error of test latents": (
                (latents[f"voter_{name}"] - latents["ceiling"]).abs().mean().item()
            ),
        }
        for name, (_, config, n) in opened.items()
    ]
).round(4)

# %%
low_level = {
    name: torch.cat([autoencoder.decode(part).cpu() for part in x.split(64)])
    for name, x in latents.items()
}

# %% [markdown]
# ## What the brain says in tokens
# Where a high level was trained, it predicts CLIP tokens. They serve one rule of the vote, and,
# mapped to the tokens of the captioner, a caption that owes nothing to a blurry picture.

# %%
logs, config = (HOME / "train_logs" / tokens_from if tokens_from else run.logs), None
path = next(
    (
        p
        for p in (
            find_decoder(logs, "high_level", "last"),
            *(logs / f"high_level_{name}.safetensors" for name in CLOSED_FORMS),
        )
        if p.exists()
    ),
    None,
)
if path is None and (tokens_from or vote == "agreement"):
    raise PerceptError(
        f"There is no high level in {logs}: run notebook 01 for it, name another run in"
        " tokens_from, or choose the vote published or medoid."
    )
check_trained_on(logs, subject.key, subject.identity)
run.record_parameters()

# %%
if path is not None:
    model, config = load_decoder(path, run.device)
    normaliser = Normaliser.for_checkpoint(path)
    token_shape = tuple(config["tokens"])
    tokens, projected = predict_tokens(
        model,
        measured(normaliser),
        token_shape,
        PriorSampling(use_prior=False),
        device=run.device,
    )
    hidden = token_shape[0] > 1
    clip_config = {"variant": "ViT-L/14", "hidden": hidden, "norm_embs": hidden} | config.get(
        "clip", {}
    )
    print(f"(images, tokens, dim) = {tuple(projected.shape)} from {path.relative_to(HOME)}")

# %% [markdown]
# ## Captions
# The captioner says what it sees in a blurry picture, without being asked anything.

# %%
rows, unfinished = {}, run.results / ".reconstructing"
stamps = [
    (
        str(folder),
        [(folder / file).stat().st_mtime_ns for file in files.values() if (folder / file).exists()],
    )
    for folder in folders.values()
]
mark = [
    {k: v for k, v in run.parameters.items() if k not in ("vote", "sheets")},
    stamps,
    subject.identity,
    str(path and path.stat().st_mtime_ns),
]
captioner = None
if strength > 0:
    captioner = Captioner(weights, device=run.device)


# %%
def read_or_write(name, say):
    """Captions by `say`, kept until the notebook is done, so that an interrupted run goes on."""
    file = unfinished / f"captions_{name}.json"
    if not file.exists() or read_json(file)["mark"] != json.loads(json.dumps(mark)):
        write_json(file, {"mark": mark, "captions": strip_word(say(), without_word)})
    return read_json(file)["captions"]


# %%
captions = {}
if captioner:
    captions = {
        name: read_or_write(
            name, lambda x=x: captioner.caption(x, published_pixels=published_pixels)
        )
        for name, x in low_level.items()
    }


# %% [markdown]
# Straight from the brain: one linear map a place takes CLIP's tokens to the captioner's, fitted on
# training images alone, without any brain.

# %%
def cache_tokens(name, encoder, ids):
    """Tokens of some images by one encoder, computed once."""
    return cache_targets(
        dataset, name, encoder.fingerprint(), ids, encoder.encode_pixels, encoder.target_shape
    )


# %%
if captioner and path is not None and hidden:
    clipper = Clipper(weights, device=run.device, **clip_config)
    train_ids = subject.image_ids("train")[:token_map_images]
    clip_tokens = cache_tokens("clip_tokens", clipper, train_ids)
    captioner_tokens = cache_tokens("blip_tokens", captioner, train_ids)
    token_map = TokenMap.fit(clip_tokens, captioner_tokens, train_ids)
    captions["brain_caption"] = read_or_write(
        "brain_caption", lambda: captioner.caption_tokens(token_map(tokens[:, 0].float()))
    )
    latents["brain_caption"] = latents["latent_mean"]
    low_level["brain_caption"] = low_level["latent_mean"]

# %%
labels = None
if subject.labels is not None:
    labels = subject.labels.set_index("image").loc[image_ids]
label_columns = [
    column for column in ("kind", "colour", "scene") if labels is not None and column in labels
]
caption_table = pd.DataFrame(captions, index=image_ids)
if label_columns and len(caption_table.columns):
    right = {
        name: [
            np.mean(
                [w in sentence.split() for w, sentence in zip(labels[q], sentences, strict=True)]
            )
            for q in label_columns
        ]
        for name, sentences in captions.items()
    }
    print("share of captions that name what is shown:")
    print(pd.DataFrame(right, index=label_columns).T.round(3).to_string())
if subject.captions is not None and len(caption_table.columns):
    caption_table.insert(
        0,
        "a person",
        subject.captions.groupby("image")["caption"].first().reindex(image_ids).fillna(""),
    )

# %%
caption_table.head(12)

# %% [markdown]
# ## The step
# Blurry picture and caption -> Stable Diffusion's image-to-image pipeline, its noise drawn for
# each image from (seed, image), so that all voters begin with the same noise.

# %%
pipeline = None
if captioner:
    dtype = torch.float16 if run.device.startswith("cuda") else torch.float32
    pipeline = load_stable_diffusion_pipeline(weights, device=run.device, dtype=dtype)
if pipeline:
    pipeline.set_progress_bar_config(disable=True)
    print(f"{int(num_inference_steps * strength)} of {num_inference_steps} steps are run")


# %%
def repaint(name, part):
    """What the generator makes of one row's blurry pictures of some images."""
    if not pipeline:
        return {name: low_level[name][part].half()}
    options = {
        "strength": strength,
        "guidance_scale": caption_guidance,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
    }
    repainted = repaint_images(
        pipeline,
        captions[name][part],
        low_level[name][part],
        image_ids[part],
        batch_size=generator_batch,
        **options,
    )
    return {name: repainted.half()}


# %%
for name in latents:
    rows |= compute_in_chunks(
        lambda part, name=name: repaint(name, part),
        len(seen),
        generator_batch * 4,
        unfinished,
        [name, mark, captions.get(name)],
    )


# %% [markdown]
# ## The vote
# - **published**: the candidate most like its own blurry picture. It favours candidates that the
#   generator has hardly changed.
# - **medoid**: the candidate most like the other candidates.
# - **agreement**: the candidate nearest to the tokens that the brain predicts.
# - **oracle**, no rule: the candidate most like the image that was shown. It bounds what choosing
#   can give.

# %%
def embedded(clip, pictures):
    """Pictures of each voter (voters, images, 3, height, width) -> embeddings (images, voters,
    features).
    """
    return torch.stack(
        [
            torch.cat([clip.embed_image(part.float()).flatten(1).cpu() for part in x.split(64)])
            for x in pictures
        ],
        1,
    )


candidates = torch.stack(
    [rows[f"voter_{name}"] for name in names], 1
)  # (images, voters, 3, height, width)
clip = Clipper(weights, hidden=False, norm_embs=True, device=run.device)
looks = {
    "candidates": embedded(clip, candidates.unbind(1)),
    "low_level": embedded(clip, [low_level[f"voter_{name}"] for name in names]),
}

# %%
if path is not None:
    looks |= {
        "tokens": embedded(
            Clipper(weights, device=run.device, **clip_config), candidates.unbind(1)
        ),
        "brain": projected.flatten(1).float(),
    }
ballot = SelectionInputs(**looks)
choices = {
    f"vote_{rule}": choose(rule, ballot)
    for rule in VOTES
    if rule != "agreement" or path is not None
}
choices["oracle"] = oracle(ballot.candidates, embedded(clip, [seen])[:, 0])
every = torch.arange(len(seen))
rows |= {name: candidates[every, index].contiguous() for name, index in choices.items()}
main_row, blurry = f"vote_{vote}", torch.stack([low_level[f"voter_{name}"] for name in names], 1)
rows[f"low_level_{main_row}"] = blurry[every, choices[main_row]].half()
rows["low_level_mean"] = low_level["latent_mean"].half()

# %%
pd.DataFrame(
    {
        name: [(index == k).float().mean().item() for k in range(len(names))]
        for name, index in choices.items()
    },
    index=names,
).T.round(3)

# %% [markdown]
# Above: how often each rule chooses each voter. Floors: the mean image, and the training image
# whose latent is nearest to the mean of the predicted ones.

# %%
train_ids = subject.image_ids("train")
of_train = train_tokens.rows(train_ids).reshape(len(train_ids), -1)
nearest_rows = find_nearest(latents["latent_mean"].flatten(1), of_train, k=1)[1][:, 0]
rows["nearest_train"] = (
    torch.from_numpy(subject.images(train_ids[np.asarray(nearest_rows)]))
    .permute(0, 3, 1, 2)
    .float()
    / 255
).half()
rows["mean_image"] = (
    (torch.from_numpy(subject.mean_image("train")).permute(2, 0, 1) / 255)
    .half()
    .expand(len(seen), -1, -1, -1)
    .contiguous()
)

# %%
selection = [
    {
        "what": f"one of {len(names)} voters an image",
        "chosen": f"by the rule '{vote}'",
        "split": "none: no true image is used",
    }
]
epoch = "none: the last epoch is taken"
if checkpoint == "best":
    epoch = "training images outside its bag"
selection += [{"what": "epoch of each voter", "chosen": checkpoint, "split": epoch}]
is_whole_test_set = len(seen) == len(subject.image_ids("test"))
about = {
    "main": main_row,
    "repeats": str(test_repeats or max(len(t) for t in subject.rows_by_image("test"))),
    "protocol": subject.protocol,
}
about |= {
    "test_set": (
        subject.test_set
        if is_whole_test_set
        else f"{subject.test_set}-{image_from}to{image_from + len(seen)}"
    ),
    "choices": json.dumps(selection),
}

# %%
about |= {
    "voters": ",".join(f"voter_{name}" for name in names),
    "best_voter": f"voter_{min(off, key=off.get)}",
    "data": format_identity(subject.identity),
}
tensors = {"seen": seen.half(), **rows, "image_ids": torch.from_numpy(image_ids.astype(np.int64))}
with atomic(run.results / "reconstructions.safetensors") as file:
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata=about)
caption_rows = [
    (image, name, sentence)
    for name, sentences in captions.items()
    for image, sentence in zip(image_ids, sentences, strict=True)
]
with atomic(run.results / "captions.parquet") as file:
    pd.DataFrame(caption_rows, columns=["image", "row", "caption"]).to_parquet(file)
shutil.rmtree(unfinished, ignore_errors=True)

# %% [markdown]
# ## The sheets
# For each image: what was seen, what was chosen, and the candidates in the order of the voters.

# %%
folder = run.results / "sheets"
tile = 128
if seen.shape[-1] > 64:
    tile = 512
with replace_folder(folder) as new_folder:
    for i in range(len(seen) if sheets == 0 else min(sheets, len(seen))):
        sheet = Image.fromarray(draw_vote_sheet(seen[i], rows[main_row][i], candidates[i], tile))
        sheet.save(new_folder / f"result_{image_from + i}.png")
sheet

# %%
columns = {
    "seen": seen,
    "latent mean": low_level["latent_mean"],
    "chosen": rows[main_row],
    "mean repainted": rows["latent_mean"],
}
columns |= {"caption from tokens": rows["brain_caption"]} if "brain_caption" in rows else {}
save_figure(
    plot_contact_sheet(
        columns | {"nearest training": rows["nearest_train"], "ceiling": rows["ceiling"]}, n=24
    ),
    run.results / "contact_sheet.png",
)

# %% [markdown]
# ## What we saw

# %%
correlations = {
    title: pixcorr(seen, images).mean()
    for title, images in {
        "the vote": rows[main_row],
        "the mean of the latents": low_level["latent_mean"],
        "the nearest training image": rows["nearest_train"],
    }.items()
}
print(f"Correlation of pixels with the {len(seen)} images that were seen:")
for title, correlation in correlations.items():
    print(f"- {title}: {correlation:.3f}")

# %% [markdown]
# A repainted picture is sharper than a blurry one, not truer: where the caption names the wrong
# object, the generator paints the wrong object well. Whether choosing among voters is worth more
# than the average voter, or than averaging their latents, is told by notebook 06, which scores
# every row.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py roi_voting --mini`:
# - another rule of choice: `python run.py roi_voting --mini --from 03 --to 03 -p vote medoid`;
# - without repainting: the same with `-p strength 0.0`.
