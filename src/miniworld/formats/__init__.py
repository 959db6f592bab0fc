"""Writers of the source formats: the mini world as each reader expects its files.

Each module has one `write(...)`, the inverse of the reader of the same name in `src.readers`. To
add a format, add a module and name its function in WRITERS. Writers of fMRI data sets are called
`write(source, subj, data, **options)` with a `SourceData`.
"""

from collections.abc import Callable
from typing import Any

from src.miniworld.formats import (
    algonauts,
    bids,
    bold5000,
    digits69,
    god,
    laion_fmri,
    mindeye,
    mindeye2,
    mosaic,
    npz,
    nsd,
    nsd_evaluation,
    things,
)
from src.miniworld.formats.source_data import SourceData

WRITERS: dict[str, Callable[..., Any]] = {
    "mindeye": mindeye.write,
    "mindeye2": mindeye2.write,
    "nsd": nsd.write,
    "algonauts": algonauts.write,
    "bold5000": bold5000.write,
    "god": god.write,
    "things": things.write,
    "bids": bids.write,
    "laion_fmri": laion_fmri.write,
    "mosaic": mosaic.write,
    "nsd_synthetic": nsd_evaluation.write_synthetic,
    "nsd_imagery": nsd_evaluation.write_imagery,
    "digits69": digits69.write,
    "npz": npz.write,
}

__all__ = ["WRITERS", "SourceData"]
