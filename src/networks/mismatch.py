"""What keeps a state dict from fitting a network, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from src.utils import PerceptError

MISSING, UNEXPECTED, RESHAPED = "missing", "unexpected", "of another shape"

FRESH_IN_LAION = ("net.null_text_encodings", "net.null_text_embeds", "net.null_image_embed")

_LISTED_KEYS = 3  # keys of a mismatch that a message lists; the others are counted


@dataclass(frozen=True)
class _Advice:
    """What to do if a mismatch consists of exactly the keys that match a pattern."""

    kind: str
    pattern: str
    text: str

    def fits(self, mismatch: Mapping[str, list[str]], keys: Iterable[str]) -> bool:
        """Whether `mismatch` is of this kind alone, and holds all of `keys` that match."""
        matching = [key for key in keys if re.match(self.pattern, key)]
        return mismatch == {self.kind: matching}


_DEFAULT_ADVICE = (
    "take the file of this very model, or let load_decoder make the network that the file holds"
)

_ADVICE = [
    _Advice(
        RESHAPED,
        r"(voxel2clip\.)?lin0\.0\.weight",
        "it was trained on other voxels: take the file of this subject",
    ),
    _Advice(UNEXPECTED, r"maps_projector\.", "make the network with use_cont=True"),
    _Advice(MISSING, r"maps_projector\.", "make the network with use_cont=False"),
    _Advice(UNEXPECTED, r"voxel2clip\.", "make the prior with its voxel2clip"),
    _Advice(
        MISSING,
        r"voxel2clip\.",
        "the file holds a prior alone: make it without voxel2clip",
    ),
    _Advice(
        MISSING,
        r"voxel2clip\.|" + "|".join(FRESH_IN_LAION),
        "if this is LAION's prior, use load_laion_prior",
    ),
]


def describe_mismatch(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, list[str]]:
    """What keeps a state dict from fitting a network.

    Returns:
        The keys that are "missing", "unexpected" or "of another shape"; each kind only where there
        are any.
    """
    expected = network.state_dict()
    common = [key for key in expected if key in state]
    mismatch = {
        MISSING: [key for key in expected if key not in state],
        UNEXPECTED: [key for key in state if key not in expected],
        RESHAPED: [key for key in common if expected[key].shape != state[key].shape],
    }
    return {kind: keys for kind, keys in mismatch.items() if keys}


def check_fits(state: Mapping[str, Tensor], network: nn.Module, origin: str) -> None:
    """Refuse a state dict that is not exactly the network's.

    Args:
        state: weights by key.
        network: the network that is to take them.
        origin: what the message calls the state dict, e.g. its file.

    Raises:
        PerceptError: with a few keys of each kind of mismatch, the number of the others, and what
            to do.
    """
    mismatch = describe_mismatch(state, network)
    if not mismatch:
        return
    expected = network.state_dict()
    parts = []
    for kind, keys in mismatch.items():
        listed = keys[:_LISTED_KEYS]
        if kind == RESHAPED:
            listed = [
                f"{key} {_format_shape(state[key])} for {_format_shape(expected[key])}"
                for key in listed
            ]
        rest = len(keys) - len(listed)
        more = f" and {rest} more" if rest else ""
        parts.append(f"{len(keys)} {kind} ({', '.join(listed)}{more})")
    raise PerceptError(
        f"{origin} does not fit {type(network).__name__} with its {len(expected)} keys:"
        f" {', '.join(parts)}; {_find_advice(mismatch, state, expected)}."
    )


def _find_advice(
    mismatch: Mapping[str, list[str]], state: Iterable[str], expected: Iterable[str]
) -> str:
    """What to do about a mismatch; of several that fit, the last."""
    fitting = [_DEFAULT_ADVICE]
    for advice in _ADVICE:
        keys = state if advice.kind == UNEXPECTED else expected
        if advice.fits(mismatch, keys):
            fitting.append(advice.text)
    return fitting[-1]


def _format_shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "a number"
