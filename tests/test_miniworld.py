"""The mini world: what its splits hold out, that it is deterministic, and that its cortex behaves
like the one it stands for.
"""

import numpy as np
import pytest

from src import miniworld as world
from src.utils import PerceptError


def combinations(split: str, count: int) -> set[tuple[int, int, int]]:
    made = [world.compose_image(0, i, split) for i in range(count)]
    return {(thing.category, thing.colour, what.scene) for what in made for thing in what.objects}


def test_test_combinations_never_occur_in_training():
    train, val = (
        combinations("train", 4000),
        {
            (w.objects[-1].category, w.objects[-1].colour, w.scene)
            for w in (world.compose_image(0, i, "val") for i in range(300))
        },
    )
    test = {
        (w.objects[-1].category, w.objects[-1].colour, w.scene)
        for w in (world.compose_image(0, i, "test") for i in range(300))
    }
    assert not test & train and not val & train and not test & val
    for pair in ((0, 1), (0, 2), (1, 2)):  # every pair of attributes of a test image has been seen
        assert {tuple(np.array(c)[list(pair)]) for c in test} <= {
            tuple(np.array(c)[list(pair)]) for c in train
        }


def test_there_is_enough_in_the_world():
    assert len(world.CATEGORIES) >= 16 and len(world.SCENES) >= 8 and len(world.COLOURS) >= 8


def test_images_are_a_pure_function_of_seed_split_and_index():
    in_blocks = np.concatenate(list(world.render_blocks(3, "test", 260, workers=2)))
    alone = world.render_image(world.compose_image(3, 255, "test"), 3)
    assert in_blocks.shape == (260, 32, 32, 3) and in_blocks.dtype == np.uint8
    assert np.array_equal(in_blocks[255], alone)
    assert not np.array_equal(alone, world.render_image(world.compose_image(4, 255, "test"), 4))


@pytest.mark.parametrize("kind", range(len(world.CATEGORIES)))
def test_every_kind_is_drawn_large_and_in_its_colour(kind):
    def paint(colour):
        return world.render_image(
            world.ImageContent(
                7, 0, 0.58, 1, (world.SceneObject(kind, colour, 0, 0.5, 0.53, 0.40, 0.0),)
            )
        ).astype(float)

    changed = (
        np.abs(paint(0) - paint(4)).sum(2) > 60
    )  # red against blue: the pixels that carry the object's colour
    assert 0.05 < changed.mean() < 0.75


def test_captions_are_five_different_sentences_that_name_the_object():
    for i in range(50):
        what = world.compose_image(0, i)
        captions, label = world.write_captions(what), world.make_label_row(what)
        assert len(set(captions)) == 5
        assert all(label["kind"] in c and label["colour"] in c for c in captions)


def test_tables_have_a_row_an_image_and_five_captions():
    labels, captions = world.make_tables(0, "val", 20)
    assert len(labels) == 20 and list(captions.groupby("image").size()) == [5] * 20
    assert {"scene", "kind", "colour", "pattern", "place", "light"} <= set(labels)


@pytest.fixture(scope="module")
def cortex():
    return world.VisualCortex(7)


@pytest.fixture(scope="module")
def shown():
    made = [world.compose_image(0, i) for i in range(120)]
    return np.stack([world.render_image(what) for what in made]), made


def test_noise_ceilings_are_those_of_fmri(cortex):
    ceiling = cortex.voxels.noise_ceiling
    assert 0.10 <= ceiling.median() <= 0.20
    early, higher = (
        ceiling[cortex.voxels[list(areas)].any(axis=1)].mean()
        for areas in (("V1", "V2", "V3"), ("FFA", "PPA", "LO"))
    )
    assert early > higher


def test_signal_is_calibrated_and_noise_has_the_promised_size(cortex, shown):
    signal = cortex.respond(*shown)
    assert signal.shape == (120, world.N_VOXELS[7]) and abs(signal.std(0).mean() - 1) < 0.15
    scan = cortex.scan(
        signal, repeats=3, trials_per_session=360
    )  # one session: no drift between repeats
    responses = np.stack(
        [scan.betas[scan.trials.row == i] for i in range(120)]
    )  # (images, repeats, voxels)
    noise, total = responses.var(1, ddof=1).mean(0), scan.betas.var(0)
    assert np.corrcoef(1 - noise / total, cortex.voxels.noise_ceiling)[0, 1] > 0.6


def test_every_image_is_shown_three_times_over_sessions_that_drift(cortex, shown):
    scan = cortex.scan(cortex.respond(*shown), trials_per_session=90)
    assert (scan.trials.groupby("row").size() == 3).all() and scan.trials.session.nunique() == 4
    means = np.stack([scan.betas[scan.trials.session == s].mean(0) for s in range(4)])
    assert means.std(0).mean() > 0.2


def test_early_voxels_see_pixels_and_higher_voxels_see_what_is_there(cortex, shown):
    images, made = shown
    early = cortex.voxels[["V1", "V2", "V3", "hV4"]].any(axis=1).to_numpy()
    here = cortex.respond(images, made)
    mirrored = cortex.respond(images[:, :, ::-1], made)
    assert not np.allclose(here[:, early], mirrored[:, early]) and np.allclose(
        here[:, ~early], mirrored[:, ~early]
    )
    other = cortex.respond(images, made[::-1])
    assert np.allclose(here[:, early], other[:, early]) and not np.allclose(
        here[:, ~early], other[:, ~early]
    )


def test_energy_does_not_change_with_the_sign_of_contrast(cortex):
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(1, 32, 32, 1)).repeat(3, 3)
    cortex_even, cortex_odd = cortex.even, cortex.odd
    flat = (pattern * 0.2).transpose(0, 3, 1, 2).reshape(1, -1)
    energy = [
        np.sqrt((s * flat @ cortex_even.T) ** 2 + (s * flat @ cortex_odd.T) ** 2) for s in (1, -1)
    ]
    assert np.allclose(*energy)


def test_subjects_differ_and_unknown_ones_are_refused():
    assert len({world.N_VOXELS[s] for s in (1, 2, 5, 7)}) == 4
    with pytest.raises(PerceptError, match="subjects 1 to 8"):
        world.VisualCortex(9)
