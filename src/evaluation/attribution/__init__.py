"""Which voxels and regions a decoder's predictions rest on: integrated gradients of their
similarity to the truth, and permutation of regions.

- What is explained is a decoder, not the brain: what it does not use may carry the same
  information, and voxels with the same information share the credit.
- Networks and ridge baselines are treated the same: a `Level` is a decoder as a function of
  z-scored voxels, components included.
- Regions are disjoint here (`partition_voxels`), so that shares add up; both methods index the
  voxels that the decoder was given, not those of the subject.
- Permutation looks at test images in the way that scores do: it measures, and chooses nothing.
"""

from src.evaluation.attribution.gradients import Attribution, integrated_gradients
from src.evaluation.attribution.importance import (
    Importance,
    permutation_importance,
    permute_region,
)
from src.evaluation.attribution.level import SIMILARITIES, Level, open_level
from src.evaluation.attribution.probes import fit_probes, naming_score
from src.evaluation.attribution.regions import (
    EARLY_AREAS,
    NO_REGION,
    group_regions,
    partition_voxels,
)
from src.evaluation.attribution.tables import (
    attribution_table,
    bootstrap_share,
    describe_importance,
    importance_table,
    share_of_higher,
    voxel_table,
)

__all__ = [
    "EARLY_AREAS",
    "NO_REGION",
    "SIMILARITIES",
    "Attribution",
    "Importance",
    "Level",
    "attribution_table",
    "bootstrap_share",
    "describe_importance",
    "fit_probes",
    "group_regions",
    "importance_table",
    "integrated_gradients",
    "naming_score",
    "open_level",
    "partition_voxels",
    "permutation_importance",
    "permute_region",
    "share_of_higher",
    "voxel_table",
]
