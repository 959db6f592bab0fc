# %% [markdown]
# # 03 · Reconstruct: from voxels to images
#
# **Question.** What did the person see, as far as the brain activity, the decoder and the
# generator together can tell?
#
# **Reads** the checkpoints of notebooks 01 and 02, or released ones: put MindEye's `last.pth`
# under `train_logs/<model_name>/` and `epoch120.pth` of its autoencoder under
# `train_logs/<autoencoder_name>/`. A run without a high level (FMRI2IMG's basic autoencoder) is
# read with `img2img_strength` 0: its low-level image is the reconstruction. **Writes**
# `results/<run>/`: `reconstructions.safetensors` (every row: the network's and the ridge's
# reconstructions, the low level alone, the controls, and what notebook 06 needs beside them), and
# under the published names `all_images.pt` and
# `<run>_recons_img2img<strength>_<samples>samples.pt`.
#
# A run that is interrupted goes on with the images that are missing.
#
# Cost: full size not measured (predicted, not run: 100 minutes for 982 images on one H200);
# mini about two minutes on two CPU cores.
#
# Source: MindEye, arXiv 2305.18274, section 2.4.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
data_path = ""  # files of the source, read here if they are not prepared yet
subj = 1  # subject, at least 1
test_repeats = 0  # repeats averaged at test, 0 for all, at least 0
first_images = 0  # only the first so many test images, 0 for all, at least 0

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
vd_cache_dir = ""  # where models from the hub are kept, by default the hub's own cache
decoder = "network"  # one of network, ridge, kernel, both, all; both is network and ridge
checkpoint = "last"  # one of last, best; best is chosen on validation images
autoencoder_name = ""  # run of the low-level network, by default this one (of voters: run/voter)
start_run = ""  # run whose retrieved images the generator starts from, instead of the low level
img2img_strength = 0.85  # 1 ignores the low-level image, 0 is that image, at least 0, at most 1
faithful_img2img = False  # start as the published code does, from a wrongly normalised image
recons_per_sample = 16  # samples an image, of which one is chosen, at least 1
selection = "tokens"  # one of tokens, brain; brain: what makes the measured voxels most likely
encoder_name = ""  # run of the encoding model that selection brain asks, by default this one
prior = True  # use the diffusion prior
prior_steps = 0  # sampling steps of the prior, 0 for all of its noise levels, at least 0
prior_solver = "published"  # one of published, dpm++; published is ancestral or DDIM (fewer steps)
guidance_scale = 0.0  # classifier-free guidance, 0 for the published 3.5 or 7.5, at least 0
num_inference_steps = 20  # steps of the image generator's schedule, at least 1
generator_batch = 16  # images generated at a time, at least 1
same_seed = False  # the same noise for every image, as published, otherwise each has its own

# optimisation
converter_epochs = 60  # passes over the training images of the map between token spaces, at least 1
seed = 42  # of everything random here

# evaluation
untrained = False  # also reconstruct with untrained networks, as a baseline
fewer_repeats = ""  # also reconstruct from so many repeats alone, separated by commas, e.g. 1,2
keep_samples = 0  # extra samples an image that are stored to look at, at least 0

# %%
from src.parameters import configure

run = configure(globals(), "03_reconstruct")
run

# %%
import shutil

import numpy as np
import torch
from safetensors.torch import save_file

# %%
from src.data import (
    Normaliser,
    cache_targets,
    check_trained_on,
    format_identity,
    open_all_sessions,
    open_training_split,
)
from src.decoding import (
    PriorSampling,
    compute_in_chunks,
    compute_repeat_agreement,
    compute_sample_spread,
    draw_latent_noise,
    find_decoders,
    generate_images,
    load_condition,
    load_decoder,
    load_encoder,
    load_generator,
    predict_latents,
    predict_tokens,
    predicts_both_levels,
    select_best,
)

# %%
from src.encoding import open_brain_agreement
from src.evaluation.likeness import MAX_IMAGES, HeldOutTokens
from src.figures import plot_contact_sheet, save_figure
from src.networks import build_decoder

