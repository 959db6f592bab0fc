"""WordNet, which METEOR takes synonyms from."""

from __future__ import annotations

import io
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.utils import PerceptError, require_extra

DEBIAN_FOLDER = Path("/usr/share/wordnet")  # where Debian's package wordnet-base puts it

N_LEXNAMES = 45  # files of WordNet's lexicographers


def find_wordnet_folder() -> Path | None:
    """Where WordNet 3.0 lies: the environment variable PERCEPT_WORDNET, nltk's own data
    (NLTK_DATA), Debian's package; None where it is not.

    Raises:
        PerceptError: PERCEPT_WORDNET names a folder without it.
    """
    nltk = require_extra("nltk", "captions")
    configured = os.environ.get("PERCEPT_WORDNET")
    if configured:
        if not (Path(configured) / "data.noun").exists():
            raise PerceptError(
                f"PERCEPT_WORDNET is {configured}, which holds no WordNet (data.noun): set it to"
                " the folder of its files, or unset it."
            )
        return Path(configured)
    folders = [Path(folder) / "corpora" / "wordnet" for folder in nltk.data.path]
    for folder in [*folders, DEBIAN_FOLDER]:
        if (folder / "data.noun").exists():
            return folder
    return None


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
    return _open_reader(folder)


@lru_cache(maxsize=2)
def _open_reader(folder: Path) -> Any:
    """nltk's reader of WordNet's files, of which Debian's package has all that synonyms depend on,
    and not those of names and senses.
    """
    nltk = require_extra("nltk", "captions")
    wordnet: Any = require_extra("nltk.corpus.reader.wordnet", "captions")

    class Reader(wordnet.WordNetCorpusReader):
        def open(self, file: str) -> Any:
            if file == "lexnames":
                lines = [f"{i:02d} unnamed 0\n" for i in range(N_LEXNAMES)]
                return io.StringIO("".join(lines))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """No map to other versions, which only other languages need: the file that it is
            computed from is absent too.
            """

    # nltk reads from folders in its path, and from no others
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other languages are absent
        return Reader(nltk.data.FileSystemPathPointer(str(folder)), None)
