"""What notebook 06 does around its scores: the images, the networks that metrics look through, what
is scored beside the images, and what is written.

- `material`: seen images and reconstructions, of a run or anyone's, and what looks wrong in them.
- `instruments`: metrics with their networks.
- `within`, `ceiling`, `brain`, `captions`: scores beside those of the images, each a `Part` with
  its records, its lines of the table of scores and a sentence.
- `tables`: tables for a reader.
- `outputs`: the selection log, the published tables, the report.
"""

from src.evaluation.scoring.brain import score_brain_correlation
from src.evaluation.scoring.captions import CaptionScores, score_captions
from src.evaluation.scoring.ceiling import score_token_correlation
from src.evaluation.scoring.instruments import Instruments, open_instruments
from src.evaluation.scoring.material import (
    Material,
    add_other_recon,
    load_material,
    split_by_condition,
)
from src.evaluation.scoring.outputs import (
    describe_scores,
    draw_figures,
    list_choices,
    list_published_values,
    make_gallery,
    write_published_tables,
)
from src.evaluation.scoring.parts import Part, list_beneath_baselines
from src.evaluation.scoring.tables import find_table, make_tables
from src.evaluation.scoring.within import score_within_groups

__all__ = [
    "CaptionScores",
    "Instruments",
    "Material",
    "Part",
    "add_other_recon",
    "describe_scores",
    "draw_figures",
    "find_table",
    "list_beneath_baselines",
    "list_choices",
    "list_published_values",
    "load_material",
    "make_gallery",
    "make_tables",
    "open_instruments",
    "score_brain_correlation",
    "score_captions",
    "score_token_correlation",
    "score_within_groups",
    "split_by_condition",
    "write_published_tables",
]