# %%
from src.parameters import list_decoders
from src.pretrained import LatentAutoencoder, PatchClip
from src.readers import prepare_if_missing
from src.retrieval import find_nearest
from src.training import Batching, Execution, TokenPairs, fit_converter
from src.utils import HOME, PerceptError, atomic, seed_everything

# %% [markdown]
# ## Data: the test images, their repeats averaged
# The released networks were trained on the betas as the shards hold them, ours on z-scores: each
# is given what it was trained on.

# %%
prepare_if_missing("mindeye", data_path, dataset, subj)
subject = open_training_split(dataset, subj, run.logs)
low_logs = run.logs
if autoencoder_name:
    low_logs = HOME / "train_logs" / autoencoder_name
    check_trained_on(low_logs, subject.key, subject.identity)
files = find_decoders(run.logs, low_logs, checkpoint)
names = list_decoders(decoder)
main, keep = names[0], slice(0, first_images or None)
image_ids = subject.image_ids("test")[keep]
seen = torch.from_numpy(subject.images(image_ids)).permute(0, 3, 1, 2).float() / 255
n_repeats = test_repeats or min(len(rows) for rows in subject.rows_by_image("test"))
fewer_counts = sorted({k.strip() for k in fewer_repeats.split(",") if k.strip()})
if any(not (k.isdigit() and 1 <= int(k) < n_repeats) for k in fewer_counts):
    raise PerceptError(
        f"fewer_repeats is '{fewer_repeats}', but {n_repeats} repeats are averaged: give numbers"
        f" from 1 to {n_repeats - 1}, or leave it empty."
    )
starts = None

# %%
if start_run:
    starts = load_condition(HOME / "results" / start_run, "retrieved", image_ids)

# %%
if start_run and untrained:
    raise PerceptError(
        "The untrained floor knows nothing of the brain, and pictures retrieved by what it says"
        " would tell it: with start_run set untrained to False."
    )
print(
    f"(test images, voxels) = ({len(seen)}, {subject.betas.shape[1]})   {n_repeats} repeats,"
    f" protocol {subject.protocol}, test set {subject.test_set}"
)

# %%
def measured(path, repeats=0, one=None):
    """Voxels (images, voxels) as the network in a file was trained on them: of some repeats
    averaged (0: all that are asked for), or of `one` alone.
    """
    scale = Normaliser.for_checkpoint(path)
    if one is not None:
        return subject.average_rows(
            [rows[one : one + 1] for rows in subject.rows_by_image("test")[keep]], scale
        )
    return subject.get_mean_betas(
        "test", repeats=repeats or test_repeats or None, normaliser=scale
    )[0][keep]


# %% [markdown]
# ## The models
# What the checkpoint predicts decides the generator: all tokens go to Versatile Diffusion, one
# embedding alone to Stable Diffusion image variations. Without a high level there is no generator:
# the autoencoder's decoder makes the picture of the predicted latent. With `untrained` the same
# networks are also used as they are before training, with `fewer_repeats` the first one is given
# fewer repeats.

# %%
def loaded(path, needed):
    """A trained decoder and its config, or nothing where there is none and none is needed."""
    return load_decoder(path, run.device) if needed or path.exists() else (None, {})


def with_voxels(name, repeats=0):
    """High and low level of a decoder, and the voxels that each of them is given; nothing for a
    level that is not there.
    """
    levels = high[name][0], low[name][0]
    return (
        *levels,
        *(
            level and measured(path, repeats)
            for level, path in zip(levels, files[name], strict=True)
        ),
    )


high = {name: loaded(files[name][0], img2img_strength > 0) for name in names}
for name, (network, _) in high.items():  # of MindEye2 and Percept one network predicts both
    if predicts_both_levels(network):
        files[name] = (files[name][0], files[name][0])
low = {name: loaded(files[name][1], img2img_strength < 1 and not start_run) for name in names}

