"""Data sets: the layout, skipped files, the published augmentation, and samples that depend on their index only."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flexvar_ref.errors import DataError
from flexvar_ref.training import scenes
from flexvar_ref.training.config import Data
from flexvar_ref.training.data import Augmentation, Dataset, ImageFolder, Scenes, batch, to_signed
from flexvar_ref.training.scenes.stream import Stream
from flexvar_ref.training.sources import open_data

FORMATS = ("a.png", "b.JPEG", "c.webp")


def paint(path: Path, level: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of three images. Image k of class c is grey at level 20 + 10 · (3 c + k)."""
    for label, name in enumerate(("zebra", "ant", "mole")):
        for k, file in enumerate(FORMATS):
            paint(tmp_path / name / file, 20 + 10 * (3 * label + k))
    (tmp_path / "ant" / "notes.txt").write_text("no image", encoding="utf-8")
    paint(tmp_path / ".cache" / "x.png", 0)
    paint(tmp_path / "loose.png", 0)
    return tmp_path


def test_layout(folder: Path) -> None:
    data = ImageFolder(folder, 16, training=False)
    assert data.classes == ("ant", "mole", "zebra") and len(data) == data.length == 9 and data.skipped == 0
    images, labels = batch(data, 0, 10)
    assert images.shape == (10, 3, 16, 16) and images.dtype == np.float32
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0]  # the first image follows the last
    levels = [50, 60, 70, 80, 90, 100, 20, 30, 40, 50]
    np.testing.assert_allclose(images.mean((1, 2, 3)), np.array(levels) / 127.5 - 1, atol=0.02)  # JPEG, WebP are lossy


def test_deeper_folders_and_other_modes(tmp_path: Path) -> None:
    for file, mode in {"deep/er/x.png": "L", "p.png": "P", "t.png": "RGBA", "one.png": "1", "c.jpg": "CMYK"}.items():
        paint(tmp_path / "only" / file, 255, mode=mode)
    data = ImageFolder(tmp_path, (8, 12), training=False)
    images, _ = batch(data, 0, 5)
    assert len(data) == 5 and images.shape == (5, 3, 8, 12)
    np.testing.assert_allclose(images, 1, atol=0.02)


def test_photos_are_rotated_by_their_exif_orientation(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 40), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 40, 20))  # the upper half is dark
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "c").mkdir()
    image.save(tmp_path / "c" / "a.jpg", exif=exif)
    pixels, _ = ImageFolder(tmp_path, 16, training=False).sample(0)
    assert pixels[:, 0].mean() > 0.9 and pixels[:, -1].mean() < -0.9


def spoil(folder: Path) -> None:
    """Add an empty file, a text, and a JPEG that is cut in the middle of its data and has a valid header."""
    (folder / "ant" / "empty.png").touch()
    (folder / "ant" / "text.jpg").write_text("not an image", encoding="utf-8")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "mole" / "cut.jpg")
    whole = (folder / "mole" / "cut.jpg").read_bytes()
    (folder / "mole" / "cut.jpg").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("check", [True, False])
def test_unreadable_files_are_skipped_and_counted(folder: Path, check: bool, caplog: pytest.LogCaptureFixture) -> None:
    spoil(folder)
    with caplog.at_level(logging.WARNING):
        data = ImageFolder(folder, 16, check=check)
        assert data.skipped == (2 if check else 0) and len(data) == (10 if check else 12)
        found = [data.sample(index) for index in range(2 * len(data))]
    assert data.skipped == 3
    assert np.isfinite([image for image, _ in found]).all() and {label for _, label in found} == {0, 1, 2}
    assert len(caplog.records) == (3 if check else 2)  # not one for each file; one is of the notes
    if check:
        assert "2 of 12 images" in caplog.text and "ant" in caplog.text


def test_files_skipped_before_do_not_change_samples(folder: Path) -> None:
    spoil(folder)
    used, fresh = (ImageFolder(folder, 16, check=False) for _ in range(2))
    for index in range(12):
        used.sample(index)
    for index in reversed(range(24)):
        (image, label), (other, same) = used.sample(index), fresh.sample(index)
        assert label == same
        np.testing.assert_array_equal(image, other)


