"""The measurements of edits, on a pipeline and a network whose answers are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_evaluation.editing.editor import EditOptions, Editor, LabelledPictures
from flexvar_evaluation.editing.inpainting import GREY, inpainting
from flexvar_evaluation.editing.refining import refining
from flexvar_evaluation.editing.sizes import expanding, generating
from flexvar_evaluation.judging import features_of
from flexvar_evaluation.network.contract import Head
from flexvar_evaluation.network.features import FeatureNetwork, Features
from flexvar_evaluation.reference import Reference, make_reference
from flexvar_runtime import FlexVARPipeline, Guidance, Sampling, ScaleSchedule

Pixels = NDArray[np.uint8]
COUNT, SIDE, FACTOR = 9, 16, 4
COLOURS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]], np.uint8)  # of the three classes
OPTIONS = EditOptions(guidance=Guidance(2.5), sampling=Sampling(), seed=7, batch=4, feather=1)


class Colours:
    """A feature network whose features are the mean colour. It recognises the three colours."""

    name = identity = "colours"
    head = Head(np.eye(3, dtype=np.float32))

    def features(self, images: Pixels) -> Features:
        return Features(images.mean((1, 2), dtype=np.float32), None)


class Painter:
    """A pipeline that paints everything new in the colour of the class, or grey without a class. It records calls."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(classes=3, downsampling=FACTOR)
        self.bundle, self.backend = SimpleNamespace(sha256="0" * 64), SimpleNamespace(name="ort-cpu", device=None)
        self.edits: list[dict[str, Any]] = []
        self.calls: list[tuple[int, list[int]]] = []

    def __call__(
        self, labels: list[int], schedule: ScaleSchedule, guidance: Any, sampling: Any, seed: int, first_index: int
    ) -> Any:
        assert (guidance, sampling, seed) == (OPTIONS.guidance, OPTIONS.sampling, OPTIONS.seed)
        self.calls.append((first_index, labels))
        height, width = (side * FACTOR for side in schedule[-1])
        return SimpleNamespace(images=painted(np.array(labels), (height, width)))

    def edit(self, pictures: list[Pixels], task: str, **options: Any) -> Any:
        self.edits.append({"task": task, "pictures": len(pictures), **options})
        height, width = options.get("size", pictures[0].shape[:2])
        labels = options["labels"]
        new = np.full((len(pictures), height, width, 3), 90, np.uint8)
        if labels is not None:
            new = painted(np.array(labels), (height, width))
        if task == "inpaint":
            mask = options["mask"]
            kept = np.stack(pictures) if "paste" in options else np.clip(np.stack(pictures), 1, None)
            new = np.where(mask[..., None], new, kept)
        return SimpleNamespace(images=new)

    def encode(self, pixels: Pixels) -> Pixels:
        return pixels

    def decode(self, tokens: Pixels) -> Pixels:
        return tokens


def painted(labels: NDArray[np.int64], size: tuple[int, int]) -> Pixels:
    images = np.empty((len(labels), *size, 3), np.uint8)
    images[:] = COLOURS[labels][:, None, None]
    return images


@pytest.fixture
def painter() -> Painter:
    return Painter()


@pytest.fixture
def editor(painter: Painter) -> Editor:
    return Editor(cast(FlexVARPipeline, painter), OPTIONS)


@pytest.fixture
def network() -> FeatureNetwork:
    return cast(FeatureNetwork, Colours())


@pytest.fixture
def pictures() -> LabelledPictures:
    """Pictures whose edge is black and whose inner part has the colour of the class."""
    labels = np.arange(COUNT) % 3
    pixels = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8)
    pixels[:, 4:12, 4:12] = painted(labels, (8, 8))
    return LabelledPictures(pixels, labels)


def reference_of(network: FeatureNetwork, pixels: Pixels) -> Reference:
    features = features_of(network, pixels)
    return make_reference(
        features, (None, None), network.head, source="", sha256="", size=(SIDE, SIDE), network_name=network.name
    )


