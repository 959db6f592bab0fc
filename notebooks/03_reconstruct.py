# %% [markdown]
# # 03 · Reconstruct: from voxels to images
#
# **Question.** What did the person see, as far as the brain activity, the decoder and the
# generator together can tell?
#
# voxels → tokens → (prior) → generator → selection: each step is a cell below, first for a few
# images, then for the whole test set.
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
from functools import partial

import torch

from src.data import open_training_split
from src.decoding import (
    SeenImages,
    attach_voxels,
    compute_in_chunks,
    compute_repeat_agreement,
    list_inputs,
    load_decoders,
    make_lookup_baselines,
    open_system,
    predict_held_out_tokens,
    write_reconstructions,
)

# %%
from src.encoding import open_brain_agreement, open_brain_selection
from src.evaluation.likeness import MAX_IMAGES, HeldOutTokens
from src.figures import plot_contact_sheet, plot_image_grid, plot_tokens, save_figure
from src.metrics import pixcorr
from src.readers import prepare_if_missing
from src.training import fit_patch_converter
from src.utils import HOME

# %% [markdown]
# ## The test images and the decoders
# A *decoder* has a high level, which predicts CLIP tokens (what is seen), and a low level, which
# predicts the latent of a blurry image (where things are). Beside the network there may be a ridge
# or a kernel decoder. Test images are shown several times; their repeats are averaged.

# %%
prepare_if_missing("mindeye", data_path, dataset, subj)
subject = open_training_split(dataset, subj, run.logs)
trained = load_decoders(run, subject)
seen = SeenImages.open(subject, run.parameters, trained)
print(
    f"(test images, voxels) = ({len(seen)}, {subject.betas.shape[1]})   {seen.n_repeats} repeats,"
    f" protocol {subject.protocol}, test set {subject.test_set}"
)

# %% [markdown]
# Each decoder gets the voxels that it was trained on: released networks read the betas as the
# shards hold them, ours z-scores. With `fewer_repeats` the first decoder is also given fewer
# repeats, with `untrained` the network is also used as it is before training.

# %%
decoders = attach_voxels(trained, seen, untrained, seed)
main = decoders[next(iter(trained))]
for decoder in decoders.values():
    print(decoder.describe())

# %% [markdown]
# ## The frozen models
# `open_system` loads what the main decoder's predictions are meant for. All tokens go to Versatile
# Diffusion, one embedding alone to Stable Diffusion image variations, MindEye2's patch tokens to
# unCLIP. A run without a high level has no generator: its decoded latent is the reconstruction.
# These are the only differences between the systems, and `src/decoding/systems.py` holds them.

# %%
choose_by_brain = None
if selection == "brain":
    encoder_logs = HOME / "train_logs" / (encoder_name or run.name)
    agreement = open_brain_agreement(encoder_logs, subject, weights, run.device, main.training)
    choose_by_brain = open_brain_selection(
        agreement, subject, len(seen), test_repeats, seen.fewer_repeats
    ).select

# %%
learn_converter = partial(
    fit_patch_converter,
    subject=subject,
    folder=run.logs / "decoder_converter",
    epochs=converter_epochs,
    seed=seed,
    device=run.device,
)
system = open_system(run, seen, main, learn_converter, choose_by_brain)
run.record_parameters()
print(f"{system.describe()}   decoders: {', '.join(decoders)}")

# %% [markdown]
# ## One image at a time
# Before the whole test set runs, we follow its first images through every step.
#
# **Step 1: voxels to tokens.** The backbone predicts the tokens that CLIP would give the image. In
# the figure a row is a token and a column one of its numbers, less their mean over the images.

# %%
few = slice(0, 4)
backbone_tokens, projected = system.predict_tokens(main, few, use_prior=False)
print(f"(images, samples, tokens, dim) = {tuple(backbone_tokens.shape)} of the backbone")
print(f"(images, tokens, dim) = {tuple(projected.shape)} projected, for retrieval and selection")

# %% [markdown]
# **Step 2: the prior.** A regression predicts a mean, and a mean is no image: the diffusion prior
# draws tokens as CLIP would give them, as many samples as are asked for. With `prior` False the
# backbone's tokens go on as they are.

# %%
tokens, projected = system.predict_tokens(main, few)
print(f"(images, samples, tokens, dim) = {tuple(tokens.shape)} for the generator")
targets = system.cache_targets()
if tokens.numel():
    true_tokens = torch.from_numpy(targets.rows(seen.image_ids[few])).view(projected.shape)
    maps = {"true": true_tokens, "backbone": backbone_tokens[:, 0], "to generator": tokens[:, 0]}
    save_figure(plot_tokens(maps), run.results / "figures" / "03_tokens.png")

# %% [markdown]
# **Step 3: voxels to a blurry image.** The low level predicts a latent of the autoencoder. Decoded,
# it shows where light and colour are.

# %%
latents = system.predict_latents(main, few)
grid = {"seen": seen.pixels[few]}
if latents is not None:
    print(f"(images, channels, height, width) = {tuple(latents.shape)} of the latents")
    grid["low level"] = system.decode_latents(latents)

# %% [markdown]
# **Step 4: the generator.** It begins at the latent with noise (`img2img_strength`), removes the
# noise step by step, and the tokens say what the image should show.

