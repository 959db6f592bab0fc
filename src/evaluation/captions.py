"""Scores of captions: what each metric says of one caption and what people wrote of the same image.

- Every metric is a `Metric` of src/metrics.py that compares sentences instead of pictures, so
  intervals, shuffled pairings and floors are taken as everywhere (`results.score_table` with
  references for images and captions for pictures).
- The numbers come from the field's libraries, and what each does is in its description: nltk
  (METEOR, BLEU), rouge_score (ROUGE), pycocoevalcap (CIDEr, and BLEU of all captions together; only
  what needs no Java), sentence_transformers, and CLIP's text encoder. None of them fetches anything
  here but the two that look through a network, with `weights` "hub". They are imported where they
  are used: they take seconds.
- With several references METEOR, ROUGE and the cosines take the one that fits best, BLEU and CIDEr
  have rules of their own for them. The published evaluation (MindEye2, arXiv 2403.11207) has one
  reference an image.
- METEOR needs WordNet, which no package of PyPI holds. Without it METEOR is not computed, as
  without synonyms it would be another score under the same name.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from src.evaluation.statistics import CONFIDENCE, Interval, bootstrap_mean
from src.metrics import Metric
from src.pretrained.clip import Clipper
from src.utils import ROOT, PerceptError

MINI = ROOT / "data" / "mini_models"

SENTENCE_HUB = "sentence-transformers/all-MiniLM-L6-v2"

WORDNET = Path("/usr/share/wordnet")  # where Debian's package wordnet-base puts it

CLIPS = {"CLIP-B text": "ViT-B/32", "CLIP-L text": "ViT-L/14"}

UNSPOKEN = {
    "''",
    "'",
    "``",
    "`",
    '"',
    ".",
    "?",
    "!",
    ",",
    ":",
    "-",
    "--",
    "...",
    ";",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
}  # of no weight in COCO's evaluation

PAIRINGS = {  # as published: what is scored against what
    "img_ref": ("git_image", "reference"),
    "brain_ref": ("brain", "reference"),
    "brain_img": ("brain", "git_image"),
}


def to_text_lists(texts: Any) -> list[list[str]]:
    """Captions (n,), or several for each image, as n lists.

    Raises:
        PerceptError: an image without any, or something that is no text.
    """
    lists = [[some] if isinstance(some, str) else list(some) for some in texts]
    for i, some in enumerate(lists):
        if not some or not all(isinstance(text, str) for text in some):
            raise PerceptError(
                f"The captions of image {i} are {some!r}: give each image one text or a list of"
                " texts, at least one."
            )
    return lists


def _pairs(references: Any, captions: Any, pairing: Any = None) -> Iterator[tuple[Any, Any]]:
    """(references, caption) of each image; with a pairing (n,) the references of the image that it
    names.
    """
    if len(references) != len(captions):
        raise PerceptError(
            f"{len(captions)} captions were given for {len(references)} images: give one each, in"
            " the same order."
        )
    order = np.arange(len(captions)) if pairing is None else np.asarray(pairing)
    if len(order) != len(captions):
        raise PerceptError(
            f"A pairing of {len(order)} was given for {len(captions)} captions; give each the"
            " number of one image."
        )
    for i, some in enumerate(captions):
        if len(some) != 1:
            raise PerceptError(
                f"Image {i} has {len(some)} captions to be scored: give one; several may only stand"
                " among the references."
            )
        yield references[order[i]], some[0]


def tokenize_words(text: str) -> list[str]:
    """Tokens of the Penn Treebank, marks and capitals kept, as METEOR's published evaluation takes
    them.

    nltk's `word_tokenize` finds sentences first, with data that no package holds; here a sentence
    ends at a mark before a space, which differs for abbreviations only.
    """
    from nltk.tokenize import NLTKWordTokenizer

    tokenize = NLTKWordTokenizer().tokenize
    return [
        word for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) for word in tokenize(sentence)
    ]


def tokenize_lowercase(text: str) -> list[str]:
    """Tokens of the Penn Treebank in lower case without marks: what COCO's evaluation gives BLEU
    and CIDEr (there by a Java program).
    """
    return [word for word in tokenize_words(text.lower()) if word not in UNSPOKEN]


def find_wordnet_folder() -> Path | None:
    """Where WordNet 3.0 lies: the environment variable PERCEPT_WORDNET, nltk's own data
    (NLTK_DATA), Debian's package; None where it is not.
    """
    import nltk

    if given := os.environ.get("PERCEPT_WORDNET"):
        if not (Path(given) / "data.noun").exists():
            raise PerceptError(
                f"PERCEPT_WORDNET is {given}, which holds no WordNet (data.noun): set it to the"
                " folder of its files, or unset it."
            )
        return Path(given)
    known = [Path(folder) / "corpora" / "wordnet" for folder in nltk.data.path]
    return next((folder for folder in [*known, WORDNET] if (folder / "data.noun").exists()), None)


@lru_cache(maxsize=2)
def _wordnet(folder: Path) -> Any:
    """nltk's reader of WordNet's files, of which Debian's package has all that synonyms depend on,
    and not those of names and senses.
    """
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        def open(self, file: str) -> Any:
            return (
                io.StringIO("".join(f"{i:02d} unnamed 0\n" for i in range(45)))
                if file == "lexnames"
                else super().open(file)
            )

        def map_wn(self, version: str = "wordnet") -> None:
            """No map to other versions, which only other languages need, and the file that it is
            made of lacks too.
            """

    if str(folder) not in nltk.data.path:
        nltk.data.path.append(
            str(folder)
        )  # nltk reads from folders that it was told of, and from no others
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it speaks no other languages
        return Reader(nltk.data.FileSystemPathPointer(str(folder)), None)


def load_wordnet() -> Any:
    """nltk's reader of the WordNet that is installed.

    Raises:
        PerceptError: there is none.
    """
    folder = find_wordnet_folder()
    if folder is None:
        raise PerceptError(
            "METEOR needs WordNet, which is not here: install Debian's package wordnet-base"
            " (apt-get install wordnet-base), or put WordNet 3.0 into corpora/wordnet of a folder"
            " that NLTK_DATA names, or set PERCEPT_WORDNET to the folder of its files."
        )
    return _wordnet(folder)


def meteor(references: Any, captions: Any, pairing: Any = None) -> np.ndarray:
    """METEOR by exact words, stems and synonyms, alpha .9, beta 3, gamma .5: nltk's `meteor_score`,
    as the package `evaluate` calls it, (n,) in [0, 1].
    """
    from nltk.translate.meteor_score import meteor_score

    reader, words = load_wordnet(), lru_cache(maxsize=None)(tokenize_words)
    return np.array(
        [
            meteor_score([words(text) for text in some], words(said), wordnet=reader)
            for some, said in _pairs(references, captions, pairing)
        ]
    )


def _rouge(kind: str) -> Callable[..., np.ndarray]:
    def compare(references: Any, captions: Any, pairing: Any = None) -> np.ndarray:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=False)
        return np.array(
            [
                scorer.score_multi(some, said)[kind].fmeasure
                for some, said in _pairs(references, captions, pairing)
            ]
        )

    return compare


def _bleu(n: int) -> Callable[..., np.ndarray]:
    def compare(references: Any, captions: Any, pairing: Any = None) -> np.ndarray:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

        smooth, weights, words = (
            SmoothingFunction().method2,
            (1 / n,) * n,
            lru_cache(maxsize=None)(tokenize_lowercase),
        )
        pairs = _pairs(references, captions, pairing)
        return np.array(
            [
                sentence_bleu(
                    [words(text) for text in some], words(said), weights, smoothing_function=smooth
                )
                for some, said in pairs
            ],
            np.float64,
        )

    return compare


def corpus_bleu(references: Any, captions: Any, pairing: Any = None) -> dict[str, float]:
    """BLEU-1 to BLEU-4 of all captions together, without smoothing (Papineni et al. 2002):
    pycocoevalcap's `BleuScorer`, as COCO's evaluation.

    Args:
        references: (n,) texts, or lists of them.
        captions: (n,) texts.
        pairing: (n,) the image whose references each caption is held against; its own by default.

    Returns: {"BLEU-1": ..., "BLEU-4": ...} in [0, 1].
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer, words = (
        BleuScorer(n=4),
        lru_cache(maxsize=None)(lambda text: " ".join(tokenize_lowercase(text))),
    )
    for some, said in _pairs(to_text_lists(references), to_text_lists(captions), pairing):
        scorer.cook_append(words(said), [words(text) for text in some])
    return {
        f"BLEU-{n}": float(score)
        for n, score in enumerate(scorer.compute_score(option="closest", verbose=0)[0], 1)
    }


