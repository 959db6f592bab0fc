"""The combined system: parameter counts, losses against a calculation by hand, encoders of volumes,
choices, captions, samples, trackers, the notebook.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from servers import hub_server
from torch.utils.data import Subset
from training_options import group_options

from src import losses, models, parameters, training, utils
from src.data.draws import choose_repeats
from src.data.images import write_images
from src.data.layout import write_subject
from src.decoding import caption_targets, combined
from src.decoding.checkpoints import load_decoder
from src.decoding.configs import DecoderSizes, build_decoder_config
from src.decoding.generate import generate_images, load_generator, set_sampler
from src.miniworld.formats import SourceData
from src.miniworld.formats import mindeye as mindeye_format
from src.networks import released
from src.networks.rebuild import build_decoder
from src.parameters import parse_parameters
from src.pipeline import dryrun
from src.prior import BrainDiffusionPrior
from src.readers import mindeye
from src.utils import PerceptError

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {
    name: p.default
    for name, p in parse_parameters(
        parameters.read_parameters_cell(ROOT / "notebooks/01_train_combined.py")
    ).items()
}
TINY = DEFAULTS | {
    "h": 16,
    "n_blocks": 1,
    "prior_depth": 1,
    "prior_heads": 2,
    "prior_dim_head": 8,
    "timesteps": 4,
    "max_text_len": 2,
    "conv_channels": "4,8",
    "conv_strides": "2,2",
}
LAION = ROOT / "data" / "mini_models" / "laion_prior" / "best.pth"


def combined_config(parameters, in_dim: int, dim: int, volume=None):
    sizes = DecoderSizes((in_dim,), dim=dim, volume=volume)
    return build_decoder_config("01_train_combined", parameters, sizes)


def tiny(arch: str = "brainnet", dim: int = 16, **changes) -> BrainDiffusionPrior:
    torch.manual_seed(0)
    return build_decoder(combined_config(TINY | {"arch": arch} | changes, 60, dim, (3, 4, 5)))


# ------------------------------------------------------------------------------------ the networks
def test_parameters_are_as_many_as_published():
    with torch.device("meta"):
        model = build_decoder(combined_config(DEFAULTS, 15724, 768))
    assert sum(p.numel() for p in model.voxel2clip.parameters()) == 134_722_304
    assert sum(p.numel() for p in model.parameters()) == 236_616_336
    assert isinstance(model.voxel2clip.lin0[1], torch.nn.ReLU) and isinstance(
        model.voxel2clip.lin0[2], torch.nn.BatchNorm1d
    )
    assert (
        model.cond_drop_prob == 0.0
        and model.image_embed_scale == pytest.approx(768**0.5)
        and model.voxel2clip.projector is None
    )


def test_the_plan_of_the_stage_counts_the_same():
    plan = dryrun.plan_stage("01_train_combined", DEFAULTS | {"dataset": "absent"})
    assert (
        sum(plan.parameters.values()) == 236_616_336
        and sum(plan.memory.values()) > 4 * 4 * 236_616_336
    )
    frozen = dryrun.plan_stage(
        "01_train_combined",
        DEFAULTS | {"dataset": "absent", "combine_models": False, "combine_losses": False},
    )
    assert frozen.memory["optimizer state"] == 2 * 4 * (
        236_616_336 - 134_722_304 - 16
    )  # the rotary frequencies are not trained either


@pytest.mark.parametrize("arch", models.ENCODERS)
def test_every_encoder_takes_volumes_and_their_flat_form_and_learns(arch):
    model = tiny(arch).eval()
    volume = torch.randn(4, 3, 4, 5)
    brain, same = model.voxel2clip.predict_tokens(volume)
    assert brain.shape == (4, 1, 16) and torch.equal(brain, same)
    assert torch.equal(brain, model.voxel2clip.predict_tokens(volume.flatten(1))[0])
    brain.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for name, p in model.voxel2clip.named_parameters()
        if name.endswith("weight")
    )
    with pytest.raises(PerceptError, match="60|\\(3, 4, 5\\)"):
        model.voxel2clip(torch.randn(4, 59))


def test_the_published_volume_encoder_reads_a_whole_brain():
    with torch.device("meta"):
        model = build_decoder(
            combined_config(DEFAULTS | {"arch": "3dconv"}, 699_192, 768, (83, 104, 81))
        )
    kinds = [m for m in model.voxel2clip.modules() if isinstance(m, torch.nn.Conv3d)]
    assert [m.out_channels for m in kinds] == [64, 128, 256, 64] and [
        m.stride[0] for m in kinds
    ] == [1, 2, 3, 3]
    assert model.voxel2clip.lin1.in_features == 64 * 5 * 6 * 5  # places left of 83 x 104 x 81


def test_volume_encoders_that_cannot_be_are_refused():
    with pytest.raises(PerceptError, match="whole volumes"):
        combined_config(DEFAULTS | {"arch": "3dconv"}, 100, 768, None)
    with pytest.raises(PerceptError, match="one stride a convolution"):
        tiny("3dconv", conv_strides="2")
    with pytest.raises(PerceptError, match="conv_channels is 'many'"):
        tiny("3dconv", conv_channels="many")
    with pytest.raises(PerceptError, match="too small"):
        models.VolumeEncoder((1, 1, 1), kernel=5, padding=1)


# -------------------------------------------------------------------------------------- the losses
def test_info_nce_is_the_cross_entropy_of_each_brain_over_the_images():
    g = torch.Generator().manual_seed(1)
    brain, image = (F.normalize(torch.randn(5, 7, generator=g), dim=-1) for _ in range(2))
    torch.testing.assert_close(
        losses.info_nce(brain, image), F.cross_entropy(brain @ image.T / 0.1, torch.arange(5))
    )
    assert not torch.isclose(
        losses.info_nce(brain, image), losses.info_nce(image, brain)
    )  # one direction


def test_both_forms_of_the_loss_and_the_schedule_of_alpha():
    mse, nce = torch.tensor(200.0), torch.tensor(4.0)
    assert losses.combined_loss(mse, nce, 0.01, "run") == pytest.approx(2 + 3.96)
    assert losses.combined_loss(mse, nce, 0.01, "stated") == pytest.approx(2 + 4)
    assert [losses.compute_alpha(e, 3, "linear") for e in range(3)] == pytest.approx(
        [0.01, 0.03, 0.05]
    )
    assert {losses.compute_alpha(e, 3) for e in range(3)} == {0.01} and losses.compute_alpha(
        0, 1, "linear"
    ) == 0.01
    for refused in (
        lambda: losses.combined_loss(mse, nce, 0.5, "sum"),
        lambda: losses.compute_alpha(0, 2, "cosine"),
    ):
        with pytest.raises(PerceptError, match="choose one of"):
            refused()


def test_the_loss_of_the_prior_reaches_the_voxels():
    model = tiny()
    voxels, target = torch.randn(6, 60), torch.randn(6, 1, 16)
    model(
        text_embed=model.voxel2clip.predict_tokens(voxels)[0],
        image_embed=target,
        seeds=torch.arange(6),
    )[0].backward()
    assert model.voxel2clip.lin0[0].weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------- weights of others
def early(path: Path, wrapped: bool, prefix: str = "") -> dict:
    """A file as the early system left it: with the scalar temp, bare or wrapped."""
    state = {prefix + key: value.clone() for key, value in tiny().voxel2clip.state_dict().items()}
    content = state | {prefix + "temp": torch.tensor(0.006)}
    torch.save({"epoch": 1, "model_state_dict": content} if wrapped else content, path)
    return state


@pytest.mark.parametrize(
    ("wrapped", "prefix"), [(False, ""), (True, ""), (True, "module."), (True, "voxel2clip.")]
)
def test_voxel2clip_begins_with_the_weights_of_a_file(tmp_path, wrapped, prefix):
    state = early(tmp_path / "early.pth", wrapped, prefix)
    network = tiny().voxel2clip
    for p in network.parameters():
        torch.nn.init.zeros_(p)
    released.load_voxel2clip(tmp_path / "early.pth", network)
    assert all(
        torch.equal(value, state[prefix + key]) for key, value in network.state_dict().items()
    )


def test_voxel2clip_of_a_run_of_ours_is_taken_and_another_size_refused(tmp_path):
    decoder = tiny()
    utils.save_checkpoint(tmp_path / "last.safetensors", decoder.state_dict(), {"model": {}})
    network = tiny().voxel2clip
    released.load_voxel2clip(tmp_path / "last.safetensors", network)
    torch.testing.assert_close(network.state_dict(), decoder.voxel2clip.state_dict())
    early(tmp_path / "early.pth", True)
    with pytest.raises(PerceptError, match="of another shape"):
        released.load_voxel2clip(tmp_path / "early.pth", tiny(h=8).voxel2clip)


def test_a_whole_early_checkpoint_is_a_decoder(tmp_path):
    state = tiny().state_dict()
    torch.save(
        {"model_state_dict": state | {"voxel2clip.temp": torch.tensor(0.006)}},
        tmp_path / "last.pth",
    )
    decoder, config = load_decoder(tmp_path / "last.pth")
    torch.testing.assert_close(decoder.state_dict(), state)
    assert (
        config["tokens"] == [1, 16] and config["model"]["voxel2clip"]["kwargs"]["norm_type"] == "bn"
    )


def test_the_mini_prior_is_laions_kind_of_file_and_starts_the_mini_recipe():
    mini = parameters.read_recipe(ROOT / "recipes/combined/mini/01_train_combined.yaml")
    model = build_decoder(combined_config(DEFAULTS | mini, 60, 128))
    state = torch.load(LAION, weights_only=True)
    assert not set(released.FRESH_IN_LAION) & set(state) and {
        key.split(".")[0] for key in state
    } == {"net", "noise_scheduler"}
    fresh = released.load_laion_prior(LAION, model)
    assert {key for key in fresh if not key.startswith("voxel2clip.")} == set(
        released.FRESH_IN_LAION
    )
    torch.testing.assert_close(model.net.learned_query.data, state["net.learned_query"].float())
    assert LAION.stat().st_size < 1.2e6


def test_the_tool_trains_a_prior_on_pairs_of_embeddings_and_exports_what_a_recipe_starts_from(
    tmp_path, monkeypatch
):
    from tools.mini_models import data, laion_prior
    from tools.mini_models.training import Options

    monkeypatch.setattr(data, "WORK", tmp_path)
    monkeypatch.setattr(data, "OUT", tmp_path / "out")
    image_sets = {"laion": [(1, "train", 12)], "check": [(1, "val", 8)]}
    monkeypatch.setattr(data, "IMAGE_SETS", image_sets)
    text, seen = laion_prior.load_embedding_pairs("laion")
    assert text.shape == (12, 5, 128) and seen.shape == (12, 128)
    laion_prior.train_laion_prior(Options(minutes=0.005, bf16=False))
    laion_prior.export_laion_prior()
    prior = laion_prior.build_laion_prior()
    assert set(released.load_laion_prior(tmp_path / "out/laion_prior/best.pth", prior)) == set(
        released.FRESH_IN_LAION
    )
    trained = torch.load(tmp_path / "laion_prior.pt", weights_only=True)["average"]
    torch.testing.assert_close(
        prior.net.learned_query.data, trained["net.learned_query"], atol=1e-2, rtol=1e-3
    )  # half precision


# ----------------------------------------------------------------------------------------- choices
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"combine_models": False, "combine_losses": False}, "voxel2clip_path"),
        ({"clip_aug_mode": "x"}, "clip_aug_mode"),
        (
            {
                "clip_aug_mode": "y",
                "combine_models": False,
                "combine_losses": False,
                "voxel2clip_path": "x",
                "modality": "text",
            },
            "modality image",
        ),
        ({"use_image_aug": True, "modality": "text"}, "captions"),
        ({"arch": "3dconv"}, "voxel_dims to 3"),
        ({"remote_data": True, "voxel_dims": 3}, "remote_data"),
        ({"use_mixco": True, "combine_losses": False}, "use_mixco"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(changes, words):
    combined.check_combined_parameters(DEFAULTS)
    with pytest.raises(PerceptError, match=words) as error:
        combined.check_combined_parameters(DEFAULTS | changes)
    assert len(re.findall(r"\.(?: |$)", str(error.value))) == 1


def test_data_of_another_kind_than_voxel_dims_says_are_refused():
    combined.check_volumes(1, None)
    combined.check_volumes(3, (3, 4, 5))
    with pytest.raises(PerceptError, match=r"volumes \(trials, 3, 4, 5\).*voxel_dims to 3"):
        combined.check_volumes(1, (3, 4, 5))
    with pytest.raises(PerceptError, match="voxel_dims to 1"):
        combined.check_volumes(3, None)


# ---------------------------------------------------------------------------------------- captions
TABLE = pd.DataFrame({"image": [7, 3, 7, 3, 7, 9], "caption": ["a", "b", "", "c", "d", None]})


def test_an_epoch_shows_one_caption_that_is_not_empty_and_validation_the_first():
    embeddings = np.arange(4, dtype=np.float16)[:, None]  # of a, b, c, d
    targets = caption_targets.CaptionTargets(TABLE, embeddings)
    assert targets.first(np.array([3, 7])).ravel().tolist() == [1, 0]
    visible = np.stack([targets.rows(np.array([7, 3]), seed=1, epoch=e).ravel() for e in range(40)])
    assert set(visible[:, 0]) == {0, 3} and set(visible[:, 1]) == {1, 2}
    assert np.array_equal(visible[5], targets.rows(np.array([7, 3]), 1, 5).ravel())
    chosen = choose_repeats(4, 5, np.array([7, 3]), np.array([2, 2]))
    assert visible[5].tolist() == [[0, 3][chosen[0]], [1, 2][chosen[1]]]
    with pytest.raises(PerceptError, match="1 images have no caption, the first is 9"):
        targets.check(np.array([3, 9]))
    with pytest.raises(PerceptError, match="no captions"):
        caption_targets.select_captions(None)


# ----------------------------------------------------------------------------------------- samples
def test_fid_is_zero_for_the_same_pictures_and_grows_with_the_difference():
    from src.pretrained.metric_networks import FeatureNetwork

    eye, g = FeatureNetwork("InceptionV3", "mini"), torch.Generator().manual_seed(0)
    pictures = torch.rand(6, 3, 32, 32, generator=g)
    close_fid, distant_fid = (
        combined.compute_fid(eye, pictures, (pictures * share).clamp(0, 1)) for share in (0.95, 0.3)
    )
    assert abs(combined.compute_fid(eye, pictures, pictures)) < 1e-2 < close_fid < distant_fid
    with pytest.raises(PerceptError, match="at least two"):
        combined.compute_fid(eye, pictures[:1], pictures)


def test_samples_begin_at_the_noise_of_the_true_embedding_and_both_samplers_paint():
    diffusion, model = load_generator(1, "mini"), tiny(dim=128)
    voxels, targets, ids = (
        np.random.default_rng(0).normal(size=(2, 60)).astype(np.float32),
        np.ones((2, 128), np.float16),
        np.array([5, 6]),
    )
    rows = combined.generate_sample_grid(
        model.eval(), diffusion, voxels, targets, ids, samples=2, steps=2
    )
    assert list(rows) == ["true embedding", "brain 1", "brain 2"] and all(
        outputs.shape == (2, 3, 32, 32) for outputs in rows.values()
    )
    condition = torch.ones(2, 1, 1, 128)
    expected = generate_images(diffusion, condition, ids, num_inference_steps=2)[:, 0]
    torch.testing.assert_close(rows["true embedding"], expected)
    other = generate_images(set_sampler(diffusion, "pndms"), condition, ids, num_inference_steps=2)[
        :, 0
    ]
    assert (
        type(diffusion.scheduler).__name__ == "PNDMScheduler"
        and other.shape == expected.shape
        and not torch.allclose(other, expected)
    )
    with pytest.raises(PerceptError, match="no sampler 'euler'"):
        set_sampler(diffusion, "euler")


def test_an_image_variation_gives_an_embedding_of_another_picture():
    from src.pretrained.clip import Clipper

    clipper, diffusion = Clipper("mini", hidden=False, norm_embs=False), load_generator(1, "mini")
    inputs = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    outputs = combined.embed_variations(
        diffusion, clipper, inputs, torch.tensor([1, 2]), seed=3, steps=2
    )
    assert outputs.shape == (2, 128) and not torch.allclose(outputs, inputs)
    assert torch.equal(
        outputs,
        combined.embed_variations(
            diffusion, clipper, inputs, torch.tensor([1, 2]), seed=3, steps=2
        ),
    )


# ---------------------------------------------------------------------------------------- training
class Squares:
    def __init__(self):
        self.epochs = []

    def __len__(self):
        return 10

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __getitems__(self, rows):
        return {"x": torch.tensor(rows, dtype=torch.float32)[:, None]}


def test_the_first_batch_alone_is_trained_on_and_figures_have_their_own_interval(tmp_path):
    seen, draws, data = set(), [], Squares()

    def step(model, batch, epoch):
        seen.update(batch["x"].flatten().tolist())
        return (model(batch["x"]) - 1).square().mean(), {}

    options = {
        "config": {},
        "epochs": 5,
        "batch_size": 4,
        "max_lr": 1e-2,
        "device": "cpu",
        "checkpoints": False,
        "ckpt_interval": 1,
        "draw_interval": 2,
    }
    training.fit(
        torch.nn.Linear(1, 1),
        step,
        Subset(data, range(4)),
        folder=tmp_path,
        **group_options(draw=lambda model, epoch: draws.append(epoch) or {}, **options),
    )
    assert seen == {0, 1, 2, 3} and data.epochs == [0, 1, 2, 3, 4] and draws == [1, 3, 4]


def test_a_tracker_goes_to_the_host_and_by_the_name_that_it_is_given(tmp_path, monkeypatch):
    import wandb

    requests = {}
    monkeypatch.setattr(utils, "HOME", tmp_path)
    monkeypatch.setattr(
        wandb,
        "init",
        lambda **options: (
            requests.update(options)
            or type("Open", (), {"log": lambda *a, **k: None, "finish": lambda self: None})()
        ),
    )
    run = parameters.Run("toy", "01_train_combined", "", {}, {})
    logger = training.open_tracker(
        run, True, "project", name="mine", notes="a note", host="https://wandb.example.org"
    )
    logger({"train/loss": 1.0}, 1)
    assert (
        requests["settings"].base_url.rstrip("/") == "https://wandb.example.org"
        and requests["name"] == "mine"
        and requests["notes"] == "a note"
    )
    training.open_tracker(run, True, "project")({"train/loss": 1.0}, 1)
    assert requests["name"] == "toy" and requests["notes"] is None


# ------------------------------------------------------------------------------------ the notebook
def launch(home: Path, *flags: str, **more: str) -> subprocess.CompletedProcess:
    env = (
        {k: v for k, v in os.environ.items() if not k.startswith("PERCEPT_")}
        | {"PERCEPT_HOME": str(home), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
        | more
    )
    command = [
        sys.executable,
        "notebooks/01_train_combined.py",
        "-f",
        "recipes/combined/mini/01_train_combined.yaml",
        *flags,
    ]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A world of 24 images: flat betas with captions, and whole volumes."""
    folder, rng = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    trials = pd.DataFrame(
        {
            "trial": range(48),
            "image": np.repeat(range(24), 2),
            "session": 0,
            "run": -1,
            "repeat": [0, 1] * 24,
        }
    )
    trials["split"] = np.repeat(["train"] * 16 + ["val"] * 4 + ["test"] * 4, 2)
    about = {"source": "test", "units": "none", "normalisation": "none", "protocol": "toy"}
    for name, shape in (("flat", (60,)), ("volumes", (3, 4, 5))):
        dataset = folder / "data" / name
        write_images(
            dataset / "images.h5",
            rng.integers(0, 255, (24, 32, 32, 3), dtype=np.uint8),
            np.arange(24),
        )
        write_subject(
            dataset / "subj01",
            rng.normal(size=(48, *shape)).astype(np.float32),
            trials,
            None,
            about,
        )
        pd.DataFrame(
            {"image": np.repeat(range(24), 2), "caption": ["a red ball", ""] * 24}
        ).to_parquet(dataset / "captions.parquet")
    return folder


