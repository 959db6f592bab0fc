# %% [markdown]
# # 04 · Refine and caption: what the brain says in words, and what the words add to the picture
#
# **Question.** Can a sentence be read from the brain's tokens without passing through a picture,
# and does a generator that is told this sentence make the reconstruction truer, or only cleaner?
#
# **Reads** `results/<run>/reconstructions.safetensors` (notebook 03: tokens and pictures) and the
# images of `data/<dataset>/`. **Writes** `train_logs/<run>/caption_converter/`; into
# `results/<run>/`: `captions_brain.parquet`, the rows `refined` and `refined_ceiling` of
# `reconstructions.safetensors`, a sheet of pictures with their captions, and the published files
# `<run>_all_recons.pt`, `_all_blurryrecons.pt`, `_all_enhancedrecons.pt`, `_all_predcaptions.pt`,
# `_all_clipvoxels.pt`, `_all_backbones.pt` and `_all_prior_out.pt`, as far as the run has what
# they hold.
#
# Cost: full size about 2 s an image for captions on a CPU and 4 s for refining on an A100
# (estimated, not run here); mini about three minutes on two CPU cores.
#
# Source: MindEye2, arXiv 2403.11207, sections 2.4 and 2.5; Wang et al. 2022 (GIT), arXiv
# 2205.14100; Meng et al. 2022 (SDEdit), arXiv 2108.01073.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
subj = 1  # subject, at least 1

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
checkpoint = "last"  # one of last, best; best is chosen on validation images
caption = True  # write captions from the brain's tokens
refine = True  # run img2img on the reconstructions with these captions
text_model_device = "cpu"  # one of auto, cpu, cuda; where captions are written
caption_batch_size = 4  # captions written at a time, at least 1
caption_converter = ""  # a released converter of tokens, by default one is trained here
refiner_weights = ""  # the model that refines, a file, folder or hub id, by default as weights says
refine_steps = 25  # steps of the refiner's whole schedule, at least 1
refine_run = 12  # steps of that schedule that are run, the last ones, at least 1
caption_guidance = 5.0  # classifier-free guidance towards the caption, at least 0
generator_batch = 4  # images generated at a time, at least 1

# optimisation
converter_epochs = 60  # passes over the training images of the map between token spaces, at least 1
converter_batch_size = 128  # images a step of the converter's training, at least 1
converter_max_lr = 3.0e-4  # peak learning rate of the converter's training, more than 0
resume_from_ckpt = True  # go on where an interrupted run stopped
seed = 42  # of everything random here

# evaluation
refine_ceiling = True  # also caption and refine what the generator makes of the true tokens
sheet_images = 12  # test images on the sheet, the first ones, at least 1

# %%
from src.parameters import configure

run = configure(globals(), "04_refine")
run

# %%
import json
import shutil

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from src.data import cache_targets, check_made_from, open_all_sessions, open_training_split
from src.decoding import (
    Refinement,
    compute_in_chunks,
    find_decoder,
    load_encoder,
    load_reconstructions,
    load_refiner,
    read_decoder_config,
    refine_images,
)
from src.figures import plot_contact_sheet, plot_training_curves, save_figure
from src.metrics import pixcorr, resize
from src.models import CaptionConverter
from src.networks import load_published
from src.pretrained import BrainCaptioner, PatchClip
from src.training import Batching, Execution, Optimisation, TokenPairs, fit_converter

# %%
from src.utils import (
    PerceptError,
    atomic,
    count_parameters,
    read_json,
    resolve,
    to_device,
    write_json,
)

# %% [markdown]
# ## What notebook 03 left
# The tokens are those of the first sample of the prior, the pictures what the generator made of
# them.