def cider(references: Any, captions: Any, pairing: Any = None) -> np.ndarray:
    """CIDEr-D of each caption, (n,) in [0, 10]: pycocoevalcap's `CiderScorer`, sigma 6, 1 to 4
    words.

    How rare a phrase is, is counted in the references of these very images: the score depends on
    the test set, and on how many references an image has.

    Raises:
        PerceptError: fewer than two images, of which no phrase could be called rare.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    if len(captions) < 2:
        raise PerceptError(
            "CIDEr weighs phrases by how rare they are among the images' references: it needs at"
            " least two images."
        )
    scorer, words = (
        CiderScorer(),
        lru_cache(maxsize=None)(lambda text: " ".join(tokenize_lowercase(text))),
    )
    for some, said in _pairs(references, captions, pairing):
        scorer.cook_append(words(said), [words(text) for text in some])
    with np.errstate(invalid="ignore"):
        return np.asarray(scorer.compute_score()[1], np.float64)


def embed_each_text(embed: Callable[[list[str]], Any]) -> Callable[[Any], list[np.ndarray]]:
    """What `Metric.through` takes, from a function that embeds sentences: texts (n,) or n lists ->
    n arrays (texts, dim) of unit length.

    Every sentence is embedded once, however often it occurs.
    """

    def prepare(texts: Any) -> list[np.ndarray]:
        lists = to_text_lists(texts)
        known = {
            text: i for i, text in enumerate(dict.fromkeys(text for some in lists for text in some))
        }
        names = list(known)
        rows = torch.cat(
            [
                torch.as_tensor(embed(names[i : i + 64])).detach().float().cpu()
                for i in range(0, len(names), 64)
            ]
        )
        rows = F.normalize(rows.double(), dim=1)
        return [rows[[known[text] for text in some]].numpy() for some in lists]

    return prepare


def _nearest(references: Any, captions: Any, pairing: Any = None) -> np.ndarray:
    """Cosine of each caption's embedding (1, dim) and the reference's that is nearest to it, (n,)."""
    pairs = _pairs(references, [[some] for some in captions], pairing)
    return np.array([(some @ said[0]).max() for some, said in pairs])


class SentenceEncoder:
    """Sentence embeddings: all-MiniLM-L6-v2, or the mini world's twin, through
    sentence_transformers.

    Args:
        weights: "hub", "mini" or a folder that holds `sentence/`, as `SentenceTransformer.save`
            writes it.
        device: torch device.

    Raises:
        PerceptError: the model is not there, or the hub cannot be reached.

    Source: Reimers & Gurevych 2019, arXiv 1908.10084.
    """

    def __init__(self, weights: str = "hub", device: str = "cpu"):
        self.weights, self.place = weights, SENTENCE_HUB
        if weights != "hub":
            folder = (MINI if weights == "mini" else Path(weights)) / "sentence"
            if not (folder / "modules.json").exists():
                hint = (
                    "restore data/mini_models from git"
                    if weights == "mini"
                    else f"put {SENTENCE_HUB} there, or set weights to 'hub' or 'mini'"
                )
                raise PerceptError(f"There are no sentence embeddings at {folder}: {hint}.")
            self.place = str(folder)
        from sentence_transformers import SentenceTransformer

        try:
            options = {
                "device": device,
                "local_files_only": weights != "hub",
                "model_kwargs": {"dtype": torch.float32},
            }
            self.model: Any = SentenceTransformer(self.place, **options).eval()  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise PerceptError(
                f"The sentence embeddings could not be loaded from '{self.place}'"
                f" ({str(error).splitlines()[0]}): check the connection to the hub, leave"
                " 'Sentence' out of caption_metrics, or set weights to 'mini' or to a folder that"
                " holds them."
            ) from error

    def embed(self, captions: Sequence[str]) -> np.ndarray:
        """Captions -> (captions, dim) float32."""
        return np.asarray(
            self.model.encode(list(captions), show_progress_bar=False, convert_to_numpy=True),
            np.float32,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Model, a hash of its weights where they lie here, and versions, for provenance."""
        files = sorted(Path(self.place).rglob("*.safetensors")) if self.weights != "hub" else []
        digest = (
            hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
            if files
            else "as the hub has it"
        )
        versions = {
            package: version(package)
            for package in ("sentence-transformers", "transformers", "torch")
        }
        return {
            "model": "mini:sentence" if self.weights == "mini" else self.place,
            "hash": digest,
            "versions": versions,
        }


