"""The resize matrices are those of torch: cubic convolution and adaptive average pooling."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from flexvar_runtime.model.resize import area_matrix, bicubic_matrix, resize

SIDES = (1, 2, 3, 5, 7, 8, 13, 16, 23, 32, 33, 48, 64)
ROUNDING = 1e-7  # half a unit of float32 at weights up to 1.1
TORCH_ROUNDING = 1e-5  # torch finds the position of a tap in float32: 6e-6 of its weight at side 64
MATRICES = {"area": area_matrix, "bicubic": bicubic_matrix}


def torch_matrix(mode: str, inputs: int, outputs: int) -> NDArray[np.float32]:
    """What torch does to each unit vector, along the height, in float64."""
    units = torch.eye(inputs, dtype=torch.float64).view(1, inputs, inputs, 1)
    kwargs = {"align_corners": False} if mode == "bicubic" else {}
    return F.interpolate(units, size=(outputs, 1), mode=mode, **kwargs)[0, :, :, 0].T.numpy()


@pytest.mark.parametrize("mode", MATRICES)
def test_equals_torch(mode: str) -> None:
    for inputs, outputs in product(SIDES, SIDES):
        matrix = MATRICES[mode](inputs, outputs)
        assert matrix.shape == (outputs, inputs) and matrix.dtype == np.float32
        np.testing.assert_allclose(matrix, torch_matrix(mode, inputs, outputs), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("size", "wanted"), [((3, 5), (12, 20)), ((20, 12), (7, 9)), ((1, 4), (40, 36))])
@pytest.mark.parametrize("mode", MATRICES)
def test_maps_equal_torch(mode: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).standard_normal((3, *size, 6)).astype(np.float32)
    got = resize(maps, MATRICES[mode](size[0], wanted[0]), MATRICES[mode](size[1], wanted[1]))
    expected = F.interpolate(torch.from_numpy(maps).permute(0, 3, 1, 2), size=wanted, mode=mode)
    np.testing.assert_allclose(got, expected.permute(0, 2, 3, 1).numpy(), rtol=0, atol=TORCH_ROUNDING)


@pytest.mark.parametrize("mode", MATRICES)
def test_laws(mode: str) -> None:
    """A constant map is not changed, a mirrored map gives the mirrored result, and the same size changes nothing."""
    for inputs, outputs in ((1, 7), (5, 13), (32, 16), (16, 23), (9, 9)):
        matrix = MATRICES[mode](inputs, outputs)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=ROUNDING)
        np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=ROUNDING)
        if inputs == outputs:
            np.testing.assert_array_equal(matrix, np.eye(inputs))


def test_bicubic_reaches_beyond_its_taps() -> None:
    """a = -0.75, not -0.5: the weights of 2 to 4 at the first output, by hand: centre -0.25, edge repeated."""
    a, x = -0.75, (1.75, 0.75, 0.25, 1.25)
    far = [a * (((d - 5) * d + 8) * d - 4) for d in (x[0], x[3])]
    near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (x[1], x[2])]
    np.testing.assert_allclose(bicubic_matrix(2, 4)[0], [far[0] + near[0] + near[1], far[1]], atol=ROUNDING)
    assert bicubic_matrix(2, 4)[0, 1] < 0


def test_the_result_of_a_map_does_not_depend_on_its_batch() -> None:
    maps = np.random.default_rng(1).standard_normal((8, 5, 6, 32)).astype(np.float32)
    rows, columns = bicubic_matrix(5, 12), bicubic_matrix(6, 20)
    together = resize(maps, rows, columns)
    for i in range(8):
        np.testing.assert_array_equal(resize(maps[i : i + 1], rows, columns)[0], together[i])


@pytest.mark.parametrize("mode", MATRICES)
def test_the_shared_matrices_cannot_be_changed(mode: str) -> None:
    with pytest.raises(ValueError, match="read-only"):
        MATRICES[mode](2, 3)[0, 0] = 5
