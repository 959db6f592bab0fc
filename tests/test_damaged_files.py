"""Files of ours and of others that are damaged or hostile: refused in one sentence that names the
file, or made again; nothing in a file runs, and none asks for more memory than it can fill.
"""

import json
import os
import struct
import warnings
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import TINY
from torch import nn

from src import utils
from src.data.normaliser import Normaliser
from src.decoding.checkpoints import load_decoder, read_decoder_config
from src.decoding.reconstructions import compute_in_chunks, load_reconstructions
from src.evaluation.compare.runs import read_runs
from src.evaluation.records import provenance, read_metrics
from src.figures import plot_contact_sheet, save_figure
from src.figures.base import apply_style
from src.files.foreign import load_npy, load_parquet, shorten
from src.files.weights import build_within
from src.networks.rebuild import check_config
from src.networks.registry import MODELS
from src.networks.released import load_voxel2clip, read_published
from src.pretrained.base import load_frozen
from src.pretrained.clip import Clipper
from src.pretrained.metric_networks import FeatureNetwork, locate_weights
from src.safe_pickle import is_torchscript, load_plain_torch_file, load_torch_file
from src.utils import PerceptError, load_checkpoint, open_tensors, read_json, save_checkpoint

UNSAFE = ("weights_only", "allow_pickle", "pickle.load", "trust_remote_code")

MODEL = {
    "name": "BrainNetwork",
    "kwargs": {"in_dim": 5, "out_dim": 12, "clip_size": 4, "h": 8, "n_blocks": 1},
}
MODEL["kwargs"]["projector_dim"] = 6

DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "web page": lambda content: b"<html>404</html>" * 99,
    "text": lambda content: b"hello " * 9,
}