_PUBLISHED = "MindEye2, arXiv 2403.11207, evaluation of captions"


def _through_network(name: str, network: str, source: str) -> Metric:
    def embed(texts: Any) -> Any:
        raise PerceptError(
            f"The metric {name} looks through {network}, which it was not given: use"
            f" CAPTION_METRICS['{name}'].through(embed_each_text(embed))."
        )

    return Metric(
        name,
        _nearest,
        "higher",
        None,
        f"cosine of the embeddings of caption and reference ({network})",
        source,
        embed,
        network=network,
    )


def _by_words(
    name: str, compare: Callable[..., np.ndarray], library: str, text: str, source: str
) -> Metric:
    return Metric(
        name,
        compare,
        "higher",
        None,
        f"{text} ({library} {version(library)})",
        source,
        to_text_lists,
    )


CAPTION_METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        _by_words(
            "METEOR",
            meteor,
            "nltk",
            "words, stems and WordNet's synonyms in common, and their order",
            f"Banerjee & Lavie 2005; {_PUBLISHED}",
        ),
        _by_words(
            "ROUGE-1",
            _rouge("rouge1"),
            "rouge-score",
            "F1 of single words, no stemming",
            f"Lin 2004; {_PUBLISHED}",
        ),
        _by_words(
            "ROUGE-2",
            _rouge("rouge2"),
            "rouge-score",
            "F1 of pairs of words, no stemming",
            "Lin 2004",
        ),
        _by_words(
            "ROUGE-L",
            _rouge("rougeL"),
            "rouge-score",
            "F1 of the longest common subsequence, no stemming",
            f"Lin 2004; {_PUBLISHED}",
        ),
        _through_network("Sentence", "all-MiniLM-L6-v2", f"Reimers & Gurevych 2019; {_PUBLISHED}"),
        _through_network("CLIP-B text", "CLIP ViT-B/32", _PUBLISHED),
        _through_network("CLIP-L text", "CLIP ViT-L/14", _PUBLISHED),
        *(
            _by_words(
                f"BLEU-{n}",
                _bleu(n),
                "nltk",
                f"sentence BLEU of 1 to {n} words, one added to each count from pairs on",
                "Papineni et al. 2002; Lin & Och 2004",
            )
            for n in range(1, 5)
        ),
        _by_words(
            "CIDEr",
            cider,
            "pycocoevalcap",
            "CIDEr-D; rarity of phrases counted in the references of the test set",
            "Vedantam et al. 2015, arXiv 1411.5726",
        ),
    )
}


