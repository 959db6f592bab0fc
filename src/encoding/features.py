"""Feature spaces of images, by name: what an encoding model predicts voxels from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.data.subject import Subject
from src.encoding.gabor import GaborPyramid
from src.pretrained import METRIC_NETWORKS, FeatureNetwork, load_gnet, prepare_gnet_images
from src.utils import PerceptError, progress

# uint8 images (n, height, width, 3) -> features float32 (n, features)
Extractor = Callable[[np.ndarray], np.ndarray]

BATCH = 256  # images at once


@dataclass(frozen=True)
class FeatureSpace:
    """How a feature space enters an encoding model.

    Attributes:
        n_components: principal components that are kept, at most; 0 for all.
        standardise: whether each feature is divided by its standard deviation first, where
            features of one space have different scales.
    """

    n_components: int = 400
    standardise: bool = True


FEATURE_SPACES = {
    "tokens": FeatureSpace(400, standardise=False),
    "gabor": FeatureSpace(700),
    "captions": FeatureSpace(400, standardise=False),
    "categories": FeatureSpace(0, standardise=False),
    "gnet": FeatureSpace(700),
}


def compute_features(
    names: Sequence[str],
    images: np.ndarray,
    tokens: Mapping[str, Any] | None = None,
    extractors: Mapping[str, Extractor] | None = None,
) -> dict[str, np.ndarray]:
    """Features of images in each of several spaces.

    Args:
        names: of the spaces, each of which is in `tokens`, in `extractors`, or is "gabor".
        images: uint8 (n, height, width, 3).
        tokens: what is known of these images already, by name, (n, ...) each: "tokens" (CLIP's, as
            they are cached as targets), "captions", "categories".
        extractors: by name what computes features from images: `build_gnet_extractor`,
            `build_layer_extractor`, or any function of your own.

    Returns:
        float32 (n, features) by name, in the order of `names`.

    Raises:
        PerceptError: for a name that is not known, numbers of rows that differ from that of the
            images, or values that are not finite.
    """
    known_features = tokens or {}
    computed: dict[str, Extractor] = {"gabor": extract_gabor, **(extractors or {})}
    features = {}
    for name in names:
        if name in known_features:
            rows = np.asarray(known_features[name])
        elif name in computed:
            rows = np.asarray(computed[name](images))
        else:
            choices = ", ".join(sorted({*known_features, *computed}))
            raise PerceptError(
                f"Feature space '{name}' is neither given nor can it be computed: choose among"
                f" {choices}, or pass an extractor of that name."
            )
        if len(rows) != len(images):
            raise PerceptError(
                f"Feature space '{name}' has {len(rows)} rows for {len(images)} images: give one"
                " row an image, in the same order."
            )
        rows = rows.reshape(len(rows), -1).astype(np.float32, copy=False)
        if not np.isfinite(rows).all():
            raise PerceptError(
                f"Feature space '{name}' holds values that are not finite: compute it again, in"
                " single precision."
            )
        features[name] = rows
    return features


def extract_gabor(images: np.ndarray) -> np.ndarray:
    """Features of `GaborPyramid` at its default size: float32 (n, 5460)."""
    return _extract(GaborPyramid(), images, "Gabor energies")


def build_extractors(
    names: Sequence[str], weights: str = "hub", subj: int = 1, device: str = "cpu"
) -> dict[str, Extractor]:
    """Extractors of those feature spaces that need a frozen network's weights, by name.

    Args:
        names: of feature spaces: "gnet", or a key of METRIC_NETWORKS ("AlexNet(5)", "SwAV"); other
            names need none and are passed over. Scores that the same network computes are no
            longer independent of the encoding model.
        weights: "hub", "mini" or a folder that holds the networks.
        subj: a subject that the file of GNet has.
        device: torch device.
    """
    extractors: dict[str, Extractor] = {}
    for name in names:
        if name == "gnet":
            extractors[name] = build_gnet_extractor(weights, subj, device)
        elif name in METRIC_NETWORKS:
            network = FeatureNetwork(name, weights, device)
            extractors[name] = _build_network_extractor(network)
    return extractors


def _build_network_extractor(network: FeatureNetwork) -> Extractor:
    def extract(images: np.ndarray) -> np.ndarray:
        return network(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    return extract


def build_gnet_extractor(
    weights: str = "hub", subj: int = 1, device: str = "cpu", grid: int = 4
) -> Extractor:
    """What computes the feature maps of GNet's trunk, which was trained to predict voxels.

    Args:
        weights: as for `load_gnet`.
        subj: a subject that the file has; the trunk is that of all subjects.
        device: torch device.
        grid: each map is averaged over the cells of a grid with this many cells a side.
    """
    trunk = load_gnet(weights, subj, device).trunk

    def extract(images: np.ndarray) -> np.ndarray:
        rows = []
        for start in progress(range(0, len(images), BATCH), "GNet features"):
            batch = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2)
            prepared = prepare_gnet_images(batch, trunk.config["input_size"])
            with torch.inference_mode():
                maps = trunk(prepared.to(device))
            rows.append(_pool_maps(maps, grid).cpu().numpy())
        return np.concatenate(rows)

    return extract


def build_layer_extractor(
    network: nn.Module,
    layers: Sequence[str],
    prepare: Callable[[Tensor], Tensor] | None = None,
    grid: int = 4,
) -> Extractor:
    """What computes the activations of some layers of any frozen network.

    Args:
        network: called with prepared images; in eval mode, on its device.
        layers: names of modules as `named_modules` gives them, e.g. "features.4".
        prepare: images (n, 3, height, width) in [0, 1] -> what the network is called with; by
            default as they are.
        grid: a feature map (n, channels, height, width) is averaged over a grid with this many
            cells a side; tokens (n, tokens, dim) and vectors stay as they are.

    Raises:
        PerceptError: if the network has no such layer.
    """
    modules = dict(network.named_modules())
    missing = [name for name in layers if name not in modules]
    if missing or not layers:
        raise PerceptError(
            f"The network has no layer {', '.join(missing) or '(none was named)'}: choose among"
            f" {', '.join(list(modules)[1:20])}."
        )
    place = next(iter(network.parameters()), torch.empty(0)).device

    def extract(images: np.ndarray) -> np.ndarray:
        rows = []
        for start in progress(range(0, len(images), BATCH), "features of layers"):
            batch = _to_pixels(images[start : start + BATCH]).to(place)
            batch = batch if prepare is None else prepare(batch)
            rows.append(_pool_maps(_run_until(network, modules, layers, batch), grid).cpu().numpy())
        return np.concatenate(rows)

    return extract


def _run_until(
    network: nn.Module, modules: Mapping[str, nn.Module], layers: Sequence[str], batch: Tensor
) -> list[Tensor]:
    """Outputs of the layers for one batch, in the order of `layers`."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        with torch.inference_mode():
            network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [outputs[name] for name in layers]


