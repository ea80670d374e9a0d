"""Scenes: the same on every machine, drawn to fit every size, varied, and distinguishable by class."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flexvar_ref.errors import InvalidInput
from flexvar_ref.training import scenes
from flexvar_ref.training.scenes.canvas import Canvas
from flexvar_ref.training.scenes.colour import Palettes, gradient, rgb
from flexvar_ref.training.scenes.stream import Stream

N = len(scenes.CLASSES)
RECORDED = {
    "sunset over the sea": [109, 116, 101, 123],
    "mountain peaks": [183, 201, 169, 187],
    "moonlit night": [88, 59, 63, 52],
    "misty forest": [203, 190, 97, 99],
    "desert dunes": [215, 203, 172, 178],
    "city skyline": [73, 73, 109, 120],
    "snowfield": [211, 219, 219, 207],
    "flower meadow": [203, 188, 144, 143],
    "rainbow over hills": [165, 177, 160, 161],
    "hot-air balloons": [195, 198, 170, 175],
    "northern lights": [51, 36, 85, 91],
    "cherry blossom": [208, 208, 203, 181],
}
STREAM = [0.06344102965932141, 0.707504754819708, 0.27756060377104574]


def small(image: NDArray[np.uint8], side: int = 8) -> NDArray[np.float64]:
    """Block means, (side, side, 3)."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX), np.float64)


def draws(size: tuple[int, int], count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.stack([scenes.render(seed, index, size)[0] for index in range(count)])


def test_classes() -> None:
    assert N >= 10 and len(set(scenes.CLASSES)) == N


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    for label in range(N):
        image, found = scenes.render(3, 7, (48, 64), label)
        assert found == label and image.shape == (48, 64, 3) and image.dtype == np.uint8
        np.testing.assert_array_equal(image, scenes.render(3, 7, (48, 64), label)[0])
        others = [scenes.render(4, 7, (48, 64), label), scenes.render(3, 8, (48, 64), label)]
        others.append(scenes.render(3, 7, (48, 64), (label + 1) % N))
        assert all(np.abs(image.astype(int) - other).mean() > 3 for other, _ in others), scenes.CLASSES[label]


def test_scenes_of_the_recording() -> None:
    """The brightness of the four quarters, to one level: the last bits of a power may differ between machines."""
    for label, name in enumerate(scenes.CLASSES):
        image, _ = scenes.render(0, 1, (64, 64), label)
        np.testing.assert_allclose(small(image, 2).mean(-1).ravel(), RECORDED[name], atol=1, err_msg=name)


def test_labels_come_in_turn() -> None:
    labels = [scenes.render(0, index, (8, 8))[1] for index in range(3 * N)]
    assert labels == 3 * list(range(N))


def test_a_larger_picture_shows_the_same_scene() -> None:
    """Reduced to one size, the pictures differ by edges and details below a pixel. Another scene differs more."""
    for label, name in enumerate(scenes.CLASSES):
        large, same = scenes.render(1, 5, (192, 192), label)[0], scenes.render(1, 5, (96, 96), label)[0]
        other = scenes.render(1, 6, (96, 96), label)[0]
        assert np.abs(small(large, 24) - small(same, 24)).mean() < 2.5, name
        assert np.abs(small(large, 24) - small(other, 24)).mean() > 5, name


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 128)])
def test_another_aspect_ratio_is_drawn_to_fit(size: tuple[int, int]) -> None:
    for label, name in enumerate(scenes.CLASSES):
        square, wide = scenes.render(1, 5, (64, 64), label)[0], scenes.render(1, 5, size, label)[0]
        assert wide.shape == (*size, 3)
        assert np.abs(small(square, 1) - small(wide, 1)).max() < 24, name  # the palette is the same
        stretched = np.asarray(Image.fromarray(square).resize(size[::-1], Image.Resampling.BICUBIC), float)
        assert np.abs(stretched - wide).mean() > 1, name  # the pixels are not


@pytest.mark.parametrize("size", [(40, 40), (40, 80), (80, 40), (256, 256)])
def test_discs_are_round_and_exact(size: tuple[int, int]) -> None:
    """The covered area is π r² to a pixel of the edge, and width equals height, at any aspect ratio."""
    canvas = Canvas(size)
    mask = canvas.disc(0.07, 0.5, 0.3).mask
    assert mask.sum() / canvas.unit**2 == pytest.approx(np.pi * 0.09, rel=0.01)
    assert abs(int((mask.sum(0) > 0).sum()) - int((mask.sum(1) > 0).sum())) <= 1