def prepare_caption_metrics(
    names: str, weights: str, device: str = "cpu", clipper: Clipper | None = None
) -> tuple[list[Metric], dict[str, str], dict[str, Any]]:
    """The metrics of some names, with their networks.

    Args:
        names: of `CAPTION_METRICS`, separated by commas, or "all".
        weights: "hub", "mini" or a folder, of the networks; with "mini" their metrics are called
            "mini:".
        device: torch device of these.
        clipper: CLIP ViT-L/14 (or the mini one) where it is loaded already.

    Returns:
        The metrics; why others cannot be computed, a sentence by name; the fingerprints of the
        networks by name of the metric.

    Raises:
        PerceptError: an unknown name, or weights that are not to be had.
    """
    if names == "all":
        names = ",".join(CAPTION_METRICS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in CAPTION_METRICS]:
        raise PerceptError(
            f"caption_metrics names {', '.join(unknown)}: choose among"
            f" {', '.join(CAPTION_METRICS)}."
        )
    ready, missing, networks = [], {}, {}
    for name in wanted:
        metric = CAPTION_METRICS[name]
        if name == "METEOR":
            try:
                load_wordnet()
            except PerceptError as error:
                missing[name] = str(error)
                continue
        if name == "CLIP-B text" and weights == "mini":
            missing[name] = "The mini world has one CLIP, which stands for ViT-L/14."
            continue
        if metric.network:
            network, embed = _network(name, weights, device, clipper)
            networks[name] = network.fingerprint()
            metric = metric.through(embed_each_text(embed), "mini:" if weights == "mini" else "")
        ready.append(metric)
    return ready, missing, networks