def test_inpainting(editor: Editor, painter: Painter, network: FeatureNetwork, pictures: LabelledPictures) -> None:
    """The right filling is recognised. One without a class is grey, so it is not: argmax of equal logits is class 0."""
    result = inpainting(editor, network, pictures)
    assert (result.recognised, result.recognised_reconstructed) == (1, 1)
    assert result.recognised_with_hole == pytest.approx(1 / 3) and (result.holes[:, 5, 5] == GREY).all()
    filled, grey = result.with_class, result.without_class
    assert (filled.recognised, filled.recognised_pasted) == (1, 1)
    assert grey.recognised == grey.recognised_pasted == pytest.approx(1 / 3)
    assert filled.seam_pasted == pytest.approx(1) and filled.seam < 1  # without pasting the edge is 1, not 0
    assert filled.psnr_outside == pytest.approx(20 * np.log10(255)) and filled.changed == 0
    np.testing.assert_array_equal(filled.pixels, pictures.pixels)
    starts = [(edit["first_index"], edit["pictures"]) for edit in painter.edits]
    assert starts == [(0, 4), (4, 4), (8, 1)] * 4  # plain and pasted, with and without a class
    assert {edit["seed"] for edit in painter.edits} == {OPTIONS.seed}
    assert [edit["guidance"] for edit in painter.edits[::6]] == [OPTIONS.guidance, None]
    assert [edit.get("feather") for edit in painter.edits[::3]] == [None, 1, None, 1]


def test_pixels_that_should_stay_are_counted(
    editor: Editor, network: FeatureNetwork, pictures: LabelledPictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that pastes one pixel wrongly beyond the feather, and another within it."""
    edit = Painter.edit

    def careless(self: Painter, some: list[Pixels], task: str, **options: Any) -> Any:
        output = edit(self, some, task, **options)
        output.images[:, 0, 0, 0] += 9
        output.images[:, 3, 3] += 9
        return output

    monkeypatch.setattr(Painter, "edit", careless)
    assert inpainting(editor, network, pictures).with_class.changed == COUNT


def test_refining(editor: Editor, painter: Painter, network: FeatureNetwork) -> None:
    """Pictures of one colour are refined perfectly. A reference of another colour is at its distance."""
    labels = np.arange(COUNT) % 3
    plain = LabelledPictures(painted(labels, (SIDE, SIDE)), labels)
    result = refining(editor, network, plain, reference_of(network, plain.pixels), (0.2, 0.4))
    assert list(result.by_strength) == [None, 0.2, 0.4]
    for row in (result.original, result.bicubic, *result.by_strength.values()):
        assert (row.recognised, row.psnr) == (1, 99) and row.frechet == pytest.approx(0, abs=1e-3)
    assert [edit["strength"] for edit in painter.edits[::3]] == [None, 0.2, 0.4]
    assert {edit["size"] for edit in painter.edits} == {(SIDE, SIDE)}
    brighter = reference_of(network, plain.pixels + np.uint8(10))
    assert refining(editor, network, plain, brighter, ()).bicubic.frechet == pytest.approx(300, rel=1e-3)


def test_other_sizes(editor: Editor, painter: Painter, network: FeatureNetwork, pictures: LabelledPictures) -> None:
    expanded = expanding(editor, network, pictures, (SIDE, 2 * SIDE))
    assert expanded.recognised == 1 and expanded.pixels.shape == (COUNT, SIDE, 2 * SIDE, 3)
    assert {edit["paste"] for edit in painter.edits} == {True}
    labels = np.arange(COUNT) % 3
    schedule, reference = ScaleSchedule.parse("1_2x4"), reference_of(network, painted(labels, (8, 16)))
    generated = generating(editor, network, schedule, COUNT, reference)
    assert generated.pixels.shape == (COUNT, 8, 16, 3) and generated.recognised == 1
    assert generated.frechet == pytest.approx(0, abs=1e-3)
    assert painter.calls == [(0, [0, 1, 2, 0]), (4, [1, 2, 0, 1]), (8, [2])]


def test_with_a_real_pipeline(tiny_bundle: Path, tiny_network: Path) -> None:
    """Every measurement runs, and pasted pixels stay. The metrics of random weights mean nothing."""
    rng = np.random.default_rng(0)
    some = LabelledPictures(rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8), np.arange(5) % 3)
    with (
        FlexVARPipeline.from_bundle(tiny_bundle, backend="ort-cpu", threads=1) as pipe,
        FeatureNetwork.open(tiny_network, threads=1) as network,
    ):
        editor, reference = Editor(pipe, OPTIONS), reference_of(network, some.pixels)
        filled = inpainting(editor, network, some)
        assert filled.with_class.changed == filled.without_class.changed == 0
        assert (filled.with_class.pixels != filled.without_class.pixels).any()
        assert refining(editor, network, some, reference, (0.5,), factor=2).by_strength.keys() == {None, 0.5}
        assert expanding(editor, network, some, (8, 16)).pixels.shape == (5, 8, 16, 3)
        again = [generating(editor, network, ScaleSchedule.parse("1_2x3"), 5, reference) for _ in range(2)]
        np.testing.assert_array_equal(again[0].pixels, again[1].pixels)