def test_what_lies_below_a_line_is_exact() -> None:
    canvas = Canvas((20, 30))
    slope = 0.31 + 0.4 * canvas.xs
    share = (1 - slope.mean()) / 1
    assert canvas.below(slope).mask.sum() / (20 * 30) == pytest.approx(share, abs=1e-5)
    band = canvas.between(slope, slope + 0.013)  # thinner than a pixel
    assert band.mask.sum() / (20 * 30) == pytest.approx(0.013, abs=1e-5)


def test_small_dots_keep_their_light() -> None:
    """A dot smaller than a pixel adds about as much light as its area, on four grids of different fineness."""
    for side in (32, 48, 64, 96):
        canvas = Canvas((side, side))
        canvas.dots(np.array([0.01]), np.array([0.52]), np.array([0.02]), np.ones((3, 1), np.float32), np.ones(1))
        assert canvas.rgb[0].sum() / side**2 == pytest.approx(np.pi * 0.02**2, rel=0.4)


def test_every_class_varies() -> None:
    """Any two scenes of a class differ, most of them a lot, and none is flat, black or white."""
    for label, name in enumerate(scenes.CLASSES):
        found = np.stack([scenes.render(2, index, (32, 32), label)[0] for index in range(12)]).astype(float)
        assert (found.std(axis=(1, 2, 3)) > 10).all() and (found.mean(axis=(1, 2, 3)) < 245).all(), name
        coarse = np.stack([small(image.astype(np.uint8)) for image in found])
        apart = np.abs(coarse[:, None] - coarse[None]).mean(axis=(2, 3, 4))[np.triu_indices(12, 1)]
        assert apart.min() > 3 and np.median(apart) > 10, name


def test_a_linear_probe_distinguishes_the_classes() -> None:
    """On 8 × 8 colours of held-out scenes. Negative control: with shuffled labels it fails."""

    def features(seed: int, count: int) -> NDArray[np.float64]:
        flat = np.stack([small(image).ravel() for image in draws((24, 24), count, seed)]) / 128 - 1
        return np.concatenate([flat, flat**2, np.ones((count, 1))], 1)

    train, held_out = features(0, 40 * N), features(1, 10 * N)
    targets = np.eye(N)[np.arange(40 * N) % N]

    def accuracy(targets: NDArray[np.float64]) -> float:
        probe = np.linalg.solve(train.T @ train + 3 * np.eye(train.shape[1]), train.T @ targets)
        return float(((held_out @ probe).argmax(1) == np.arange(10 * N) % N).mean())

    assert accuracy(targets) > 0.85
    assert accuracy(np.random.default_rng(0).permutation(targets)) < 0.3


@pytest.mark.parametrize("size", [(8, 8), (8, 60), (60, 8), (33, 57)])
def test_any_size(size: tuple[int, int]) -> None:
    assert draws(size, N).shape == (N, *size, 3)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((0, 0, (7, 64)), "size is (7, 64)"),
        ((0, 0, (64, 5000)), "size is (64, 5000)"),
        ((-1, 0, (64, 64)), "seed is -1"),
        ((0, 2**64, (64, 64)), f"index is {2**64}"),
        ((0, 0, (64, 64), N), f"label is {N}"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: tuple[object, ...], fault: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        scenes.render(*arguments)  # type: ignore[arg-type]
    assert fault in caught.value.got


def test_the_stream_is_philox() -> None:
    """The upper 53 bits of the raw words of Philox 4×64-10, as recorded."""
    stream = Stream(1, 2, 3)
    np.testing.assert_array_equal(stream.uniform(2, 2).ravel(), Stream(1, 2, 3).uniform(4))
    np.testing.assert_allclose(Stream(1, 2, 3).uniform(3), STREAM, atol=1e-15)
    many = Stream(0, 0, 0).uniform(20_000)
    assert many.min() >= 0 and many.max() < 1 and many.mean() == pytest.approx(0.5, abs=0.01)
    assert {stream.whole(-1, 1) for _ in range(100)} == {-1, 0, 1}


def test_palettes_keep_their_roles() -> None:
    """Colours vary together: the dark one stays dark, the light one stays light, and all stay inside 0…1."""
    palettes = Palettes("101020 f0e0c0", "201010 c0e0f0")
    for index in range(50):
        dark, light = palettes.draw(Stream(0, index, 0))
        assert dark.max() < 0.25 < 0.6 < light.max() <= 1 and min(dark.min(), light.min()) >= 0


def test_a_gradient_ends_in_its_colours() -> None:
    first, last = rgb("204060"), rgb("e0c0a0")
    found = gradient(np.array([-3.0, 0.5, 3.0]), [first, last])
    np.testing.assert_allclose(found[:, 1], (first + last)[:, 0] / 2, atol=1e-6)
    assert np.abs(found[:, 0] - first[:, 0]).max() < 0.08 and np.abs(found[:, 2] - last[:, 0]).max() < 0.08