def _network(
    name: str, weights: str, device: str, clipper: Clipper | None
) -> tuple[Any, Callable[..., Any]]:
    """The network of a metric, and its function that embeds captions."""
    if name == "Sentence":
        encoder = SentenceEncoder(weights, device)
        return encoder, encoder.embed
    variant = CLIPS[name]
    clip = (
        clipper
        if clipper is not None and clipper.variant == variant
        else Clipper(weights, hidden=False, norm_embs=True, device=device, variant=variant)
    )
    return clip, clip.embed_text


def read_captions(path: str | Path, image_ids: Any, references: str = "one") -> pd.DataFrame:
    """The captions that notebook 04 wrote, in the order of the test images.

    Args:
        path: of captions_brain.parquet, columns image, brain, git_image, reference and references
            (a JSON list each).
        image_ids: (n,) ids of the test images.
        references: "one" (as published) or "all"; what the column `reference` holds afterwards, a
            text or a list of texts.

    Returns: [brain, git_image, reference, ...] indexed by image.

    Raises:
        PerceptError: columns are missing, the captions are of other images, or an image has no
            reference.
    """
    table = pd.read_parquet(path)
    if missing := sorted(
        {"image", "brain", "git_image", "reference", "references"} - set(table.columns)
    ):
        raise PerceptError(f"{path} lacks the columns {', '.join(missing)}: run notebook 04 again.")
    if sorted(table["image"]) != sorted(image_ids):
        raise PerceptError(
            f"{path} holds captions of other images than those that were reconstructed: run"
            " notebook 04 again, after notebook 03."
        )
    table = table.set_index("image").loc[list(image_ids)]
    if (bare := table["reference"] == "").any():
        raise PerceptError(
            f"{bare.sum()} of {len(table)} test images have no caption written by a person:"
            " captions.parquet of the dataset must have one for each."
        )
    return (
        table.assign(reference=[json.loads(some) for some in table["references"]])
        if references == "all"
        else table
    )


def find_most_common_caption(captions: Sequence[str]) -> str:
    """The caption that occurs most often, of several the first in alphabetical order."""
    counts = pd.Series(list(captions)).value_counts()
    return str(min(counts.index[counts == counts.max()]))


def pair_captions(
    captions: pd.DataFrame, common: str
) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """What `results.score_table` takes, for the captions from the brain: {pairing: (references,
    rows)}.

    Rows: "system" the captions from the brain; "common_caption" the same sentence for every image;
    "ceiling" the captions that were written while looking at the images themselves (against
    themselves in "brain_img"); "true_tokens", where known, those of the true tokens.

    Args:
        captions: of `read_captions`.
        common: of `find_most_common_caption`, of training captions.
    """
    written = {
        "system": list(captions["brain"]),
        "common_caption": [common] * len(captions),
        "ceiling": list(captions["git_image"]),
    }
    if "ceiling" in captions:
        written["true_tokens"] = list(captions["ceiling"])
    return {
        name: (list(captions[PAIRINGS[name][1]]), written) for name in ("brain_ref", "brain_img")
    }


