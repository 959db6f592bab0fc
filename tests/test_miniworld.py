"""The mini world: what its splits hold out, that it is deterministic, and that its cortex behaves
like the one it stands for.
"""

import numpy as np
import pytest

from src import miniworld as world
from src.utils import PerceptError


def combine(scene_object, content) -> tuple[int, int, int]:
    return scene_object.category, scene_object.colour, content.scene


def test_test_combinations_never_occur_in_training():
    train = set()
    for i in range(4000):
        content = world.compose_image(0, i, "train")
        train |= {combine(scene_object, content) for scene_object in content.objects}
    val, test = set(), set()
    for i in range(300):
        content = world.compose_image(0, i, "val")
        val.add(combine(content.main, content))
        content = world.compose_image(0, i, "test")
        test.add(combine(content.main, content))
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


@pytest.mark.parametrize("category", range(len(world.CATEGORIES)))
def test_every_kind_is_drawn_large_and_in_its_colour(category):
    def paint(colour):
        scene_object = world.SceneObject(category, colour, 0, 0.5, 0.53, 0.40, 0.0)
        content = world.ImageContent(7, 0, 0.58, 1, (scene_object,))
        return world.render_image(content).astype(float)

    # red against blue: the pixels that carry the object's colour
    changed = np.abs(paint(0) - paint(4)).sum(2) > 60
    assert 0.05 < changed.mean() < 0.75


def test_captions_are_five_different_sentences_that_name_the_object():
    for i in range(50):
        content = world.compose_image(0, i)
        captions, label = world.write_captions(content), world.make_label_row(content)
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
def shown_images():
    contents = [world.compose_image(0, i) for i in range(120)]
    return np.stack([world.render_image(content) for content in contents]), contents


def test_noise_ceilings_are_those_of_fmri(cortex):
    ceiling = cortex.voxels.noise_ceiling
    assert 0.10 <= ceiling.median() <= 0.20
    early, higher = (
        ceiling[cortex.voxels[list(areas)].any(axis=1)].mean()
        for areas in (("V1", "V2", "V3"), ("FFA", "PPA", "LO"))
    )
    assert early > higher


def test_signal_is_calibrated_and_noise_has_the_promised_size(cortex, shown_images):
    signal = cortex.respond(*shown_images)
    assert signal.shape == (120, world.N_VOXELS[7]) and abs(signal.std(0).mean() - 1) < 0.15
    # one session: no drift between repeats
    scan = cortex.scan(signal, repeats=3, trials_per_session=360)
    # (images, repeats, voxels)
    responses = np.stack([scan.betas[scan.trials.row == i] for i in range(120)])
    noise, total = responses.var(1, ddof=1).mean(0), scan.betas.var(0)
    assert np.corrcoef(1 - noise / total, cortex.voxels.noise_ceiling)[0, 1] > 0.6


def test_every_image_is_shown_three_times_over_sessions_that_drift(cortex, shown_images):
    scan = cortex.scan(cortex.respond(*shown_images), trials_per_session=90)
    assert (scan.trials.groupby("row").size() == 3).all() and scan.trials.session.nunique() == 4
    means = np.stack([scan.betas[scan.trials.session == s].mean(0) for s in range(4)])
    assert means.std(0).mean() > 0.2


def test_early_voxels_see_pixels_and_higher_voxels_see_what_is_there(cortex, shown_images):
    images, contents = shown_images
    early = cortex.voxels[["V1", "V2", "V3", "hV4"]].any(axis=1).to_numpy()
    responses = cortex.respond(images, contents)
    mirrored = cortex.respond(images[:, :, ::-1], contents)
    assert not np.allclose(responses[:, early], mirrored[:, early])
    assert np.allclose(responses[:, ~early], mirrored[:, ~early])
    other = cortex.respond(images, contents[::-1])
    assert np.allclose(responses[:, early], other[:, early])
    assert not np.allclose(responses[:, ~early], other[:, ~early])


def test_energy_does_not_change_with_the_sign_of_contrast(cortex):
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(1, 32, 32, 1)).repeat(3, 3)
    flat = (pattern * 0.2).transpose(0, 3, 1, 2).reshape(1, -1)

    def energy(contrast):
        even, odd = contrast * flat @ cortex.even.T, contrast * flat @ cortex.odd.T
        return np.sqrt(even**2 + odd**2)

    assert np.allclose(energy(1), energy(-1))


def test_subjects_differ_and_unknown_ones_are_refused():
    assert len({world.N_VOXELS[s] for s in (1, 2, 5, 7)}) == 4
    with pytest.raises(PerceptError, match="subjects 1 to 8"):
        world.VisualCortex(9)