TOY = (
    "--batch_size",
    "8",
    "--num_epochs",
    "2",
    "--timesteps",
    "4",
    "--laion_prior=",
    "--h",
    "16",
    "--num_inference_steps",
    "2",
    "--precision",
    "no",
)


@pytest.mark.slow(reason="executes a training notebook")
def test_the_notebook_trains_end_to_end_and_then_with_a_frozen_voxel2clip_and_clip_augmentation(
    home,
):
    joint = (
        "--decoder",
        "both",
        "--ridge_folds",
        "2",
        "--n_samples_save",
        "3",
        "--alpha_schedule",
        "linear",
    )
    done = launch(home, *TOY, *joint, "--dataset", "flat", "--model_name", "joint")
    assert done.returncode == 0, done.stderr
    stored = {path.name for path in (home / "results" / "joint" / "figures").iterdir()}
    assert {
        "01_samples_train_epoch001.png",
        "01_samples_val_epoch001.png",
        "01_training.png",
    } <= stored
    assert list(pd.read_csv(home / "results" / "joint" / "fid.csv").columns) == [
        "epoch",
        "val/FID",
    ]  # one image of training has no spread
    history = pd.read_csv(home / "train_logs" / "joint" / "high_level" / "history.csv")
    assert history["train/alpha"].tolist() == pytest.approx([0.5, 0.05]) and {
        "val/loss_mse",
        "val/loss_nce",
        "val/cosine_sim_base",
    } <= set(history)
    decoder, config = load_decoder(
        home / "train_logs" / "joint" / "high_level" / "last.safetensors"
    )
    assert (
        config["tokens"] == [1, 128]
        and not config["clip"]["norm_embs"]
        and (home / "train_logs" / "joint" / "high_level_ridge.safetensors").exists()
    )
    frozen = (
        "--no-combine_models",
        "--no-combine_losses",
        "--voxel2clip_path",
        "train_logs/joint/high_level/last.safetensors",
        "--n_samples_save",
        "0",
    )
    done = launch(
        home,
        *TOY,
        *frozen,
        "--dataset",
        "flat",
        "--model_name",
        "frozen",
        "--decoder",
        "network",
        "--clip_aug_mode",
        "y",
        "--clip_aug_prob",
        "1",
    )
    assert done.returncode == 0, done.stderr
    after, _ = load_decoder(home / "train_logs" / "frozen" / "high_level" / "last.safetensors")
    for key, value in decoder.voxel2clip.state_dict().items():
        assert torch.equal(value, after.voxel2clip.state_dict()[key]), (
            key
        )  # statistics of the norms, too
    assert not torch.equal(decoder.net.learned_query, after.net.learned_query)
    assert "train/loss_on_aug" in pd.read_csv(
        home / "train_logs" / "frozen" / "high_level" / "history.csv"
    )


