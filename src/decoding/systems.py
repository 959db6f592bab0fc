"""From what a decoder predicts to an image: one class for each kind of system.

`open_system` is the one place that asks which kind a run is of:

- `TokenSystem`: tokens go to a generator that reads them as they are predicted (Versatile
  Diffusion, or Stable Diffusion image variations), which starts from the low-level image.
- `UnclipSystem`: MindEye2. Its blurry latents are of another autoencoder than the generator's, and
  unCLIP reads all of bigG's patch tokens, so that those of a smaller CLIP are converted first.
- `LatentSystem`: FMRI2IMG's basic autoencoder. There are no tokens and there is no generator: the
  decoded latent is the reconstruction.

All of them have the same steps: predict_tokens, predict_latents, generate, select.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src import utils
from src.data.targets import TargetCache, cache_encoder_targets
from src.decoding.generate import draw_latent_noise, generate_images, load_encoder, load_generator
from src.decoding.levels import Decoder, Level, SeenImages
from src.decoding.predict import PriorSampling, predict_latents, predict_tokens
from src.decoding.reconstructions import load_condition
from src.decoding.selection import compute_sample_spread, select_best
from src.parameters import Run
from src.pretrained.autoencoder import LatentAutoencoder
from src.pretrained.base import FrozenModel
from src.pretrained.clip import Clipper, PatchClip
from src.pretrained.generators import ImageGenerator
from src.utils import PerceptError

Parameters = Mapping[str, Any]

# chooses samples by the measured voxels: (repeats, rows, samples) -> images
BrainChoice = Callable[[int, slice, Tensor], Tensor]

# teaches the map from the patch tokens of one CLIP to those of another: the map, and its R2
Converter = tuple[nn.Module | None, float]
ConverterTraining = Callable[[PatchClip, PatchClip], Converter]


@dataclass
class System:
    """What all kinds have in common.

    Attributes:
        seen: the test images.
        main: the decoder that is scored.
        parameters: of notebook 03.
        device: torch device.
        autoencoder: of the low level's latents.
        encoder: frozen model whose targets the decoders predict.
        choose_by_brain: chooses samples in place of their tokens, or None.
        start_images: (images, 3, height, width) that the generator starts from in place of the
            low level's, or None.
    """

    seen: SeenImages
    main: Decoder
    parameters: Parameters
    device: str
    autoencoder: LatentAutoencoder
    encoder: FrozenModel
    choose_by_brain: BrainChoice | None = None
    start_images: Tensor | None = None

    target_name = ""  # of the cached targets
    compared = "latents"  # what of the predictions the noise ceiling is about

    def count_samples(self, decoder: Decoder) -> int:
        """Samples of each image that are made: as many as are chosen among, or are looked at."""
        n_kept = self.parameters["keep_samples"] if decoder.name == self.main.name else 1
        return max(self.parameters["recons_per_sample"], n_kept)

    def count_images_at_once(self, decoder: Decoder) -> int:
        """Images whose samples fill one batch of the generator, at least 1."""
        return max(1, self.parameters["generator_batch"] // self.count_samples(decoder))

    def predict_latents(self, decoder: Decoder, rows: slice) -> Tensor | None:
        """Scaled latents (images, channels, h, w) of some test images; None without low level."""
        if decoder.low is None:
            return None
        network, voxels = decoder.low.network, decoder.low.voxels[rows]
        shape = self.autoencoder.latent_shape
        return predict_latents(network, voxels, shape, device=self.device)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (images, channels, h, w) -> images (images, 3, height, width)."""
        return self.autoencoder.decode(latents).cpu()

    def cache_targets(self) -> TargetCache:
        """The frozen targets of all images of the data set."""
        subject = self.seen.subject
        folder, ids = subject.folder, subject.all_images
        return cache_encoder_targets(folder, self.target_name, self.encoder, ids)

    def describe(self) -> str:
        """Sizes of what is predicted, and the generator."""
        raise NotImplementedError

    def predict_tokens(
        self, decoder: Decoder, rows: slice, use_prior: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (images, samples, tokens, dim) and projected tokens (images, tokens, dim)."""
        raise NotImplementedError

    def generate(
        self, tokens: Tensor, rows: slice, latents: Tensor | None, n_samples: int
    ) -> Tensor:
        """Samples (images, n_samples, 3, height, width) of tokens, starting from latents."""
        raise NotImplementedError

    def select(self, decoder: Decoder, rows: slice, projected: Tensor, samples: Tensor) -> Tensor:
        """One of the samples of each image, (images, 3, height, width)."""
        raise NotImplementedError

    def collect(
        self, decoder: Decoder, tokens: Tensor, projected: Tensor, latents: Tensor, samples: Tensor
    ) -> dict[str, Tensor]:
        """What is stored of a decoder beside the chosen images, by name."""
        raise NotImplementedError

    def read_repeats(self) -> list[Tensor]:
        """Of each repeat alone, what the main decoder predicts (images, ...); none where nothing
        but latents is predicted.
        """
        return []

    def generate_upper_bound(self, rows: slice) -> dict[str, Tensor]:
        """What the generator makes of the true targets of some images, and the true targets."""
        raise NotImplementedError

    def get_retrieval_rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Of what was stored, the predictions (images, ...) that are compared with targets."""
        raise NotImplementedError


class TokenSystem(System):
    """Predicted CLIP tokens condition a generator."""

    target_name = "clip_tokens"

    def __init__(self, generator: ImageGenerator, **common: Any):
        super().__init__(**common)
        self.generator = generator
        assert self.main.high is not None
        self.shape: tuple[int, int] = tuple(self.main.high.config["tokens"])
        draws_prior = self.parameters["prior"] and self.main.name == "network"
        # samples of the prior are random: the projected tokens are compared instead
        self.compared = "projected" if draws_prior else "tokens"

    def describe(self) -> str:
        """(tokens, dim), generator and its guidance."""
        guidance = self.parameters["guidance_scale"] or self.generator.guidance
        kind = type(self.generator).__name__
        return f"(tokens, dim) = {self.shape}: {kind}, guidance {guidance}"

    def _predict(self, level: Level, voxels: np.ndarray, ids: np.ndarray, **sampling: Any) -> Any:
        p = self.parameters
        options = PriorSampling(
            timesteps=p["prior_steps"],
            seed=p["seed"],
            shared_noise=p["same_seed"],
            solver=p["prior_solver"],
            **sampling,
        )
        return predict_tokens(level.network, voxels, self.shape, options, ids, device=self.device)

    def predict_tokens(
        self, decoder: Decoder, rows: slice, use_prior: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Voxels of some test images -> tokens and projected tokens.

        Args:
            decoder: with a high level.
            rows: of the test images.
            use_prior: sample the prior; by default as parameter prior says. Without it there is
                one sample, the tokens that the backbone predicts.
        """
        assert decoder.high is not None
        if use_prior is None:
            use_prior = self.parameters["prior"]
        ids, voxels = self.seen.image_ids[rows], decoder.high.voxels[rows]
        n_samples = self.count_samples(decoder)
        return self._predict(decoder.high, voxels, ids, n_samples=n_samples, use_prior=use_prior)

    def _find_start(self, rows: slice, latents: Tensor | None) -> Tensor | None:
        """Latents that the generator begins at: of the low level, or of images that were given."""
        if self.start_images is None:
            return latents
        return self.autoencoder.encode(self.start_images[rows]).cpu()

    def generate(
        self, tokens: Tensor, rows: slice, latents: Tensor | None, n_samples: int
    ) -> Tensor:
        """Samples (images, n_samples, 3, height, width) of tokens (images, 1 or n_samples, tokens,
        dim), starting from latents (images, channels, h, w) where img2img_strength is below 1.
        """
        return self._generate(tokens, rows, self._find_start(rows, latents), n_samples)

    def _generate(
        self, tokens: Tensor, rows: slice, latents: Tensor | None, n_samples: int
    ) -> Tensor:
        p, ids = self.parameters, self.seen.image_ids[rows]
        if latents is not None and p["faithful_img2img"]:
            shape = self.generator.latent_shape
            noise = draw_latent_noise(ids, shape, p["seed"], n_samples, p["same_seed"])
            latents = self.generator.encode_published_start(latents, noise)
        return generate_images(
            self.generator,
            tokens,
            ids,
            latents,
            n_samples=n_samples,
            strength=p["img2img_strength"],
            guidance_scale=p["guidance_scale"],
            num_inference_steps=p["num_inference_steps"],
            seed=p["seed"],
            shared_noise=p["same_seed"],
            batch_size=p["generator_batch"],
        )

    def select(self, decoder: Decoder, rows: slice, projected: Tensor, samples: Tensor) -> Tensor:
        """Of the first recons_per_sample samples of each image the one whose CLIP tokens are
        nearest to the projected ones, or, with parameter selection brain, the one that makes the
        measured voxels most likely. Untrained networks know nothing of the brain, and are not
        helped by it.
        """
        samples = samples[:, : self.parameters["recons_per_sample"]]
        if self.choose_by_brain is None or not decoder.trained:
            return select_best(self._clip, projected, samples)[0]
        return self.choose_by_brain(decoder.repeats, rows, samples)

    @property
    def _clip(self) -> Clipper | PatchClip:
        assert isinstance(self.encoder, Clipper | PatchClip)
        return self.encoder

    def collect(
        self, decoder: Decoder, tokens: Tensor, projected: Tensor, latents: Tensor, samples: Tensor
    ) -> dict[str, Tensor]:
        """Tokens, projected tokens and low-level images of the decoders themselves; of the main one
        also how far its samples are spread, and samples to look at.
        """
        stored: dict[str, Tensor] = {}
        name = decoder.name
        is_itself = decoder.trained and not decoder.repeats
        if is_itself:
            stored |= {f"tokens_{name}": tokens[:, 0], f"projected_{name}": projected}
        if is_itself and latents is not None:
            stored[f"low_level_{name}"] = self.decode_latents(latents).half()
        if name == self.main.name and samples.shape[1] > 1:
            stored |= self._describe_samples(projected, samples)
        return stored

    def _describe_samples(self, projected: Tensor, samples: Tensor) -> dict[str, Tensor]:
        """Spread of the samples, the first one, the one that the tokens choose where the brain
        chooses, and samples to look at.
        """
        n_chosen, n_kept = self.parameters["recons_per_sample"], self.parameters["keep_samples"]
        stored = {"spread": compute_sample_spread(self._clip, samples)}
        if n_chosen > 1:
            stored["first_sample"] = samples[:, 0].half()
        if n_chosen > 1 and self.choose_by_brain is not None:
            chosen, _ = select_best(self._clip, projected, samples[:, :n_chosen])
            stored["chosen_by_tokens"] = chosen.half()
        if n_kept:
            stored["samples"] = samples[:, :n_kept].half()
        return stored

    def read_repeats(self) -> list[Tensor]:
        """Tokens (images, ...) of each repeat alone, in half precision: those that the generator is
        given, or, where the prior draws these at random, the projected ones.
        """
        high = self.main.high
        assert high is not None
        which = 1 if self.compared == "projected" else 0
        predictions = []
        for repeat in range(self.seen.n_repeats):
            voxels = self.seen.read_repeat(high.path, repeat)
            ids = self.seen.image_ids
            predicted = self._predict(high, voxels, ids, n_samples=1, use_prior=False)
            predictions.append(predicted[which].half())
        return predictions

    def predict_held_out(self, decoder: Decoder, voxels: np.ndarray, ids: np.ndarray) -> Tensor:
        """Projected tokens (images, tokens, dim) of other images than the test images."""
        assert decoder.high is not None
        sampling = PriorSampling(use_prior=False)
        network = decoder.high.network
        return predict_tokens(network, voxels, self.shape, sampling, ids, device=self.device)[1]

    def generate_upper_bound(self, rows: slice) -> dict[str, Tensor]:
        """The generator on the true tokens and the true latents, as many samples as the system has,
        the nearest to the true tokens chosen; and what the autoencoder keeps of the images.
        """
        pixels = self.seen.pixels[rows]
        latents = self.autoencoder.encode(pixels).cpu()
        tokens = self._clip.embed_image(pixels).view(-1, 1, *self.shape).cpu()
        samples = self._generate(tokens, rows, latents, self.parameters["recons_per_sample"])
        return {
            "ceiling": select_best(self._clip, tokens[:, 0], samples)[0].half(),
            "autoencoder": self.decode_latents(latents).half(),
            "true_tokens": tokens[:, 0],
        }

    def get_retrieval_rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The projected tokens of the main decoder."""
        return tensors[f"projected_{self.main.name}"]


class UnclipSystem(TokenSystem):
    """MindEye2: patch tokens to unCLIP."""

    target_name = "patch_tokens"

    def __init__(self, learn_converter: ConverterTraining, weights: str, **common: Any):
        # the blurry latents are of Stable Diffusion's autoencoder
        side = 0 if weights == "mini" else 224
        autoencoder = LatentAutoencoder(weights, "image_variation", side, common["device"])
        super().__init__(**common | {"autoencoder": autoencoder})
        assert isinstance(self.encoder, PatchClip)
        read = PatchClip(weights, "bigG", self.device, self.encoder.squeezed)
        self.converter, self.converter_r2 = None, float("nan")
        if read.target_shape != self.encoder.target_shape:
            self.converter, self.converter_r2 = learn_converter(self.encoder, read)

    def describe(self) -> str:
        """As of a `TokenSystem`; also how well tokens are converted, where they are."""
        text = super().describe()
        if self.converter is None:
            return text
        return f"{text}; R2 of the tokens converted for it {self.converter_r2:.3f}"

    def _generate(
        self, tokens: Tensor, rows: slice, latents: Tensor | None, n_samples: int
    ) -> Tensor:
        start = None
        if latents is not None and self.parameters["img2img_strength"] < 1:
            start = self.generator.encode(self.autoencoder.decode(latents))
        if self.converter is not None:
            flat = self.converter(tokens.to(self.device).flatten(0, 1))
            tokens = flat.unflatten(0, tokens.shape[:2]).cpu()
        return super()._generate(tokens, rows, start, n_samples)


class LatentSystem(System):
    """No tokens and no generator: the decoded latent is the reconstruction, its only sample."""

    target_name = "vae_latents"

    def describe(self) -> str:
        """(channels, height, width) of a latent."""
        shape = self.autoencoder.latent_shape
        return f"(channels, height, width) of a latent = {shape}: no generator"

    def predict_tokens(
        self, decoder: Decoder, rows: slice, use_prior: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """No tokens: (images, 1, 0, 0) and (images, 0, 0)."""
        n = len(self.seen.image_ids[rows])
        return torch.empty(n, 1, 0, 0), torch.empty(n, 0, 0)

    def generate(
        self, tokens: Tensor, rows: slice, latents: Tensor | None, n_samples: int
    ) -> Tensor:
        """The decoded latents as one sample of each image (images, 1, 3, height, width)."""
        assert latents is not None
        return self.decode_latents(latents)[:, None]

    def select(self, decoder: Decoder, rows: slice, projected: Tensor, samples: Tensor) -> Tensor:
        """The only sample."""
        return samples[:, 0]

    def collect(
        self, decoder: Decoder, tokens: Tensor, projected: Tensor, latents: Tensor, samples: Tensor
    ) -> dict[str, Tensor]:
        """The latents (images, features)."""
        return {f"latents_{decoder.name}": latents.flatten(1)}

    def generate_upper_bound(self, rows: slice) -> dict[str, Tensor]:
        """What the autoencoder keeps of the images."""
        latents = self.autoencoder.encode(self.seen.pixels[rows]).cpu()
        return {"ceiling": self.decode_latents(latents).half()}

    def get_retrieval_rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The latents of the main decoder."""
        return tensors[f"latents_{self.main.name}"]


def open_system(
    run: Run,
    seen: SeenImages,
    main: Decoder,
    learn_converter: ConverterTraining,
    choose_by_brain: BrainChoice | None = None,
) -> System:
    """Load the frozen models of a run and say which kind of system it is.

    Args:
        run: with the parameters of notebook 03.
        seen: the test images.
        main: the decoder that is scored; what it predicts decides.
        learn_converter: called where the generator reads other tokens than are predicted.
        choose_by_brain: chooses samples in place of their tokens.
    """
    p = run.parameters
    weights, device = str(p["weights"]), run.device
    common: dict[str, Any] = {"seen": seen, "main": main, "parameters": p, "device": device}
    if main.high is None:
        assert main.low is not None
        options = main.low.config.get("autoencoder", {})
        autoencoder = LatentAutoencoder(weights, device=device, **options)
        return LatentSystem(**common, autoencoder=autoencoder, encoder=autoencoder)
    clip = load_encoder(main.high.config, weights, device)
    generator = load_generator(main.high.config["tokens"][0], weights, device, clip)
    common |= {"choose_by_brain": choose_by_brain, "start_images": load_start_images(run, seen)}
    common |= {"generator": generator, "autoencoder": generator, "encoder": clip}
    if isinstance(clip, PatchClip):
        return UnclipSystem(learn_converter, weights, **common)
    return TokenSystem(**common)


def load_start_images(run: Run, seen: SeenImages) -> Tensor | None:
    """The images (images, 3, height, width) that parameter start_run found; None without one.

    Raises:
        PerceptError: if untrained networks are asked for, or the run has no such images.
    """
    p = run.parameters
    if not p["start_run"]:
        return None
    folder = utils.HOME / "results" / str(p["start_run"])
    images = load_condition(folder, "retrieved", seen.image_ids)
    if p["untrained"]:
        raise PerceptError(
            "The untrained floor knows nothing of the brain, and pictures retrieved by what it says"
            " would tell it: with start_run set untrained to False."
        )
    return images