# %%
judge, judge_files, brain_voxels = None, [], {}
if selection == "brain":
    encoder_logs = HOME / "train_logs" / encoder_name if encoder_name else run.logs
    judge_files = [encoder_logs / "encoder.safetensors"]
    trained_with = next(iter(high.values()))[1].get("training")
    judge = open_brain_agreement(encoder_logs, subject, weights, run.device, trained_with)
    for k in (0, *map(int, fewer_counts)):
        brain_voxels[k] = judge.measure(subject, "test", k or test_repeats)[keep]
subject = subject.with_adjacent_trials(*next(iter(high.values()))[1].get("neighbours", (0, 0)))

# %%
decoders = {name: with_voxels(name) for name in names}
for k in map(int, fewer_counts):
    decoders[f"repeats_{k}"] = with_voxels(main, k)
if untrained and "network" in names:
    seed_everything(seed)
    configs = [high["network"][1], low["network"][1]]
    fresh = [
        (
            build_decoder(config["model"]).to(run.device).eval().requires_grad_(False)
            if config
            else None
        )
        for config in configs
    ]
    decoders["untrained"] = (*fresh, *decoders["network"][2:])

# %%
config, has_tokens = high[main][1], high[main][0] is not None
same = ("split", "n_clusters", "num_sessions", "n_components", "rois")
selections = {
    tuple(c["training"].get(k) or "" for k in same)
    for _, c in (*high.values(), *low.values())
    if "training" in c
}
if len(selections) > 1:
    raise PerceptError(
        "The networks were trained on different images or components"
        f" {sorted(selections, key=str)}: train all of them with the same {', '.join(same)}."
    )
run.record_parameters()

# %%
if has_tokens:
    shape = tuple(config["tokens"])  # (tokens, dim)
    clipper = load_encoder(config, weights, run.device)
    diffusion = load_generator(shape[0], weights, run.device, clipper)
    print(
        f"(tokens, dim) = {shape}: {type(diffusion).__name__}, guidance"
        f" {guidance_scale or diffusion.guidance}   decoders: {', '.join(decoders)}"
    )
else:
    diffusion = LatentAutoencoder(weights, device=run.device, **low[main][1].get("autoencoder", {}))
    print(
        f"(channels, height, width) of a latent = {diffusion.latent_shape}: no generator  "
        f" decoders: {', '.join(decoders)}"
    )

# %% [markdown]
# MindEye2 is different in two things. Its blurry latents are of another autoencoder than the
# generator's; and unCLIP reads all of bigG's patch tokens, so that a model of smaller ones
# (ViT-B/32) needs a map from these to those, which is learnt here on training images, without a
# brain.

# %%
patches = has_tokens and isinstance(clipper, PatchClip)
low_decoder = diffusion
if patches:
    low_decoder = LatentAutoencoder(
        weights, "image_variation", 0 if weights == "mini" else 224, run.device
    )
read = None
if patches:
    read = PatchClip(weights, "bigG", run.device, clipper.squeezed)
converter = None


# %%
def cache_patch_tokens(encoder, pictured):
    """The patch tokens of all images of the data set, by one encoder."""
    return cache_targets(
        dataset,
        "patch_tokens",
        encoder.fingerprint(),
        pictured.all_images,
        encoder.encode_pixels,
        encoder.target_shape,
    )


# %%
if patches and read.target_shape != clipper.target_shape:
    pictured = open_all_sessions(dataset, subj, subject)
    pairs = [cache_patch_tokens(encoder, pictured) for encoder in (clipper, read)]
    made_by = {"from": clipper.fingerprint()["model"], "to": read.fingerprint()["model"]}
    made_by["images"] = pictured.identity["images"]
    train_ids, val_ids = (pictured.image_ids(split) for split in ("train", "val"))
    converter, history = fit_converter(
        TokenPairs(*pairs, train_ids),
        TokenPairs(*pairs, val_ids),
        run.logs / "decoder_converter",
        made_by,
        Batching(converter_epochs, batch_size=128, seed=seed),
        execution=Execution(run.device),
    )
    print(
        f"{clipper.target_shape} -> {read.target_shape}: R2 of the decoder's tokens on"
        f" {len(val_ids)} validation images {history['val/r2'].max():.3f}"
    )

