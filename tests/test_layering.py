"""Who may import whom, and what src/ must not contain: read from the syntax trees."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
MODULES = sorted(SRC.rglob("*.py"))
SECOND = {
    "losses",
    "prior",
    "models",
    "pretrained",
    "data",
    "metrics",
    "networks",
    "retrieval",
    "figures",
    "miniworld",
    "download",
    "readers",
    "augment",
    "index",
}
THIRD = {
    "training",
    "published",
    "reconstruct",
    "results",
    "compare",
    "report",
    "dryrun",
    "combined",
    "voting",
    "attribution",
    "sweep",
    "gnet",
    "unclip",
    "refine",
    "captions",
    "tables",
    "mindeye2",
    "engines",
    "remote",
}
BESIDE = {
    "reconstruct": {"published", "unclip"},
    "dryrun": {"reconstruct", "voting"},
    "voting": {"reconstruct", "results"},
    "combined": {"reconstruct"},
    "report": {"results"},
    "captions": {"results"},
    "compare": {"results"},
    "attribution": {"results"},
    "sweep": {"compare"},
    "gnet": {"published"},
    "mindeye2": {"published", "training"},
    "unclip": {"published"},
    "refine": {"reconstruct", "unclip"},
}
DOORS = {
    "diffusers": {"pretrained", "models", "unclip", "refine"},
    "transformers": {"pretrained"},
    "open_clip": {"pretrained"},
    "clip": {"pretrained"},
    "webdataset": {"readers", "data"},
    "h5py": {"readers", "data"},
    "nibabel": {"readers", "data", "figures"},  # figures: the volume that a glass brain is drawn of
    "accelerate": {"training"},
    "wandb": {"training"},
    "kornia": {"augment", "losses"},
    "faiss": {"retrieval", "index"},
    "boto3": {"download"},
    "botocore": {"download"},
    "huggingface_hub": {"download", "pretrained", "dryrun"},
    "torchvision.models": {"networks"},
    "captum": {"attribution"},
    "nilearn": {"figures"},
    "nltk": {"captions"},
    "rouge_score": {"captions"},
    "pycocoevalcap": {"captions"},
    "sentence_transformers": {"captions"},
    "qdrant_client": {"engines"},
    "qdrant_edge": {"engines"},
    "grpc": {"engines"},
}


def name_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of all imports, wherever they stand; relative ones are spelt out."""
    found = set()
    package = ["src", *path.relative_to(SRC).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            found |= {
                ".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names
            }
    return found


def ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.split(".")[0] == "src"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_layers(path):
    name, used = name_of(path), ours(path)
    above = {
        full
        for full in imports(path)
        if full.split(".")[0] in {"run", "tools", "notebooks", "tests"}
    }
    assert not above, f"nothing imports {above}"
    if name == "utils":
        assert not used
    elif name == "readers":
        assert used <= {"utils", "data", "readers", "download"}
    elif name == "pipeline":
        assert used <= SECOND | THIRD | {"utils", "pipeline"}
    elif name in SECOND:
        assert used <= {"utils"}, (
            f"{name} is of the second layer and may import utils only, not {used - {'utils'}}"
        )
    elif name in THIRD:
        assert used <= SECOND | {"utils"} | BESIDE.get(name, set())
    else:
        assert name == "__init__" and not used


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_third_parties_stay_behind_their_door(path):
    for full in imports(path):
        parts = full.split(".")
        door = DOORS.get(parts[0]) or DOORS.get(".".join(parts[:2]))
        assert door is None or name_of(path) in door, f"{full} belongs into {door}"
        if full.startswith("diffusers") and name_of(path) == "models":
            assert full == "diffusers.models.autoencoders.vae.Decoder"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_no_prints_bare_excepts_star_imports_or_loose_loading(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id == "print"), (
                f"print at line {node.lineno}"
            )
            strict = [
                k
                for k in node.keywords
                if k.arg == "strict"
                and isinstance(k.value, ast.Constant)
                and k.value.value is False
            ]
            loads = isinstance(node.func, ast.Attribute) and node.func.attr == "load_state_dict"
            assert not (strict and loads), f"strict=False at line {node.lineno}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
            f"bare except at line {node.lineno}"
        )
        assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_functions_fit_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines"