# %%
subject = open_training_split(dataset, subj, run.logs)
tensors, metadata = load_reconstructions(run.results)
check_made_from(metadata, subject.identity, run.name)
main, image_ids = metadata["main"], tensors["image_ids"].numpy()
if f"tokens_{main}" not in tensors:
    raise PerceptError(
        f"The reconstructions of {run.name} come without tokens, from which captions are written:"
        " run notebooks 01 and 03 with a high level for it."
    )
seen, tokens = tensors["seen"].float(), tensors[f"tokens_{main}"].float()
clip = load_encoder(
    read_decoder_config(find_decoder(run.logs, "high_level", checkpoint)), weights, run.device
)
stored, now = tensors["true_tokens"][:4].float(), clip.embed_image(seen[:4]).cpu()
if stored.shape != now.shape or (stored - now).abs().max() > 0.05 * now.abs().max():
    raise PerceptError(
        f"The true tokens stored for {run.name} are not those that {type(clip).__name__} gives for"
        " the seen images: run notebook 03 again."
    )
print(
    f"(test images, tokens, dim) = {tuple(tokens.shape)} from {type(clip).__name__}, (test images,"
    f" channels, height, width) = {tuple(tensors[main].shape)}"
)


# %% [markdown]
# ## From CLIP's tokens to the captioner's
# Both models have seen every image of the dataset once; what they said is kept. No brain is in
# this: training images teach the converter, validation images judge it.

# %%
def cache_tokens(name, encoder, ids):
    """Tokens of some images by one encoder, computed once."""
    return cache_targets(
        dataset, name, encoder.fingerprint(), ids, encoder.encode_pixels, encoder.target_shape
    )


if caption:
    encoder = BrainCaptioner(weights, device=run.device)
    kind = "patch_tokens" if isinstance(clip, PatchClip) else "clip_tokens"
    pictured = open_all_sessions(dataset, subj, subject)
    small_tokens = cache_tokens(kind, clip, pictured.all_images)
    captioner_tokens = cache_tokens("git_tokens", encoder, pictured.all_images)
    train_ids, val_ids = pictured.image_ids("train"), pictured.image_ids("val")
    print(
        f"{clip.target_shape} -> {encoder.target_shape}; {len(train_ids)} images to train on,"
        f" {len(val_ids)} to validate"
    )

# %%
if caption and caption_converter:
    pairs = zip(small_tokens.shape, captioner_tokens.shape, strict=True)
    converter = CaptionConverter(*(size for pair in pairs for size in pair))
    load_published(resolve(caption_converter), converter)
    converter.to(run.device).eval().requires_grad_(False)

# %%
if caption and not caption_converter:
    made_by = {"clip": clip.fingerprint()["model"], "captioner": encoder.fingerprint()["model"]}
    made_by["images"] = pictured.identity["images"]
    converter, history = fit_converter(
        TokenPairs(small_tokens, captioner_tokens, train_ids),
        TokenPairs(small_tokens, captioner_tokens, val_ids),
        run.logs / "caption_converter",
        made_by,
        Batching(converter_epochs, converter_batch_size, seed),
        Optimisation(converter_max_lr),
        Execution(run.device),
        resume_from_ckpt,
    )
    save_figure(plot_training_curves(history), run.results / "figures" / "04_caption_converter.png")
    print(
        f"{count_parameters(converter):,} weights, R2 of the captioner's tokens on {len(val_ids)}"
        f" validation images: {history['val/r2'].max():.3f}"
    )

# %% [markdown]
# ## Captions
# The same captioner writes three times: after the tokens that the brain predicts, after the true
# CLIP tokens (what the converter alone costs), and after its own tokens of the image that was
# seen. The last is the usual reference of caption metrics, beside what people wrote.

# %%
run.record_parameters()
unfinished = run.results / ".refining"
stamp = [(run.results / "reconstructions.safetensors").stat().st_mtime_ns]
mark = [
    stamp,
    {k: v for k, v in run.parameters.items() if k not in ("sheet_images", "caption", "refine")},
]