def _pool_maps(maps: Sequence[Tensor], grid: int) -> Tensor:
    """Feature maps, or tokens or vectors, as one row an image, float32 (n, features)."""
    parts = []
    for activation in maps:
        if activation.ndim == 4 and activation.shape[-1] > grid:
            activation = F.adaptive_avg_pool2d(activation.float(), grid)
        parts.append(activation.float().flatten(1))
    return torch.cat(parts, 1)


def _extract(network: nn.Module, images: np.ndarray, what: str) -> np.ndarray:
    """Rows of a network that takes images (n, 3, height, width) in [0, 1]."""
    rows = []
    for start in progress(range(0, len(images), BATCH), what):
        with torch.inference_mode():
            rows.append(network(_to_pixels(images[start : start + BATCH])).cpu().numpy())
    return np.concatenate(rows)


def _to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (n, height, width, 3) -> float32 (n, 3, height, width) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def look_up_features(
    subject: Subject,
    names: Sequence[str],
    image_ids: np.ndarray,
    tokens: Any,
    embed_text: Callable[[list[str]], Any],
) -> dict[str, np.ndarray]:
    """What is stored or told of a subject's images, for `compute_features`.

    Args:
        subject: with its captions and labels.
        names: of feature spaces, of which "tokens", "captions" and "categories" are looked up.
        image_ids: (n,) images.
        tokens: CLIP tokens, a `TargetCache`.
        embed_text: sentences -> (sentences, dim).

    Raises:
        PerceptError: if the data set has no captions or labels.
    """
    stored = {"captions": subject.captions, "categories": subject.labels}
    missing = [name for name in names if name in stored and stored[name] is None]
    if missing:
        raise PerceptError(
            f"The images of {subject.folder.name} come without {missing[0]}: leave"
            f" '{missing[0]}' out of the feature spaces."
        )
    features = {}
    if "tokens" in names:
        features["tokens"] = tokens.rows(image_ids)
    if "categories" in names and subject.labels is not None:
        features["categories"] = embed_categories(subject.labels, image_ids)
    if "captions" in names and subject.captions is not None:
        features["captions"] = embed_captions(subject.captions, image_ids, embed_text)
    return features


def embed_categories(labels: pd.DataFrame, image_ids: np.ndarray) -> np.ndarray:
    """Labels as indicators: a column for each value of each kind of category.

    Args:
        labels: column image and one column a kind of category (`Subject.labels`).
        image_ids: (n,) images.

    Returns:
        float32 (n, values of all kinds), 1 where an image has the value. The columns are those of
        the whole table, so that they are the same for all images of a data set.

    Raises:
        PerceptError: for an image without labels.
    """
    table = labels.set_index("image")
    table = table[~table.index.duplicated()]
    missing = np.setdiff1d(image_ids, table.index.to_numpy())
    if len(missing):
        raise PerceptError(
            f"Image {missing[0]} has no labels ({len(missing)} images have none): leave"
            " 'categories' out of the feature spaces."
        )
    indicators = pd.get_dummies(table.astype(str), dtype=np.float32)
    return indicators.loc[np.asarray(image_ids)].to_numpy(np.float32)


def embed_captions(
    captions: pd.DataFrame,
    image_ids: np.ndarray,
    embed_text: Callable[[list[str]], Any],
) -> np.ndarray:
    """Mean text embedding of the captions of each image, at unit length each.

    Args:
        captions: columns image and caption, several rows an image (`Subject.captions`).
        image_ids: (n,) images.
        embed_text: sentences -> (sentences, dim), e.g. `Clipper.embed_text`.

    Returns:
        float32 (n, dim).

    Raises:
        PerceptError: for an image without a caption.
    """
    needed = captions[captions["image"].isin(image_ids)]
    missing = np.setdiff1d(image_ids, needed["image"].to_numpy())
    if len(missing):
        raise PerceptError(
            f"Image {missing[0]} has no caption ({len(missing)} images have none): leave"
            " 'captions' out of the feature spaces."
        )
    sentences, codes = np.unique(needed["caption"].astype(str), return_inverse=True)
    blocks = []
    for start in progress(range(0, len(sentences), BATCH), "captions"):
        block = torch.as_tensor(embed_text(list(sentences[start : start + BATCH]))).float()
        blocks.append(F.normalize(block.reshape(len(block), -1), dim=1).cpu().numpy())
    embedded = pd.DataFrame(np.concatenate(blocks)[codes], index=needed["image"].to_numpy())
    means = embedded.groupby(level=0).mean()
    return means.loc[np.asarray(image_ids)].to_numpy(np.float32)