# %% [markdown]
# ## The step
# Voxels -> tokens (backbone, then the prior) and voxels -> latent; the latent with noise is where
# the generator begins, the tokens are what it is told; of several samples the one nearest to the
# tokens that the projector predicts is kept; or, with `selection` brain, the one that makes the
# measured voxels most likely, as an encoding model sees it. The first sample is stored beside it:
# notebook 06 shows with a paired interval whether choosing helps.

# %%
options = {
    "strength": img2img_strength,
    "guidance_scale": guidance_scale,
    "num_inference_steps": num_inference_steps,
    "seed": seed,
    "shared_noise": same_seed,
}
options["batch_size"] = generator_batch


# %%
def paint(tokens, ids, latents, samples):
    """Pictures (images, samples, 3, height, width) of tokens (images, samples, tokens, dim), begun
    at latents (images, channels, h, w).
    """
    if patches:
        latents = diffusion.encode(low_decoder.decode(latents)) if img2img_strength < 1 else None
        tokens = (
            tokens
            if converter is None
            else converter(tokens.to(run.device).flatten(0, 1)).unflatten(0, tokens.shape[:2]).cpu()
        )
    if latents is not None and faithful_img2img:
        latents = diffusion.encode_published_start(
            latents, draw_latent_noise(ids, diffusion.latent_shape, seed, samples, same_seed)
        )
    return generate_images(diffusion, tokens, ids, latents, n_samples=samples, **options)


# %%
def tokens_of(name, rows, voxels, samples, sampled):
    """Tokens (images, samples, tokens, dim) and projected tokens (images, tokens, dim) of one
    decoder.
    """
    sampling = PriorSampling(
        samples,
        use_prior=sampled,
        timesteps=prior_steps,
        seed=seed,
        shared_noise=same_seed,
        solver=prior_solver,
    )
    return predict_tokens(
        decoders[name][0], voxels[rows], shape, sampling, image_ids[rows], device=run.device
    )


# %%
def reconstruct_low_level(name, rows):
    """The latents of one decoder, (images, ...); None where it has no low level."""
    low_level, low_voxels = decoders[name][1], decoders[name][3]
    if low_level is None:
        return None
    return predict_latents(low_level, low_voxels[rows], low_decoder.latent_shape, device=run.device)


# %%
def choose(name, rows, projected, samples):
    """One of the samples (images, samples, 3, height, width) of each image. The untrained floor
    knows nothing of the brain, and is not helped by it.
    """
    if judge is None or name == "untrained":
        return select_best(clipper, projected, samples)[0]
    repeats = int(name.removeprefix("repeats_")) if name.startswith("repeats_") else 0
    return judge.select_best(brain_voxels[repeats][rows], samples)[0]


def describe_samples(name, projected, pictures):
    """Of the main decoder: how far its samples are spread, the first one, the one that its tokens
    choose where the brain chooses, and samples to look at.
    """
    if name != main or pictures.shape[1] < 2:
        return {}
    outputs = {"spread": compute_sample_spread(clipper, pictures)}
    if recons_per_sample > 1:
        outputs["first_sample"] = pictures[:, 0].half()
    if recons_per_sample > 1 and judge is not None:
        samples = pictures[:, :recons_per_sample]
        outputs["chosen_by_tokens"] = select_best(clipper, projected, samples)[0].half()
    if keep_samples:
        outputs["samples"] = pictures[:, :keep_samples].half()
    return outputs


# %%
def reconstruct(name, rows):
    """What one decoder makes of some images: reconstruction, low level alone, tokens of the first
    sample and tokens for retrieval.
    """
    latents = reconstruct_low_level(name, rows)
    if not has_tokens:
        return {name: diffusion.decode(latents).cpu().half(), f"latents_{name}": latents.flatten(1)}
    # samples beyond recons_per_sample take no part in the choice; a baseline is made as the system
    samples = max(recons_per_sample, keep_samples if name == main else 1)
    tokens, projected = tokens_of(name, rows, decoders[name][2], samples, prior)
    start_latents = latents
    if starts is not None:
        start_latents = low_decoder.encode(starts[rows]).cpu()
    pictures = paint(tokens, image_ids[rows], start_latents, samples)
    outputs = {name: choose(name, rows, projected, pictures[:, :recons_per_sample]).half()}
    if name in names:
        outputs |= {f"tokens_{name}": tokens[:, 0], f"projected_{name}": projected}
        if latents is not None:
            outputs[f"low_level_{name}"] = low_decoder.decode(latents).cpu().half()
    return outputs | describe_samples(name, projected, pictures)