@pytest.mark.slow(reason="executes a training notebook")
def test_the_notebook_learns_captions_from_whole_volumes_with_mixco(home):
    conv = (
        "--arch",
        "3dconv",
        "--voxel_dims",
        "3",
        "--conv_channels",
        "4,8",
        "--conv_strides",
        "2,2",
        "--use_mixco",
        "--faithful",
        "mixed_targets",
    )
    done = launch(
        home,
        *TOY,
        *conv,
        "--dataset",
        "volumes",
        "--model_name",
        "conv",
        "--decoder",
        "network",
        "--modality",
        "text",
        "--n_samples_save",
        "0",
    )
    assert done.returncode == 0, done.stderr
    assert load_decoder(home / "train_logs" / "conv" / "high_level" / "best.safetensors")[1][
        "model"
    ]["voxel2clip"]["kwargs"]["dims"] == [3, 4, 5]
    assert len(list((home / "data" / "volumes" / "targets").glob("captions-*.npy"))) == 1
    done = launch(home, *TOY, "--dataset", "volumes", "--model_name", "conv")
    assert done.returncode != 0 and "voxel_dims is 1" in done.stderr.splitlines()[-1]


@pytest.mark.slow(reason="executes notebooks")
def test_remote_data_come_from_the_hub_into_the_cache_and_then_from_there(home, tmp_path):
    rng, n = np.random.default_rng(1), 330
    trials = pd.DataFrame(
        {
            "trial": range(n),
            "image": range(n),
            "session": 0,
            "run": -1,
            "repeat": 0,
            "split": ["train"] * 320 + ["test"] * 10,
        }
    )
    images = rng.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8)
    mindeye_format.write(
        tmp_path / "made",
        1,
        SourceData(rng.normal(size=(n, 30)).astype(np.float32), trials, images, np.arange(n)),
        layout=mindeye.EARLY,
    )
    files = {
        str(path.relative_to(tmp_path / "made")): path.read_bytes()
        for path in (tmp_path / "made").rglob("*")
        if path.is_file()
    }
    cache, more = (
        tmp_path / "cache",
        (
            "--decoder",
            "network",
            "--n_samples_save",
            "0",
            "--num_epochs",
            "1",
            "--dataset",
            "remote",
        ),
    )
    with hub_server({("dataset", "pscotti/naturalscenesdataset"): files}) as hub:
        done = launch(
            home,
            *TOY,
            *more,
            "--model_name",
            "remote",
            "--remote_data",
            "--cache_dir",
            str(cache),
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "hf"),
        )
        assert done.returncode == 0, done.stderr
        assert {path.name for path in cache.rglob("*.tar")} == {
            Path(name).name for name in files if name.endswith(".tar")
        }
    assert len(pd.read_parquet(home / "data" / "remote" / "subj01" / "trials.parquet")) == n
    done = launch(
        home,
        *TOY,
        *more,
        "--model_name",
        "again",
        "--remote_data",
        "--cache_dir",
        str(cache),
        HF_ENDPOINT=hub.url,
    )  # the hub is gone
    assert done.returncode == 0, done.stderr
