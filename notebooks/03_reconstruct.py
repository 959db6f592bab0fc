# %% [markdown]
# # 03 · Reconstruct: from voxels to images
#
# **Question.** What did the person see, as far as the brain activity, the decoder and the generator together can tell?
#
# **Reads** the checkpoints of notebooks 01 and 02, or released ones: put MindEye's `last.pth` under `train_logs/<model_name>/` and `epoch120.pth` of its
# autoencoder under `train_logs/<autoencoder_name>/`. **Writes** `results/<run>/`: `reconstructions.safetensors` (every row: the network's
# and the ridge's reconstructions, the low level alone, and the controls), and under the published names
# `all_images.pt` and `<run>_recons_img2img<strength>_<samples>samples.pt`.
#
# A run that is interrupted goes on with the images that are missing.
#
# Cost: full size about 8 s an image and sample on an A100 (published figure, not
# run here); mini about one minute on two CPU cores.
#
# Source: MindEye, arXiv 2305.18274, section 2.4.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run under train_logs/ and results/, by default made from recipe and subject
dataset = "nsd"  # prepared dataset under data/
data_path = ""  # where MindEye's shards lie, read here when notebook 00 has not prepared the dataset
subj = 1  # subject, at least 1
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
vd_cache_dir = ""  # where models from the hub are kept, by default the hub's own cache
decoder = "network"  # one of network, ridge, both
checkpoint = "last"  # one of last, best; best is the epoch chosen on the validation split
autoencoder_name = ""  # run that holds the low-level network, by default this run
img2img_strength = 0.85  # 1 uses no low-level image, 0 is the low-level image itself, at least 0, at most 1
faithful_img2img = False  # start as the published code does, from a latent that took a detour through a wrongly normalised picture
recons_per_sample = 16  # samples an image, of which the brain's own prediction chooses one, at least 1
prior = True  # sample the diffusion prior, otherwise decode the backbone's tokens
timesteps = 0  # sampling steps of the prior, 0 for all of its schedule, at least 0
prior_solver = "published"  # one of published, dpm++; published is ancestral with all steps and DDIM with fewer
guidance_scale = 0.0  # classifier-free guidance, 0 for the published 3.5 (Versatile Diffusion) or 7.5 (image variations), at least 0
num_inference_steps = 20  # steps of the image generator, at least 1
test_repeats = 0  # repeats averaged at test, 0 for all, at least 0
first_images = 0  # reconstruct only so many test images, 0 for all, at least 0
generator_batch = 16  # pictures that the generator makes at a time, at least 1
seed = 42  # of everything random
same_seed = False  # the same noise for every image, as published; otherwise each image has its own

# %%
from src.utils import configure

run = configure(globals(), "03_reconstruct")
run

# %%
import shutil

import numpy as np
import torch
from safetensors.torch import save_file

from src.data import Normaliser, cached_targets, open_subject
from src.figures import contact_sheet, save
from src.pretrained import Clipper
from src.readers import mindeye
from src.reconstruct import (
    find_decoder, generate_images, generator_for, in_chunks, latent_noise, load_decoder, pick_best, predict_latents, predict_tokens,
)  # fmt: skip
from src.retrieval import nearest
from src.utils import atomic

# %% [markdown]
# ## Data: the test images, their repeats averaged
# The released networks were trained on the betas as the shards hold them, ours on z-scores: each is given what it was trained on.

# %%
mindeye.read_if_missing(data_path, dataset, subj)
subject = open_subject(dataset, subj)
files = {
    "network": (find_decoder(run.logs, "high_level", checkpoint), find_decoder(run.logs.parent / (autoencoder_name or run.logs.name), "low_level", checkpoint)),
    "ridge": (run.logs / "high_level_ridge.safetensors", run.logs / "low_level_ridge.safetensors"),
}
keep = slice(0, first_images or None)


def scale_of(path):
    """The normaliser's file of the run that a network's file is of, or None for a released one."""
    run_of = run.logs.parent / path.relative_to(run.logs.parent).parts[0]
    return None if path.suffix == ".pth" else run_of / "normaliser.safetensors"


def measured(scale):
    """Voxels (images, voxels) on that scale, and the images' ids."""
    x, ids = subject.averaged("test", repeats=test_repeats or None, normaliser=scale and Normaliser.load(scale))
    return x[keep], ids[keep]


# %%
names = {"network": ["network"], "ridge": ["ridge"], "both": ["network", "ridge"]}[decoder]
voxels = {scale: measured(scale) for scale in {scale_of(path) for name in names for path in files[name] if path.exists()}}
image_ids = next(iter(voxels.values()))[1]
seen = torch.from_numpy(subject.images(image_ids)).permute(0, 3, 1, 2).float() / 255
print(f"(test images, voxels) = ({len(seen)}, {subject.betas.shape[1]})   protocol {subject.protocol}, test set {subject.test_set}")

# %% [markdown]
# ## The models
# What the checkpoint predicts decides the generator: all tokens go to Versatile Diffusion, one embedding alone to Stable Diffusion image variations.

# %%
main = names[0]
high = {name: load_decoder(files[name][0], run.device) for name in names}
low = {name: load_decoder(files[name][1], run.device)[0] for name in names if img2img_strength < 1 or files[name][1].exists()}
config = high[main][1]
shape = tuple(config["tokens"])  # (tokens, dim)
hidden = shape[0] > 1
made_for = {"variant": "ViT-L/14", "hidden": hidden, "norm_embs": hidden} | config.get("clip", {})
clipper = Clipper(weights, device=run.device, **made_for)
diffusion = generator_for(shape[0], weights, run.device)
print(f"(tokens, dim) = {shape}: {type(diffusion).__name__}, guidance {guidance_scale or diffusion.guidance}")