def read_or_write(name, write):
    """Captions, kept until the notebook is done, so that an interrupted run goes on."""
    file = unfinished / f"captions_{name}.json"
    if not file.exists() or read_json(file)["mark"] != json.loads(json.dumps(mark)):
        write_json(file, {"mark": mark, "captions": write()})
    return read_json(file)["captions"]


# %%
table, captions = run.results / "captions_brain.parquet", {}
if caption:
    with torch.no_grad():
        predicted, best = (
            torch.cat([converter(x.to(run.device)).cpu() for x in token_rows.split(64)])
            for token_rows in (tokens, tensors["true_tokens"].float())
        )
    true_captioner_tokens = torch.from_numpy(captioner_tokens.rows(image_ids)).float()
    writer = BrainCaptioner(weights, device=to_device(text_model_device))
    for name, x in {
        "brain": predicted,
        "ceiling": best,
        "git_image": true_captioner_tokens,
    }.items():
        captions[name] = read_or_write(
            name, lambda x=x: writer.caption_tokens(x, batch_size=caption_batch_size)
        )
elif refine:
    if not table.exists():
        raise PerceptError(
            f"{table} is missing, and without captions nothing can be refined: set caption to True."
        )
    earlier = pd.read_parquet(table).set_index("image").loc[image_ids]
    captions = {name: earlier[name].tolist() for name in ("brain", "ceiling", "git_image")}

# %% [markdown]
# Into the table that notebook 06 reads: a row an image, and with it what people wrote (`reference`
# their first sentence, `references` all of them).

# %%
people = pd.Series(dtype=object)
if subject.captions is not None:
    people = subject.captions.groupby("image")["caption"].agg(list)
human_captions = [people.get(image, []) for image in image_ids]
caption_table = pd.DataFrame(
    {
        "image": image_ids,
        **captions,
        "reference": [sentences[0] if sentences else "" for sentences in human_captions],
        "references": [json.dumps(sentences) for sentences in human_captions],
    }
)
if caption:
    with atomic(table) as path:
        caption_table.to_parquet(path, index=False)
labels = None
if subject.labels is not None:
    labels = subject.labels.set_index("image").loc[image_ids]
label_columns = [
    column for column in ("scene", "kind", "colour") if labels is not None and column in labels
]

# %%
if captions and subject.git_captions is not None:
    published = subject.git_captions.set_index("image")["caption"].reindex(image_ids)
    same = np.mean(published.to_numpy() == np.array(captions["git_image"]))
    print(
        f"MindEye2's files hold what GIT wrote of {published.notna().sum()} of these images; word"
        f" for word it writes the same here of {same:.0%} of all."
    )

# %%
if label_columns and captions:
    heard = captions | {"brain, shuffled": list(np.roll(captions["brain"], 1))}
    right = {
        name: [
            np.mean(
                [w in sentence.split() for w, sentence in zip(labels[q], sentences, strict=True)]
            )
            for q in label_columns
        ]
        for name, sentences in heard.items()
    }
    print("share of captions that name what is shown:")
    print(pd.DataFrame(right, index=label_columns).T.round(3).to_string())
caption_table.drop(columns="references").head(12)

# %% [markdown]
# ## Refining
# The refiner begins at the reconstruction, as noisy as it is before the last `refine_run` steps,
# and is told the caption. Each picture's noise is drawn from (seed, image).

# %%
rows, refined_sources = (
    {},
    {"refined": (main, "brain")}
    | (
        {"refined_ceiling": ("ceiling", "ceiling")}
        if refine_ceiling and "ceiling" in tensors
        else {}
    ),
)
if refine:
    pipeline = load_refiner(refiner_weights or weights, run.device)
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "steps": refine_steps,
        "run": refine_run,
        "guidance_scale": caption_guidance,
        "seed": seed,
    }
    print(f"{type(pipeline).__name__}: the last {refine_run} of {refine_steps} steps are run")