def relative(brain_img: Any, img_ref: Any, n_boot: int = 2000, seed: int = 0) -> Interval:
    """Mean of brain_img (n,) over mean of img_ref (n,), with a 95 % bootstrap interval over the
    images.

    How near captions from the brain come to those of the image, in units of how near these come to
    a person's.
    """
    a, b = np.asarray(brain_img, np.float64), np.asarray(img_ref, np.float64)
    if b.mean() <= 0:
        raise PerceptError(
            "The captions of the images score 0 against the references: nothing can be taken"
            " relative to that."
        )
    picks = np.random.default_rng(seed).integers(0, len(a), (n_boot, len(a)))
    below = b[picks].mean(1)
    ratios = a[picks].mean(1)[below > 0] / below[below > 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(a.mean() / b.mean()), float(low), float(high))


def caption_table(scored: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What captions score in the published pairings, beside their floors.

    Args:
        scored: `score_table` of each entry of `pair_captions`.

    Returns: [metric, pairing, value, low, high, n, shuffled, common_caption], for each metric the
    lines img_ref (what the captioner says of the image itself,
        against people), brain_ref, brain_img (the brain's against what the captioner says of the
        image) and relative (brain_img over img_ref; no floors).
    """
    lines = []
    values = {
        p: {key: part["value"].to_numpy() for key, part in t.groupby(["metric", "row"], sort=False)}
        for p, t in scored.items()
    }
    for metric in scored["brain_ref"]["metric"].unique():
        img_ref, brain_img = (
            values["brain_ref"][metric, "ceiling"],
            values["brain_img"][metric, "system"],
        )
        each = {
            "img_ref": img_ref,
            "brain_ref": values["brain_ref"][metric, "system"],
            "brain_img": brain_img,
        }
        for pairing, own in each.items():
            floors = (
                {row: values[pairing][metric, row].mean() for row in ("shuffled", "common_caption")}
                if pairing in values
                else {}
            )
            lines.append(
                {
                    "metric": metric,
                    "pairing": pairing,
                    **bootstrap_mean(own)._asdict(),
                    "n": len(own),
                    **floors,
                }
            )
        lines.append(
            {
                "metric": metric,
                "pairing": "relative",
                **relative(brain_img, img_ref)._asdict(),
                "n": len(img_ref),
            }
        )
    return pd.DataFrame(lines)


def corpus_bleu_table(captions: pd.DataFrame, common: str, order: Any) -> pd.DataFrame:
    """`corpus_bleu` in the published pairings as `caption_table` gives the other scores, without
    intervals; `order` (n,) is the shuffled pairing.
    """
    lines = []
    for pairing, (said, wanted) in PAIRINGS.items():
        true, own = list(captions[wanted]), list(captions[said])
        floors = {
            "shuffled": corpus_bleu(true, own, order),
            "common_caption": corpus_bleu(true, [common] * len(own)),
        }
        lines += [
            {
                "metric": f"corpus {name}",
                "pairing": pairing,
                "value": value,
                "n": len(own),
                **{floor: scores[name] for floor, scores in floors.items()},
            }
            for name, value in corpus_bleu(true, own).items()
        ]
    return pd.DataFrame(lines).sort_values("metric", kind="stable", ignore_index=True)


def format_caption_table(lines: pd.DataFrame) -> list[dict[str, str]]:
    """`caption_table` and `corpus_bleu_table` for a reader: a row a metric, a column a pairing, the
    floors of the captions from the brain at the end.
    """
    heads = {
        "brain_ref": "brain's to people's",
        "img_ref": "image's to people's",
        "brain_img": "brain's to image's",
        "relative": "relative",
    }
    rows = []
    for metric, part in lines.groupby("metric", sort=False):
        row, told = {"metric": str(metric)}, part.set_index("pairing").to_dict("index")
        for pairing, head in heads.items():
            if pairing in told:
                line = told[pairing]
                interval = (
                    f" [{line['low']:.3f}, {line['high']:.3f}]" if pd.notna(line.get("low")) else ""
                )
                row[head] = f"{line['value']:.3f}{interval}"
        floors = {
            "brain's to other people's": "shuffled",
            "one sentence to people's": "common_caption",
        }
        rows.append(
            row | {head: f"{told['brain_ref'][floor]:.3f}" for head, floor in floors.items()}
        )
    return rows