# %%
rows, unfinished = {}, run.results / ".reconstructing"
for name in decoders:
    mark = [
        name,
        run.parameters,
        [
            (str(path), path.stat().st_mtime_ns)
            for path in (*files.get(name, files[main]), *judge_files)
            if path.exists()
        ],
        subject.identity,
    ]
    part = generator_batch // max(recons_per_sample, keep_samples if name == main else 1)
    rows |= compute_in_chunks(
        lambda at, name=name: reconstruct(name, at), len(seen), max(1, part), unfinished, mark
    )
predicted = {
    key: rows.pop(key)
    for key in list(rows)
    if key.startswith(("tokens_", "projected_", "latents_", "spread", "samples"))
}

# %% [markdown]
# ## How well could any decoder do?
# Two repeats of an image differ by noise alone. How alike the predictions from single repeats are
# bounds how well their mean can correlate with the truth (notebook 06 shows it as the noise
# ceiling). Compared are the tokens that the generator is given, or, where the prior draws these at
# random, the projected ones. Without tokens this is left out.

# %%
level = "latents"
if has_tokens:
    level = "projected" if prior and main == "network" else "tokens"
compared = f"{level}_{main}"
which = 0
if level == "projected":
    which = 1
alone = range(n_repeats if has_tokens else 0)
singles = [
    tokens_of(main, slice(None), measured(files[main][0], one=k), 1, False)[which].half()
    for k in alone
]
if len(singles) > 1:
    predicted["repeat_agreement"] = compute_repeat_agreement(singles)
    print(
        "predictions from two single repeats correlate by"
        f" {predicted['repeat_agreement'].mean():.3f}"
    )
del singles

# %% [markdown]
# ## Floors and ceiling
# Each is scored in notebook 06 exactly as a reconstruction is.
# - **mean image**: no brain data at all.
# - **nearest training image**: the training image whose tokens (or latent) are nearest to those
#   predicted: what a lookup would show.
# - **ceiling**: the same generator, given the true tokens and the true latents; without one, what
#   the autoencoder keeps of the image.

# %%
train_ids = subject.image_ids("train")
kind, frozen = (
    ("patch_tokens" if patches else "clip_tokens", clipper)
    if has_tokens
    else ("vae_latents", diffusion)
)
frozen_targets = cache_targets(
    dataset,
    kind,
    frozen.fingerprint(),
    subject.all_images,
    frozen.encode_pixels,
    frozen.target_shape,
)
train_tokens = frozen_targets.rows(train_ids)

# %%
nearest_rows = find_nearest(
    predicted[f"projected_{main}" if has_tokens else compared], train_tokens, k=1
)[1][:, 0]
lookup = subject.images(train_ids[np.asarray(nearest_rows)])
rows["nearest_train"] = (torch.from_numpy(lookup).permute(0, 3, 1, 2).float() / 255).half()
rows["mean_image"] = (
    (torch.from_numpy(subject.mean_image("train")).permute(2, 0, 1) / 255)
    .half()
    .expand(len(seen), -1, -1, -1)
    .contiguous()
)

# %% [markdown]
# ## Held-out images for notebook 05
# Measures of retrieval take their scale from images that nobody asks about: predictions for the
# first validation images, their true tokens, and the mean tokens of the training images.