# %%
def repainted(name, part):
    """What the refiner makes of one row's pictures of some images."""
    picture, caption_source = refined_sources[name]
    pictures = refine_images(
        pipeline,
        captions[caption_source][part],
        tensors[picture][part].float(),
        image_ids[part],
        Refinement(refine_steps, refine_run, caption_guidance),
        seed,
        generator_batch,
    )
    return {name: pictures.half()}


for name in refined_sources if refine else ():
    rows |= compute_in_chunks(
        lambda part, name=name: repainted(name, part),
        len(seen),
        generator_batch * 8,
        unfinished,
        [name, mark, captions[refined_sources[name][1]]],
    )

# %% [markdown]
# ## Into the run's reconstructions
# What notebook 03 stored stays as it is; the refined rows join it, and notebook 06 scores them
# beside.

# %%
if rows:
    about = metadata | {
        "refined": json.dumps({"of": main, "captions": "captions_brain.parquet", **options})
    }
    with atomic(run.results / "reconstructions.safetensors") as path:
        save_file(
            {key: value.contiguous() for key, value in (tensors | rows).items()},
            path,
            metadata=about,
        )
    tensors |= rows
shutil.rmtree(unfinished, ignore_errors=True)

# %% [markdown]
# ## The published files
# Under the names and in the shapes that the field's evaluations read: pictures of 256 x 256 in [0,
# 1], tokens and captions in the order of the test images.

# %%
blurry = tensors.get(f"low_level_{main}")
pictures = {
    "recons": tensors[main],
    "blurryrecons": blurry,
    "enhancedrecons": tensors.get("refined"),
}
files = {name: resize(x.float(), 256) for name, x in pictures.items() if x is not None}
files |= {"clipvoxels": tensors[f"projected_{main}"].float(), "prior_out": tokens}
files |= {"backbones": tensors[f"backbone_{main}"].float()} if f"backbone_{main}" in tensors else {}
files |= {"predcaptions": np.array(captions["brain"])} if captions else {}
for name, content in files.items():
    with atomic(run.results / f"{run.name}_all_{name}.pt") as path:
        torch.save(content, path)
{f"{run.name}_all_{name}.pt": tuple(content.shape) for name, content in files.items()}

# %% [markdown]
# ## The sheet
# The first test images in their own order; nothing is selected.

# %%
columns = (
    {"seen": seen}
    | ({"blurry": blurry} if blurry is not None else {})
    | {"reconstructed": tensors[main]}
)
columns |= {"refined": tensors["refined"]} if "refined" in tensors else {}
columns |= {"refined ceiling": tensors["refined_ceiling"]} if "refined_ceiling" in tensors else {}
beneath = {}
if captions:
    beneath = {"brain": captions["brain"], "of the image": captions["git_image"]}
sheet = plot_contact_sheet(columns, n=sheet_images, captions=beneath)
save_figure(sheet, run.results / "refined_sheet.png")

# %% [markdown]
# ## What we saw

# %%
correlation = pixcorr(seen, tensors[main]).mean()
print(f"Correlation of pixels with the seen images, reconstructed: {correlation:.3f}")
for name in sorted({"refined"} & set(tensors)):
    print(f"{name}: {pixcorr(seen, tensors[name]).mean():.3f}")
for sentence in captions.get("brain", [])[:3]:
    print(f"from the brain: {sentence}")

# %% [markdown]
# A refined picture is cleaner than the reconstruction it began from. Where the caption names the
# wrong object the refiner paints that object well, so look whether "refined" is also nearer to
# "seen"; notebook 06 scores both rows. Compare the captions from the brain with those of the
# image: the scene is often right where the object is not.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py mindeye2_small --mini`:
# - refined by fewer steps: `python run.py mindeye2_small --mini --from 04 --to 04 -p refine_run 6
#   -p sheet_images 10`.
#
# Next: notebook 06 scores pictures and captions.
