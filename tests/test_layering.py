"""Who may import whom, and what src/ must not contain: read from the syntax trees.

The folders are the layers. A module imports from layers below its own, from its own folder, and
from the folders of its own layer that BESIDE names.
"""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
MODULES = sorted(SRC.rglob("*.py"))
LAYERS = [
    {"utils", "files", "safe_pickle", "command_line"},
    {
        "parameters",
        "losses",
        "prior",
        "metrics",
        "retrieval",
        "similarity",
        "data",
        "readers",
        "networks",
        "models",
        "pretrained",
        "figures",
        "search",
        "miniworld",
    },
    {"training", "decoding", "encoding", "small_data"},
    {"evaluation"},
    {"pipeline"},
]
BESIDE = {
    "files": set(),
    "safe_pickle": {"utils", "files"},
    "utils": {"files"},
    "command_line": {"utils", "files"},
    "readers": {"data", "parameters"},
    "miniworld": {"data", "readers"},
    "models": {"networks"},
    "networks": {"prior"},
}
DOORS = {
    "diffusers": {"pretrained", "decoding", "networks"},
    "transformers": {"pretrained"},
    "open_clip": {"pretrained"},
    "clip": {"pretrained"},
    "webdataset": {"readers", "data", "miniworld"},
    "h5py": {"readers", "data", "miniworld"},
    # figures: the volume that a glass brain is drawn of
    "nibabel": {"readers", "data", "miniworld", "figures"},
    "accelerate": {"training"},
    "wandb": {"training"},
    "kornia": {"training", "losses"},
    "faiss": {"retrieval", "search"},
    "boto3": {"pipeline"},
    "botocore": {"pipeline"},
    "huggingface_hub": {"pipeline", "pretrained"},
    "torchvision.models": {"pretrained"},
    "captum": {"evaluation"},
    "nilearn": {"figures"},
    "nltk": {"evaluation"},
    "rouge_score": {"evaluation"},
    "pycocoevalcap": {"evaluation"},
    "sentence_transformers": {"evaluation"},
    "qdrant_client": {"search"},
    "qdrant_edge": {"search"},
    "grpc": {"search"},
    "pickle": {"safe_pickle", "training"},  # training: the random states of its own checkpoints
}


def place_of(path: Path) -> str:
    """The folder of src that a module lies in, or its own name where it lies in none."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of all imports, wherever they stand; relative ones are spelt out."""
    names = set()
    package = ["src", *path.relative_to(SRC).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *filter(None, [node.module])]
            names |= {".".join([*module, alias.name]) for alias in node.names}
    return names


def places_used(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.split(".")[0] == "src"}


def test_every_place_has_a_layer():
    places = {place_of(path) for path in MODULES} - {"__init__"}
    assert places == set().union(*LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_modules_import_from_below(path):
    place = place_of(path)
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"run", "tools", "notebooks", "tests", "benchmarks"}
    if place == "__init__":
        assert not places_used(path)
        return
    layer = next(number for number, places in enumerate(LAYERS) if place in places)
    below = set().union(*LAYERS[:layer])
    above = places_used(path) - below - {place} - BESIDE.get(place, set())
    assert not above, f"{place} may not import from {above}"


def test_imports_make_no_circle():
    """Modules that need each other cannot be read one after the other."""
    names = {module_name(path): path for path in MODULES if path.name != "__init__.py"}
    waiting = {
        name: {find_module(full, names) for full in imports(path)} for name, path in names.items()
    }
    while waiting:
        ready = [name for name, used in waiting.items() if not (used - {name}) & set(waiting)]
        assert ready, f"these import each other: {sorted(waiting)}"
        for name in ready:
            del waiting[name]


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def find_module(full: str, names: dict[str, Path]) -> str | None:
    """The module that an imported name lies in."""
    while full:
        if full in names:
            return full
        full = full.rpartition(".")[0]
    return None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_third_parties_stay_behind_their_door(path):
    for full in imports(path):
        parts = full.split(".")
        door = DOORS.get(parts[0]) or DOORS.get(".".join(parts[:2]))
        assert door is None or place_of(path) in door, f"{full} belongs into {door}"
        if full.startswith("diffusers") and place_of(path) == "networks":
            assert full == "diffusers.models.autoencoders.vae.Decoder"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_no_prints_bare_excepts_star_imports_or_loose_loading(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            is_print = isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not is_print, f"print at line {node.lineno}"
            strict = [
                keyword
                for keyword in node.keywords
                if keyword.arg == "strict"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is False
            ]
            loads = isinstance(node.func, ast.Attribute) and node.func.attr == "load_state_dict"
            assert not (strict and loads), f"strict=False at line {node.lineno}"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"bare except at line {node.lineno}"
        assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_functions_fit_a_screen(path):
    """At most 60 lines; a function of src/figures/ may have 80, as drawing is a long list."""
    limit = 80 if place_of(path) == "figures" else 60
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
            assert lines <= limit, f"{node.name} has {lines} lines"


EXTRAS = [
    "nibabel",
    "boto3",
    "botocore",
    "faiss",
    "qdrant_client",
    "qdrant_edge",
    "grpc",
    "nltk",
    "rouge_score",
    "pycocoevalcap",
    "sentence_transformers",
    "captum",
    "nilearn",
    "wandb",
    "deepspeed",
]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_extras_are_imported_where_they_are_used(path):
    """Without an extra every module can be imported; `require_extra` says what is missing."""
    tree = ast.parse(path.read_text())
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in inside:
            continue
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots = {(node.module or "").split(".")[0]}
        else:
            continue
        assert not roots & set(EXTRAS), f"line {node.lineno}: use require_extra in the function"
