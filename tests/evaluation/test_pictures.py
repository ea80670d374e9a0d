"""Pictures from NPZ files and folders, and what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flexvar_evaluation.pictures import open_pictures
from flexvar_runtime.errors import ArtifactRefused, FlexVARError, InvalidInput

IMAGES: NDArray[np.uint8] = np.random.default_rng(2).integers(0, 256, (7, 6, 5, 3), np.uint8)


def folder_of(path: Path, names: list[str]) -> Path:
    path.mkdir()
    for name, image in zip(names, IMAGES, strict=False):
        Image.fromarray(image).save(path / name)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("start", "rows"), [(0, 3), (2, 3), (5, 100), (7, 1)])
def test_an_npz_file_is_read_from_any_picture_on(tmp_path: Path, save: object, start: int, rows: int) -> None:
    save(tmp_path / "x.npz", IMAGES, mu=np.zeros(3))  # type: ignore[operator]
    pictures = open_pictures(tmp_path / "x.npz")
    assert (pictures.count, pictures.size) == (7, (6, 5))
    blocks = [np.zeros((0, 6, 5, 3), np.uint8), *pictures.blocks(start, rows)]
    assert np.array_equal(np.concatenate(blocks), IMAGES[start:]) and all(len(block) <= rows for block in blocks)


@pytest.mark.parametrize(
    "array",
    [
        IMAGES.astype(np.float32),
        IMAGES[..., :2],
        IMAGES[0],
        IMAGES[:0],
        np.array([None, {}], object),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: NDArray[np.generic]) -> None:
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(ArtifactRefused):
        open_pictures(tmp_path / "x.npz")


@pytest.mark.parametrize("cut", [0, 50, 300, -30])
def test_a_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    np.savez(tmp_path / "x.npz", IMAGES)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:cut])
    with pytest.raises(FlexVARError):
        open_pictures(tmp_path / "x.npz")


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    names = ["b.png", "a.png", "d.bmp", "c.tiff"]
    pictures = open_pictures(folder_of(tmp_path / "x", names))
    (tmp_path / "x" / "readme.txt").write_text("no picture", encoding="utf-8")
    assert pictures.count == 4
    assert np.array_equal(np.concatenate(list(pictures.blocks(0, 3))), IMAGES[[1, 0, 3, 2]])
    assert np.array_equal(np.concatenate(list(pictures.blocks(3, 3))), IMAGES[[2]])


def test_a_picture_of_another_size_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", ["a.png"])
    Image.fromarray(IMAGES[0][:5]).save(folder / "b.png")
    with pytest.raises(ArtifactRefused, match=re.escape("b.png has 5x5 pixels, but a.png has 6x5")):
        list(open_pictures(folder).blocks(0, 8))


def test_a_missing_number_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", [f"{i:06d}.png" for i in range(7) if i not in (3, 4)])
    with pytest.raises(InvalidInput, match=re.escape("3, 4 are missing")) as caught:
        open_pictures(folder)
    assert "--partial" in caught.value.fix
    assert open_pictures(folder, partial=True).count == 5


def test_a_large_gap_among_plain_numbers_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", [f"{i}.png" for i in (0, 1, 2, 40, 41)])
    with pytest.raises(InvalidInput, match=re.escape("3, 4, 5, 6, 7 and more are missing")):
        open_pictures(folder)


def test_numbered_files_are_read_in_the_order_of_numbers(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", ["10.png", "9.png", "8.png", "11.png"])
    assert np.array_equal(np.concatenate(list(open_pictures(folder).blocks(0, 9))), IMAGES[[2, 1, 0, 3]])


def test_other_pictures_of_the_same_names_sizes_and_times_are_others(tmp_path: Path) -> None:
    folders = [folder_of(tmp_path / name, ["0.bmp", "1.bmp"]) for name in ("a", "b")]
    Image.fromarray(IMAGES[5]).save(folders[1] / "0.bmp")
    for folder in folders:
        for file in folder.iterdir():
            os.utime(file, (1, 1))
    one, other = map(open_pictures, folders)
    assert one.identity != other.identity and one.size == other.size


def test_the_folder_of_a_run_must_have_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last picture is missing, which only the run can tell."""
    folder = folder_of(tmp_path / "images", [f"{i:06d}.png" for i in range(6)])
    assert open_pictures(folder).count == 6
    (tmp_path / "run.json").write_text(json.dumps({}), encoding="utf-8")

    class SevenImages:
        count = 7

    monkeypatch.setattr("flexvar_evaluation.pictures.read_settings", lambda path: SevenImages)
    with pytest.raises(InvalidInput, match=re.escape("6 is missing")):
        open_pictures(folder)


@pytest.mark.parametrize(
    "names", [["n01440764_10026.png", "n01440764_10027.png", "n02102040_3.png"], ["a.png", "b.png"]]
)
def test_names_that_do_not_count_are_no_numbers(tmp_path: Path, names: list[str]) -> None:
    assert open_pictures(folder_of(tmp_path / "x", names)).count == len(names)


@pytest.mark.parametrize("name", ["x", "x.npz"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="There is no file or directory"):
        open_pictures(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="has no picture files"):
        open_pictures(tmp_path / "empty")