def refusal(call, *names):
    """The message with which a call refuses: one line that names the file and advises no danger."""
    with pytest.raises(PerceptError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    assert not [word for word in UNSAFE if word in text]
    assert all(name in text for name in names), text
    return text


def damage(path, kind):
    path.write_bytes(DAMAGE[kind](path.read_bytes()))


class Marker:
    """Unpickled by pickle itself, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def script(tmp_path):
    """A TorchScript archive."""
    path = tmp_path / "last.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Scripted()), str(path))
    return path


# ------------------------------------------------------------------------------ code in a file
def test_a_program_is_never_loaded(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert is_torchscript(script)
    for load in (load_torch_file, load_plain_torch_file, load_decoder, read_published):
        refusal(lambda load=load: load(script), "last.pth", "TorchScript")
    (tmp_path / "RN50.pt").write_bytes(script.read_bytes())
    text = refusal(lambda: Clipper(str(tmp_path), hidden=False, variant="RN50"), "RN50.pt")
    assert "TorchScript" in text and "sha256" in text
    file = locate_weights("AlexNet(2)", str(tmp_path))
    file.write_bytes(script.read_bytes())
    refusal(lambda: FeatureNetwork("AlexNet(2)", str(tmp_path)), file.name, "TorchScript")


def test_pickles_run_nothing_and_give_no_advice(tmp_path):
    path = tmp_path / "state.pt"
    for zipped in (True, False):
        content = {"w": torch.ones(2), "x": Marker(tmp_path / "ran")}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        text = refusal(lambda: load_plain_torch_file(path), "state.pt")
        assert "mkdir" in text or not zipped
    assert not (tmp_path / "ran").exists()
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert load_plain_torch_file(path)["w"].sum() == 2  # torchvision's older files are so
    np.save(tmp_path / "a.npy", np.array([Marker(tmp_path / "ran")], dtype=object))
    refusal(lambda: load_npy(tmp_path / "a.npy"), "a.npy")
    assert not (tmp_path / "ran").exists()


def test_archives_that_were_packed_again_are_refused(tmp_path):
    torch.save({"w": torch.ones(100)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old:
        with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    refusal(lambda: load_torch_file(tmp_path / "b.pth"), "b.pth", "compressed again")


def test_a_tensor_has_the_numbers_that_it_announces(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.pth")
    refusal(lambda: read_published(tmp_path / "a.pth"), "a.pth", "1000000 x 1000000")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_torch_files(tmp_path, kind):
    torch.save({"w": torch.ones(1000)}, tmp_path / "a.pth")
    damage(tmp_path / "a.pth", kind)
    refusal(lambda: load_torch_file(tmp_path / "a.pth"), "a.pth", "download it again")
    refusal(lambda: load_plain_torch_file(tmp_path / "a.pth", "delete it"), "a.pth", "delete it")


def test_advice_of_libraries_is_not_passed_on():
    assert "trust_remote_code" not in shorten("set trust_remote_code=True")
    assert shorten("plain damage. ") == "plain damage"


# ---------------------------------------------------------------------------------- checkpoints
def make_checkpoint(path, change=None, config=None):
    state = MODELS["BrainNetwork"](**MODEL["kwargs"]).state_dict()
    if change:
        change(state)
    save_checkpoint(path, state, {"model": MODEL, "tokens": [3, 4]} if config is None else config)
    return path


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints(tmp_path, kind):
    path = make_checkpoint(tmp_path / "last.safetensors")
    assert load_decoder(path)[1]["tokens"] == [3, 4]
    damage(path, kind)
    for load in (load_decoder, read_decoder_config, load_checkpoint):
        refusal(lambda load=load: load(path), "last.safetensors")
    refusal(lambda: load_voxel2clip(path, nn.Linear(2, 2)), "last.safetensors")


def spoil_nan(state):
    state["lin0.0.weight"][0, 0] = float("nan")


def spoil_inf(state):
    state["lin0.0.bias"][0] = float("inf")


def spoil_kind(state):
    state["lin0.0.weight"] = state["lin0.0.weight"].long()


def spoil_shape(state):
    state["lin0.0.weight"] = state["lin0.0.weight"][:, :3].clone()


@pytest.mark.parametrize("change", [spoil_nan, spoil_inf, spoil_kind, spoil_shape])
def test_weights_that_are_none(tmp_path, change):
    path = make_checkpoint(tmp_path / "last.safetensors", change)
    refusal(lambda: load_decoder(path), "last.safetensors", "lin0.0")


def with_kwargs(**changed):
    return {"model": MODEL | {"kwargs": MODEL["kwargs"] | changed}}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model": "BrainNetwork"},
        {"model": {"name": "Nothing", "kwargs": {}}},
        {"model": {"name": "BrainDiffusionPrior", "kwargs": {}}},
        with_kwargs(h="many"),
        with_kwargs(h=-8),
        with_kwargs(h=10**9),
        with_kwargs(h=10**30),
        with_kwargs(n_blocks=10**9),
        with_kwargs(out_dim=None),
        with_kwargs(unknown=1),
        {"model": MODEL, "tokens": "many"},
        {"model": MODEL, "tokens": [3, -4]},
        {"model": MODEL, "tokens": [3]},
    ],
)
def test_configs_of_which_no_network_is_made(tmp_path, config):
    path = make_checkpoint(tmp_path / "last.safetensors", config=config)
    refusal(lambda: load_decoder(path), "last.safetensors")


def test_foreign_metadata(tmp_path):
    path = make_checkpoint(tmp_path / "last.safetensors")
    for text in ("{", "[1]", "[" * 100_000):
        save_file(load_file(path), path, metadata={"config": text})
        refusal(lambda: load_decoder(path), "last.safetensors")
        refusal(lambda: read_decoder_config(path), "last.safetensors")


def test_a_header_cannot_announce_terabytes(tmp_path):
    head = json.dumps({"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}})
    path = tmp_path / "last.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head.encode() + bytes(4))
    refusal(lambda: load_checkpoint(path), "last.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_every_network_can_be_planned_without_memory(name):
    network = MODELS[name](**TINY[name])
    check_config({"model": network.config}, network.state_dict(), "the file")
    with pytest.raises(ValueError, match="more than 1000 layers"):
        build_within(lambda: nn.Sequential(*(nn.Linear(1, 1) for _ in range(10**6))), 0)


# --------------------------------------------------------------------------- folders of DeepSpeed
def write_deepspeed(folder, **changed):
    model = {"module": {"a": torch.ones(2)}, "param_shapes": [{"a": torch.Size([2])}]}
    groups = {"single_partition_of_fp32_groups": [torch.tensor([3.0, 4.0, 0.0])]}
    content = {"model": model, "optimizer": {"optimizer_state_dict": groups}} | changed
    (folder / "x").mkdir(parents=True)
    (folder / "latest").write_text(changed.get("latest", "x"))
    torch.save(content["model"], folder / "x/mp_rank_00_model_states.pt")
    name = changed.get("name", "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save(content["optimizer"], folder / "x" / name)
    return folder


def test_a_deepspeed_folder_is_joined(tmp_path):
    assert read_published(write_deepspeed(tmp_path / "last"))["a"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"optimizer": {"a": 1}}, "optim_states.pt"),
        ({"optimizer": [1]}, "optim_states.pt"),
        ({"optimizer": {"optimizer_state_dict": {}}}, "optim_states.pt"),
        ({"model": [1]}, "model_states.pt"),
        ({"model": {"module": {"a": torch.ones(2)}}}, "model_states.pt"),
        ({"model": {"module": {}, "param_shapes": [{"a": [-2]}]}}, "model_states.pt"),
        ({"model": {"module": {}, "param_shapes": [{"a": [9]}]}}, "optim_states.pt"),
        ({"latest": "../../x"}, "latest"),
        ({"latest": ""}, "latest"),
        ({"name": "zero_pp_rank_x_mp_rank_00_optim_states.pt"}, "optim_states.pt"),
    ],
)
def test_deepspeed_folders_of_something_else(tmp_path, changed, named):
    folder = write_deepspeed(tmp_path / "last", **changed)
    refusal(lambda: read_published(folder), named)


# -------------------------------------------------------------------------------- reconstructions
def write_reconstructions(folder, about=None, **tensors):
    rows = {"seen": torch.rand(3, 3, 4, 4).half(), "network": torch.rand(3, 3, 4, 4).half()}
    rows |= {"image_ids": torch.tensor([5, 6, 7])} | tensors
    texts = {"main": "network", "protocol": "p", "test_set": "t"} if about is None else about
    save_file(rows, folder / "reconstructions.safetensors", metadata=texts)


def test_reconstructions_are_of_images(tmp_path):
    write_reconstructions(tmp_path)
    assert load_reconstructions(tmp_path)[1]["main"] == "network"
    for tensors in (
        {"image_ids": torch.tensor([5, 6])},
        {"image_ids": torch.tensor([5, 6, 6])},
        {"image_ids": torch.tensor([5.0, 6.0, 7.0])},
        {"network": torch.full((3, 3, 4, 4), float("nan"))},
    ):
        write_reconstructions(tmp_path, **tensors)
        refusal(lambda: load_reconstructions(tmp_path), "reconstructions.safetensors")
    for about in ({"main": "network"}, {"main": "ridge", "protocol": "p", "test_set": "t"}):
        write_reconstructions(tmp_path, about)
        refusal(lambda: load_reconstructions(tmp_path), "reconstructions.safetensors")
    save_file({"x": torch.ones(3)}, tmp_path / "reconstructions.safetensors")
    refusal(lambda: load_reconstructions(tmp_path), "image_ids")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_reconstructions(tmp_path, kind):
    write_reconstructions(tmp_path)
    damage(tmp_path / "reconstructions.safetensors", kind)
    refusal(lambda: load_reconstructions(tmp_path), "reconstructions.safetensors", "notebook 03")


@pytest.mark.parametrize("kind", [*DAMAGE, "of other images"])
def test_a_damaged_slice_is_computed_again(tmp_path, kind, caplog):
    calls = []

    def compute(rows):
        calls.append(rows.start)
        return {"x": torch.arange(rows.start, rows.stop)[:, None].float()}

    compute_in_chunks(compute, 4, 2, tmp_path, 1)
    first = min(tmp_path.glob("*.safetensors"))
    if kind == "of other images":
        save_file({"x": torch.zeros(1, 1)}, first)
    else:
        damage(first, kind)
    result = compute_in_chunks(compute, 4, 2, tmp_path, 1)["x"]
    assert calls == [0, 2, 0] and result.flatten().tolist() == [0, 1, 2, 3]
    assert first.name in caplog.text


def test_memory_that_ends_while_reconstructing(tmp_path):
    def compute(rows):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    refusal(lambda: compute_in_chunks(compute, 2, 1, tmp_path, 1), "generator_batch", "peak")


# ------------------------------------------------------------------------------------- normaliser
def write_normaliser(path, texts=None, **changed):
    arrays = {"mean": torch.zeros(1, 5), "std": torch.ones(1, 5)} | changed
    save_file(arrays, path, metadata={"n_voxels": "5"} if texts is None else texts)
    return path


@pytest.mark.parametrize(
    "changed",
    [
        {"mean": torch.zeros(1, 4), "std": torch.ones(1, 4)},
        {"std": torch.full((1, 5), float("nan"))},
        {"std": torch.zeros(1, 5)},
        {"mean": torch.zeros(1, 4)},
        {"mean": torch.zeros(5)},
        {"mean": torch.tensor(0.0)},
        {"mean": torch.zeros(1, 5, dtype=torch.int64)},
        {"sessions": torch.tensor([1, 2])},
        {"columns": torch.tensor([0, 1, 2, 3, 5])},
        {"columns": torch.tensor([4, 3, 2, 1, 0])},
        {"components": torch.ones(4, 2)},
        {"texts": {"n_voxels": "five"}},
    ],
)
def test_normalisers_that_are_none(tmp_path, changed):
    path = write_normaliser(tmp_path / "normaliser.safetensors", **changed)
    refusal(lambda: Normaliser.load(path), "normaliser.safetensors")


def test_a_sound_normaliser_is_loaded(tmp_path):
    path = write_normaliser(tmp_path / "normaliser.safetensors", {})
    assert Normaliser.load(path).n_voxels == 5


# ------------------------------------------------------------------------- JSON, tables and arrays
def test_json_files(tmp_path):
    path = tmp_path / "a.json"
    refusal(lambda: read_json(path), "a.json", "missing")
    for content in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"<html>"):
        path.write_bytes(content)
        refusal(lambda: read_json(path, remedy="delete it"), "a.json", "delete it")
    for content in ("[1]", "3", '{"a": 1}', "null"):
        path.write_text(content)
        refusal(lambda: read_json(path, ("a", "b")), "a.json")
    path.write_text('{"a": 1, "b": 2}')
    assert read_json(path, ("a", "b"))["b"] == 2


def test_arrays_and_tables_announce_no_more_than_they_hold(tmp_path):
    head = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    head += " " * (53 - len(head) % 64) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()
    (tmp_path / "a.npy").write_bytes(content + bytes(64))
    refusal(lambda: load_npy(tmp_path / "a.npy"), "a.npy", "4,000.0 GB")
    ones = pa.chunked_array([pa.array(np.ones(1 << 20, np.int8))] * 300)
    pq.write_table(pa.table({"value": ones}), tmp_path / "a.parquet", compression="zstd")
    refusal(lambda: load_parquet(tmp_path / "a.parquet"), "a.parquet", "GB of a table")


# -------------------------------------------------------------------------------- runs and figures
def write_run(folder, name="a"):
    folder.mkdir(parents=True)
    record = {"name": name, "value": 0.5, "better": "higher", "protocol": "p", "test_set": "t"}
    record |= {"floors": {}, "ceiling": {}}
    utils.write_json(folder / "metrics.json", {"metrics": [record], "provenance": {}})
    scores = pd.DataFrame({"metric": [name], "row": ["system"], "image": [1], "value": [0.5]})
    scores.to_parquet(folder / "scores.parquet")


@pytest.mark.parametrize("file", ["metrics.json", "scores.parquet"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_one_damaged_run_does_not_stop_a_comparison(tmp_path, file, kind):
    write_run(tmp_path / "good")
    write_run(tmp_path / "bad")
    damage(tmp_path / "bad" / file, kind)
    with pytest.warns(UserWarning, match=f"left out: .*bad.{file}"):
        assert [run.name for run in read_runs(tmp_path)] == ["good"]
    refusal(lambda: read_runs(tmp_path, "good,bad"), file)  # what is asked for is not left out
    utils_home = tmp_path / "good"
    damage(utils_home / file, kind)
    refusal(lambda: read_runs(tmp_path), file)


@pytest.mark.parametrize(
    "content",
    [
        {"metrics": {}, "provenance": {}},
        {"metrics": [1], "provenance": {}},
        {"metrics": [{"name": "a"}], "provenance": {}},
        {"metrics": [], "provenance": []},
        {"metrics": []},
    ],
)
def test_metrics_of_another_form(tmp_path, content):
    utils.write_json(tmp_path / "metrics.json", content)
    refusal(lambda: read_metrics(tmp_path / "metrics.json"), "metrics.json", "delete it")


def test_results_record_the_number_of_threads():
    assert provenance("r", {}, [])["threads"] == torch.get_num_threads()


def test_labels_are_no_formulas(tmp_path):
    import matplotlib.pyplot as plt

    images = torch.rand(2, 3, 8, 8)
    sheet = plot_contact_sheet({"seen": images, r"$\frac{a$": images, "$x^2$": images}, n=2)
    save_figure(sheet, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size
    with apply_style():
        assert not plt.figure().text(0, 0, "$x$").get_parse_math()
    plt.close()


# --------------------------------------------------------------------------------- frozen models
class _Broken:
    """A class of a library that fails as such do."""

    def __init__(self, error):
        self.error = error

    @property
    def __name__(self):
        return "CLIP"

    def from_pretrained(self, location, **options):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Cannot use ``weights_only=True`` with TorchScript archives"),
        KeyError("w"),
        OSError("no file"),
        ValueError("set trust_remote_code=True"),
    ],
)
def test_what_libraries_raise_is_one_sentence(error):
    refusal(lambda: load_frozen(_Broken(error), "folder"), "folder", "CLIP")


def test_a_handle_says_which_file_lacks_a_tensor(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")

    def read():
        with open_tensors(tmp_path / "x.safetensors") as file:
            file.get_tensor("b")

    refusal(read, "x.safetensors")
