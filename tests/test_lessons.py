"""What notebooks 01, 03 and 06 leave to src: checks, sentences, and the kinds of systems."""

import numpy as np
import pandas as pd
import pytest
import torch

from src import models
from src.decoding.configs import DecoderSizes, build_decoder_config
from src.decoding.levels import Decoder, SeenImages
from src.decoding.systems import LatentSystem
from src.evaluation.scoring import find_table, list_beneath_baselines
from src.evaluation.scoring.outputs import describe_scores
from src.figures import plot_tokens
from src.networks.rebuild import build_decoder
from src.prior import BrainDiffusionPrior
from src.training import describe_history, high_level
from src.utils import PerceptError

PARAMETERS = {
    "faithful": "",
    "prior": True,
    "v2c": True,
    "laion_prior": "",
    "hidden": True,
    "timesteps": 0,
    "decoder": "ridge",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": False, "v2c": False}, "Neither prior nor v2c"),
        ({"laion_prior": "none.pth"}, "must be a file"),
        ({"timesteps": 1}, "at least 2 noise levels"),
    ],
)
def test_parameters_that_do_not_go_together_are_refused(change, message):
    assert high_level.check_parameters(PARAMETERS | {"faithful": "norm_decay"}, "cpu") == {
        "norm_decay"
    }
    with pytest.raises(PerceptError, match=message):
        high_level.check_parameters(PARAMETERS | change, "cpu")


def test_the_model_built_in_sight_is_the_one_that_the_dry_run_counts():
    """Notebook 01 builds its networks itself, `build_decoder_config` describes them."""
    sizes = {"h": 16, "n_blocks": 1, "use_projector": True, "projector_dim": 8}
    parameters = {
        **sizes,
        "hidden": True,
        "timesteps": 10,
        "prior_depth": 1,
        "prior_heads": 2,
        "prior_dim_head": 4,
    }
    config = build_decoder_config("01_train_high_level", parameters, DecoderSizes((5,), 3, 8))
    net = models.VersatileDiffusionPriorNetwork(
        dim=8, dim_head=4, heads=2, depth=1, num_tokens=3, learned_query_mode="pos_emb"
    )
    voxel2clip = models.BrainNetwork(in_dim=5, out_dim=24, clip_size=8, **sizes)
    model = BrainDiffusionPrior(
        net, voxel2clip=voxel2clip, image_embed_dim=8, timesteps=10, cond_drop_prob=0.2
    )
    assert build_decoder(config).config == model.config
    rebuilt = build_decoder(model.config).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_a_history_is_told_in_sentences(tmp_path):
    assert describe_history(tmp_path) == "No network was trained."
    table = pd.DataFrame({"epoch": [0, 1, 2], "val/loss": [3.0, 1.0, 2.0], "val/r2": [0, 0.5, 0.4]})
    table.to_csv(tmp_path / "history.csv", index=False)
    text = describe_history(tmp_path)
    assert "3 epochs" in text and "best 1.000 after epoch 2" in text and "best 0.500" in text


def make_record(value, better="higher", baseline=0.5):
    floors = {"shuffled": {"value": baseline}, "untrained": {"value": 0.9}}
    interval = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {"name": "m", "better": better, "floors": floors, "ceiling": {"value": 1.0}} | interval


def test_scores_that_no_baseline_is_below_are_named():
    assert not list(list_beneath_baselines([make_record(0.6), make_record(0.4, "lower")]))
    sentences = list(list_beneath_baselines([make_record(0.5), make_record(0.6, "lower")]))
    assert len(sentences) == 2 and "not better than its floor 'shuffled'" in sentences[0]
    assert "best baseline untrained 0.900; upper bound 1.000" in describe_scores([make_record(0.6)])


def test_a_table_that_there_is_not_is_a_sentence():
    tables = [{"title": "A", "note": "", "rows": [{"metric": "m", "x": 1}]}]
    assert find_table(tables, "A").loc["m", "x"] == 1 and "none" in find_table(tables, "B")


def test_tokens_are_drawn_less_their_mean():
    tokens = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    figure = plot_tokens({"true": tokens, "predicted": tokens + 1}, n=2)
    maps = [ax.images[0].get_array() for ax in figure.axes]
    assert len(maps) == 4 and np.allclose(maps[0], (tokens[0] - tokens.mean(0)).numpy())


class HalvedLatents:
    """An autoencoder whose image of a latent is half of it."""

    latent_shape = (3, 2, 2)

    def decode(self, latents):
        return latents / 2


def test_without_tokens_the_decoded_latent_is_the_reconstruction():
    ids = np.arange(2)
    seen = SeenImages(None, ids, torch.zeros(2, 3, 2, 2), 0, 1, ())
    decoder = Decoder("network", None, None, ())
    parameters = {"keep_samples": 4, "recons_per_sample": 2, "generator_batch": 8}
    autoencoder = HalvedLatents()
    system = LatentSystem(seen, decoder, parameters, "cpu", autoencoder, autoencoder)
    assert (system.count_samples(decoder), system.count_images_at_once(decoder)) == (4, 2)
    latents = torch.ones(2, 3, 2, 2)
    tokens, projected = system.predict_tokens(decoder, slice(None))
    samples = system.generate(tokens, slice(None), latents, 4)
    chosen = system.select(decoder, slice(None), projected, samples)
    assert samples.shape == (2, 1, 3, 2, 2) and torch.equal(chosen, latents / 2)
    stored = system.collect(decoder, tokens, projected, latents, samples)
    assert torch.equal(system.get_retrieval_rows(stored), latents.flatten(1))