# %%
samples = system.generate(tokens, few, latents, system.count_samples(main))
print(f"(images, samples, colours, height, width) = {tuple(samples.shape)}")
grid |= {f"sample {k + 1}": samples[:, k] for k in range(min(4, samples.shape[1]))}

# %% [markdown]
# **Step 5: selection.** Of several samples the one is kept whose CLIP tokens are nearest to those
# that the projector predicts from the brain; with `selection` brain, the one that makes the
# measured voxels most likely, as an encoding model sees it. The image that was seen plays no
# part.

# %%
grid["chosen"] = system.select(main, few, projected, samples)
save_figure(plot_image_grid(grid), run.results / "figures" / "03_steps.png")


# %% [markdown]
# ## The whole test set
# The same five steps for every decoder and every image. The first sample is stored beside the
# chosen one: notebook 06 shows with a paired interval whether choosing helps.

# %%
def reconstruct(decoder, rows):
    """What one decoder makes of some images: tensors (images, ...) by name."""
    tokens, projected = system.predict_tokens(decoder, rows)
    latents = system.predict_latents(decoder, rows)
    samples = system.generate(tokens, rows, latents, system.count_samples(decoder))
    chosen = system.select(decoder, rows, projected, samples)
    stored = system.collect(decoder, tokens, projected, latents, samples)
    return {decoder.name: chosen.half()} | stored


# %%
tensors, unfinished = {}, run.results / ".reconstructing"
for decoder in decoders.values():
    tensors |= compute_in_chunks(
        partial(reconstruct, decoder),
        len(seen),
        system.count_images_at_once(decoder),
        unfinished,
        list_inputs(run, decoder, seen),
    )

# %% [markdown]
# ## How well could any decoder do?
# Two repeats of an image differ by noise alone. How alike the predictions from single repeats are
# bounds how well their mean can correlate with the truth (notebook 06 shows it as the noise
# ceiling). Compared are the tokens that the generator is given, or, where the prior draws these at
# random, the projected ones. Without tokens this is left out.

# %%
predictions = system.read_repeats()
if len(predictions) > 1:
    tensors["repeat_agreement"] = compute_repeat_agreement(predictions)
    agreement_of_repeats = tensors["repeat_agreement"].mean()
    print(f"predictions from two single repeats correlate by {agreement_of_repeats:.3f}")
del predictions

# %% [markdown]
# ## Baselines and upper bound
# Each is scored in notebook 06 exactly as a reconstruction is.
# - **upper bound** ("ceiling"): the same generator, given the true tokens and the true latents;
#   without one, what the autoencoder keeps of the image.
# - **nearest training image**: the training image whose tokens (or latent) are nearest to those
#   predicted: what a lookup would show.
# - **mean image**: no brain data at all.

# %%
tensors |= compute_in_chunks(
    system.generate_upper_bound,
    len(seen),
    max(1, generator_batch // recons_per_sample),
    unfinished,
    ["ceiling", run.parameters, subject.identity],
)
tensors |= make_lookup_baselines(system, targets, tensors)

# %% [markdown]
# ## Into the results of the run
# Measures of retrieval (notebook 05) take their scale from images that nobody asks about:
# predictions for the first validation images, their true tokens, and the mean tokens of the
# training images.

# %%
held_out = predict_held_out_tokens(system, targets, trained, MAX_IMAGES)
if held_out:
    HeldOutTokens(**held_out).save(run.results)
write_reconstructions(run, system, tensors)
shutil.rmtree(unfinished, ignore_errors=True)
images = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 4}
print({name: tuple(tensor.shape) for name, tensor in images.items()})

# %% [markdown]
# ## The contact sheet
# The first test images in their own order; nothing is selected.

# %%
titles = {
    f"low_level_{main.name}": "low level",
    main.name: "reconstructed",
    "nearest_train": "nearest training",
    "ceiling": "ceiling",
}
columns = {title: images[name] for name, title in titles.items() if name in images}
sheet = plot_contact_sheet({"seen": seen.pixels} | columns, n=32)
save_figure(sheet, run.results / "contact_sheet.png")

# %% [markdown]
# ## What we saw

# %%
correlations = {title: pixcorr(seen.pixels, images).mean() for title, images in columns.items()}
print(f"Correlation of pixels with the {len(seen)} images that were seen:")
for title, correlation in correlations.items():
    print(f"- {title}: {correlation:.3f}")
gain = correlations["reconstructed"] - correlations["nearest training"]
print(f"The reconstructions are {gain:+.3f} better than a lookup among the training images.")

# %% [markdown]
# Pixels are one score of many, and no interval stands beside it yet: notebook 06 gives both.
# Compare "reconstructed" with "nearest training": a generator that shows no more than the nearest
# training image is a lookup. Compare it with the "ceiling" to see what the generator itself
# cannot do.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py mindeye --mini` (with 40 images and all
# decoders the stage took three and a half minutes on one core of a busy machine):
# - the tokens alone, without the blurry image: `python run.py mindeye --mini --from 03 --to 03 -p
#   img2img_strength 1.0 -p first_images 20`;
# - four samples, of which one is chosen: the same with `-p recons_per_sample 4`;
# - the prior in place of the backbone's tokens: the same with `-p prior True -p prior_steps 20`.
#
# Next: notebook 05 asks how well the brain finds an image among others; 06 scores.