def test_a_file_that_disappears_is_skipped(folder: Path) -> None:
    data = ImageFolder(folder, 16, training=False)
    (folder / "ant" / "a.png").unlink()
    assert data.sample(0)[0].mean() == pytest.approx(60 / 127.5 - 1, abs=0.02) and data.skipped == 1


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ([], "class folders"),
        (["loose.png"], "class folders"),
        (["c/notes.txt"], "no readable image"),
        (["c/broken.png"], "1 cannot be read"),
    ],
)
def test_folders_without_images_are_refused(tmp_path: Path, files: list[str], fault: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("no image", encoding="utf-8")
    with pytest.raises(DataError, match=fault) as caught:
        ImageFolder(tmp_path, 16)
    assert str(tmp_path) in caught.value.got


@pytest.mark.parametrize("name", ["__MACOSX", "empty", "texts", "deep", "broken"])
def test_a_class_folder_without_images_is_refused(folder: Path, name: str) -> None:
    """It would become a class that no sample has, and would move the labels of those behind it."""
    (folder / name / "deeper").mkdir(parents=True)
    if name in ("texts", "broken"):
        (folder / name / f"a.{'txt' if name == 'texts' else 'png'}").write_text("no image", encoding="utf-8")
    with pytest.raises(DataError, match=name):
        ImageFolder(folder, 16)


@pytest.mark.parametrize("suffix", ["bmp", "tif", "TIFF", "gif", "JPG"])
def test_every_common_format_is_read(folder: Path, suffix: str) -> None:
    paint(folder / "ant" / f"z.{suffix}", 200)
    data = ImageFolder(folder, 16, training=False)
    assert len(data) == 10 and data.sample(3)[0].mean() == pytest.approx(200 / 127.5 - 1, abs=0.02)


def test_files_of_other_kinds_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.avif", "b.heic", ".DS_Store", "._a.png"):
        (folder / "mole" / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        data = ImageFolder(folder, 16)
    assert data.ignored == 3 and data.skipped == 0 and len(data) == 9  # hidden files are no images
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "3 files" in caplog.text


def test_a_picture_of_another_format_under_the_name_of_an_image_is_skipped(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "ant" / "d.png", format="PPM")
    (folder / "ant" / "e.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "ant" / "f.tif")
    assert ImageFolder(folder, 16).skipped == 3


def test_held_out_images_must_have_the_same_classes(tmp_path: Path) -> None:
    for file in ("train/ant/a.png", "train/bee/a.png", "val/bee/a.png"):
        paint(tmp_path / file, 9)
    with pytest.raises(DataError, match="different class folders"):
        open_data(str(tmp_path), Data(size=16))
    paint(tmp_path / "val" / "ant" / "a.png", 9)
    assert open_data(str(tmp_path), Data(size=16))[1].classes == ("ant", "bee")


def test_other_folders_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing is not a folder"):
        ImageFolder(tmp_path / "missing", 16)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "broken.png").write_text("no image", encoding="utf-8")
    with pytest.raises(DataError, match="None of the 1 images"):
        ImageFolder(tmp_path, 16, check=False).sample(0)
    paint(tmp_path / "c" / "good.png", 9)
    with pytest.raises(DataError, match=r"size is \(0, 16\)"):
        ImageFolder(tmp_path, (0, 16))


def test_an_epoch_shows_every_image_once(folder: Path) -> None:
    data = ImageFolder(folder, 16, seed=3)
    epochs = [[round(float(data.sample(9 * epoch + k)[0].mean()), 1) for k in range(9)] for epoch in range(4)]
    labels = [sorted(data.sample(9 * epoch + k)[1] for k in range(9)) for epoch in range(4)]
    assert labels == 4 * [[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    assert len({tuple(epoch) for epoch in epochs}) == 4  # each in another order
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)


def coordinates(height: int, width: int) -> Image.Image:
    """Red is the column and green is the row, so that a crop shows its position."""
    row, column = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([column, row, np.zeros_like(row)], -1))


def window(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """The rows and columns of the source at the edges of a crop: top, bottom, left, right."""
    levels = (pixels + 1) * 127.5
    return levels[1, 0].mean(), levels[1, -1].mean(), levels[0, :, 0].mean(), levels[0, :, -1].mean()


def test_evaluation_is_resize_then_centre_crop() -> None:
    """As published: the shorter side is resized to round(1.125 · 128) = 144, then the centre is cropped.

    Values are rounded twice there and once here, so they differ by up to two levels.
    """
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    image = Image.fromarray(np.asarray(Image.fromarray(noise).resize((300, 200), Image.Resampling.BOX)))
    published = image.resize((216, 144), Image.Resampling.LANCZOS).crop((44, 8, 44 + 128, 8 + 128))
    found = Augmentation((128, 128), training=False)(image, Stream(0, 0, 0))
    difference = np.abs(found - to_signed(np.asarray(published))) * 127.5
    assert difference.max() <= 2 and difference.mean() < 0.2


def test_random_crops_cover_the_picture() -> None:
    """Every crop shows 1/1.125 of the shorter side. Crops differ, and they reach all borders."""
    image, augment = coordinates(64, 96), Augmentation((32, 32), training=True)
    found = np.array([window(augment(image, Stream(0, index, 0))) for index in range(200)])
    spans = found[:, 1] - found[:, 0], found[:, 3] - found[:, 2]
    expected = 64 * 31 / 36  # 32 of 36 pixels, between the centres of the outermost ones
    np.testing.assert_allclose(spans, expected, atol=1.5)
    assert found[:, 0].min() < 2 and found[:, 1].max() > 61  # top and bottom
    assert found[:, 2].min() < 2 and found[:, 3].max() > 93  # left and right
    assert len({tuple(row) for row in found.round()}) > 50


def test_crops_of_another_aspect_ratio_keep_the_pixels_square() -> None:
    top, bottom, left, right = window(Augmentation((32, 64), training=False)(coordinates(64, 64), Stream(0, 0, 0)))
    assert (right - left) / 63 == pytest.approx((bottom - top) / 31, rel=0.05)
    assert right - left > 50


def test_small_images_are_enlarged() -> None:
    assert Augmentation((32, 32))(coordinates(5, 3), Stream(0, 0, 0)).shape == (3, 32, 32)


def test_extreme_images_need_little_memory() -> None:
    """Only the crop is resized. The whole image of 30 000 × 2 would become 2 160 000 × 144."""
    assert Augmentation((128, 128))(Image.new("RGB", (30_000, 2)), Stream(0, 0, 0)).shape == (3, 128, 128)


def test_flips_are_half_of_all_and_only_in_training() -> None:
    image = coordinates(36, 36)

    def flipped(flip: bool, training: bool) -> int:
        augment = Augmentation((32, 32), training, flip)
        windows = [window(augment(image, Stream(0, index, 0))) for index in range(200)]
        return sum(left > right for _, _, left, right in windows)

    assert 70 < flipped(flip=True, training=True) < 130
    assert flipped(flip=False, training=True) == flipped(flip=True, training=False) == 0


def test_levels_fill_the_range() -> None:
    levels = to_signed(np.array([[[0, 127, 255]]], np.uint8))
    assert levels.dtype == np.float32 and levels.shape == (3, 1, 1)
    assert levels[0, 0, 0] == -1 and levels[2, 0, 0] == 1 and abs(levels[1, 0, 0]) < 0.005


def data_sets(folder: Path) -> list[Dataset]:
    return [ImageFolder(folder, 16, seed=1, flip=True), Scenes(16, seed=1)]


def test_a_sample_depends_on_its_index_alone(folder: Path) -> None:
    """It is the same after a resume, in another order, and in another process."""
    for first, second in zip(data_sets(folder), data_sets(folder), strict=True):
        later = pickle.loads(pickle.dumps(second))
        images, labels = batch(first, 0, 30)
        tail, tail_labels = batch(later, 20, 10)
        np.testing.assert_array_equal(images[20:], tail)
        np.testing.assert_array_equal(labels[20:], tail_labels)
        assert images.dtype == np.float32 and labels.dtype == np.int64
        assert images.min() >= -1 and images.max() <= 1


def test_scenes_as_a_data_set() -> None:
    data, held_out = Scenes((24, 36), seed=0), Scenes((24, 36), seed=1)
    assert data.classes == scenes.CLASSES and data.length is None
    image, label = data.sample(17)
    drawn, same = scenes.render(0, 17, (24, 36))
    assert label == same == 17 % len(data.classes) and image.shape == (3, 24, 36)
    np.testing.assert_array_equal(image, to_signed(drawn))
    assert np.abs(image - held_out.sample(17)[0]).mean() > 0.02