# %% [markdown]
# ## The step
# Voxels -> tokens (backbone, then the prior) and voxels -> latent; the latent with noise is where the generator begins, the tokens are
# what it is told; of several samples the one nearest to the tokens that the projector predicts is kept.

# %%
options = {"strength": img2img_strength, "guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, "seed": seed, "same": same_seed}
options["batch_size"] = generator_batch


def paint(tokens, ids, latents, samples):
    """Pictures (images, samples, 3, height, width) of tokens (images, samples, tokens, dim), begun at latents (images, channels, h, w)."""
    if latents is not None and faithful_img2img:
        latents = diffusion.published_start(latents, latent_noise(ids, diffusion.latent_shape, seed, samples, same_seed))
    return generate_images(diffusion, tokens, ids, latents, n_samples=samples, **options)


def reconstruct(name, rows):
    """What one decoder makes of some images: reconstruction, low level alone, tokens of the first sample and tokens for retrieval."""
    high_level, low_level = files[name]
    ids = image_ids[rows]
    tokens, projected = predict_tokens(
        high[name][0], voxels[scale_of(high_level)][0][rows], shape, recons_per_sample, use_prior=prior, timesteps=timesteps, seed=seed, device=run.device, image_ids=ids,
        same=same_seed, solver=prior_solver,
    )  # fmt: skip
    latents = predict_latents(low[name], voxels[scale_of(low_level)][0][rows], diffusion.latent_shape, device=run.device) if name in low else None
    chosen, _ = pick_best(clipper, projected, paint(tokens, ids, latents, recons_per_sample))
    also = {} if latents is None else {f"low_level_{name}": diffusion.decode(latents).cpu()}
    return {name: chosen, f"tokens_{name}": tokens[:, 0], f"projected_{name}": projected} | also


# %%
rows, unfinished = {}, run.results / ".reconstructing"
unfinished.mkdir(exist_ok=True)
for name in names:
    mark = [run.parameters, [(str(path), path.stat().st_mtime_ns) for path in files[name] if path.exists()], subject.test_set]
    rows |= in_chunks(lambda part, name=name: reconstruct(name, part), len(seen), max(1, generator_batch // recons_per_sample), unfinished, mark)
predicted = {key: rows.pop(key) for key in list(rows) if key.startswith(("tokens_", "projected_"))}

# %% [markdown]
# ## Floors and ceiling
# Each is scored in notebook 06 exactly as a reconstruction is.
# - **mean image**: no brain data at all.
# - **nearest training image**: the training image whose tokens are nearest to those predicted: what a lookup would show.
# - **ceiling**: the same generator, given the true tokens and the true latents.

# %%
train_ids = subject.image_ids("train")
clip_targets = cached_targets(dataset, "clip_tokens", clipper.fingerprint(), subject.all_images, clipper.encode_pixels, clipper.target_shape)
train_tokens = torch.from_numpy(clip_targets.rows(train_ids).astype(np.float32)).flatten(1)
found = nearest(predicted[f"projected_{main}"].flatten(1), train_tokens, k=1)[1][:, 0]
lookup = subject.images(train_ids[np.asarray(found)])
rows["nearest_train"] = torch.from_numpy(lookup).permute(0, 3, 1, 2).float() / 255
mean_image = np.mean([subject.images(ids).mean(0) for ids in np.array_split(train_ids, max(1, len(train_ids) // 500))], 0)
rows["mean_image"] = (torch.from_numpy(mean_image).permute(2, 0, 1).float() / 255).expand(len(seen), -1, -1, -1).contiguous()

# %%
def best_possible(part):
    """What the generator makes of the true tokens and latents of some images, and what the autoencoder keeps of them."""
    tokens, latents = clipper.embed_image(seen[part]).view(-1, 1, *shape).cpu(), diffusion.encode(seen[part]).cpu()
    return {"ceiling": paint(tokens, image_ids[part], latents, 1)[:, 0], "autoencoder": diffusion.decode(latents).cpu(), "true_tokens": tokens[:, 0]}


rows |= in_chunks(best_possible, len(seen), generator_batch, unfinished, ["ceiling", run.parameters, subject.test_set])
true_tokens = rows.pop("true_tokens")

# %%
tensors = {"seen": seen, **rows, **predicted, "true_tokens": true_tokens, "image_ids": torch.from_numpy(np.asarray(image_ids, np.int64))}
with atomic(run.results / "reconstructions.safetensors") as path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
shutil.rmtree(unfinished)
published = {"all_images.pt": seen, f"{run.name}_recons_img2img{img2img_strength}_{recons_per_sample}samples.pt": rows[main]}
for name, tensor in published.items():
    with atomic(run.results / name) as path:
        torch.save(tensor, path)
print({name: tuple(row.shape) for name, row in rows.items()})

# %% [markdown]
# ## The contact sheet
# The first test images in their own order; nothing is selected.

# %%
low_level = {"low level": rows[f"low_level_{main}"]} if f"low_level_{main}" in rows else {}
columns = {"seen": seen} | low_level | {"reconstructed": rows[main], "nearest training": rows["nearest_train"], "ceiling": rows["ceiling"]}
sheet = contact_sheet(columns, n=32)
save(sheet, run.results / "contact_sheet.png")

# %% [markdown]
# ## What to look at
# Compare "reconstructed" with "nearest training": a generator that shows no more than the nearest training image is a lookup. Compare it with the
# "ceiling" to see what the generator itself cannot do. Next: notebook 05 asks how well the brain finds an image among others; 06 scores.