# %%
val_ids = subject.image_ids("val")[:MAX_IMAGES]
if has_tokens and len(val_ids):
    projected = {}
    for name in names:
        scale = Normaliser.for_checkpoint(files[name][0])
        voxels = subject.get_mean_betas("val", normaliser=scale)[0][: len(val_ids)]
        without_prior = PriorSampling(use_prior=False)
        projected[name] = predict_tokens(
            high[name][0], voxels, shape, without_prior, val_ids, device=run.device
        )[1]
    rows_of = torch.from_numpy(frozen_targets.rows(val_ids).astype(np.float32))
    mean_tokens = torch.from_numpy(train_tokens.mean(0, dtype=np.float32)).view(shape)
    held_out = HeldOutTokens(val_ids, projected, rows_of.view(-1, *shape), mean_tokens)
    held_out.save(run.results)


# %%
def best_possible(part):
    """What the generator makes of the true tokens and latents of some images, and what the
    autoencoder keeps of them.
    """
    latents = low_decoder.encode(seen[part]).cpu()
    if not has_tokens:
        return {"ceiling": diffusion.decode(latents).cpu().half()}
    tokens = clipper.embed_image(seen[part]).view(-1, 1, *shape).cpu()
    pictures = paint(
        tokens, image_ids[part], latents, recons_per_sample
    )  # as many samples as the system has, the nearest to the true tokens chosen
    outputs = {
        "ceiling": select_best(clipper, tokens[:, 0], pictures)[0],
        "autoencoder": low_decoder.decode(latents).cpu(),
    }
    return {name: pictures.half() for name, pictures in outputs.items()} | {
        "true_tokens": tokens[:, 0]
    }


# %%
rows |= compute_in_chunks(
    best_possible,
    len(seen),
    max(1, generator_batch // recons_per_sample),
    unfinished,
    ["ceiling", run.parameters, subject.identity],
)
if has_tokens:
    predicted["true_tokens"] = rows.pop("true_tokens")
    predicted["train_distance"] = (
        1 - find_nearest(predicted["true_tokens"], train_tokens, k=1)[0][:, 0]
    )  # of each seen image to the training image most like it

# %% [markdown]
# Pictures are stored in half precision, which a screen's 256 steps do not show.

# %%
n_shown = test_repeats or max(len(trials) for trials in subject.rows_by_image("test"))
about = {}
if start_run:
    about = {"begun": f"at the pictures that {start_run} retrieved"}
about |= {"data": format_identity(subject.identity)}
about |= {"main": main, "repeats": str(n_shown), "compared": compared, "protocol": subject.protocol}
about |= {
    "test_set": (
        subject.test_set
        if len(seen) == len(subject.image_ids("test"))
        else f"{subject.test_set}-first{len(seen)}"
    )
}
tensors = {
    "seen": seen.half(),
    **rows,
    **predicted,
    "image_ids": torch.from_numpy(image_ids.astype(np.int64)),
    "held_out": torch.from_numpy(subject.in_excluded_clusters(image_ids)),
}
with atomic(run.results / "reconstructions.safetensors") as path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=about)

# %%
shutil.rmtree(unfinished, ignore_errors=True)
published = {
    "all_images.pt": seen,
    f"{run.name}_recons_img2img{img2img_strength}_{recons_per_sample}samples.pt": (
        rows[main].float()
    ),
}
for name, tensor in published.items():
    with atomic(run.results / name) as path:
        torch.save(tensor, path)
print({name: tuple(row.shape) for name, row in rows.items()})

# %% [markdown]
# ## The contact sheet
# The first test images in their own order; nothing is selected.

# %%
low_level = {}
if f"low_level_{main}" in rows:
    low_level = {"low level": rows[f"low_level_{main}"]}
columns = (
    {"seen": seen}
    | low_level
    | {
        "reconstructed": rows[main],
        "nearest training": rows["nearest_train"],
        "ceiling": rows["ceiling"],
    }
)
sheet = plot_contact_sheet(columns, n=32)
save_figure(sheet, run.results / "contact_sheet.png")

# %% [markdown]
# ## What to look at
# Compare "reconstructed" with "nearest training": a generator that shows no more than the nearest
# training image is a lookup. Compare it with the "ceiling" to see what the generator itself cannot
# do. Next: notebook 05 asks how well the brain finds an image among others; 06 scores.
