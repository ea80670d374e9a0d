"""Philox4x32-10 and the streams built on it: known answers, committed vectors, laws, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexvar_runtime.checks import check_index, check_seed
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.model.noise import draws, fresh_seed, philox4x32, to_uniform, uniforms

VECTORS = json.loads((Path(__file__).parent / "vectors" / "philox.json").read_text())


def plain_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The algorithm of the paper, one counter, Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def plain_draw(seed: int, image_index: int, scale: int, position: int) -> int:
    counter = position, scale, image_index % 2**32, image_index >> 32
    return plain_philox(counter, (seed % 2**32, seed >> 32))[0] >> 8


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("case", VECTORS["random123"])
def test_known_answers_of_random123(case: dict[str, str]) -> None:
    counter, key, output = (words(case[name]) for name in ("counter", "key", "output"))
    assert philox4x32(counter, key).tolist() == output
    assert list(plain_philox((counter[0], counter[1], counter[2], counter[3]), (key[0], key[1]))) == output


@pytest.mark.parametrize("case", VECTORS["draws"])
def test_committed_draws(case: dict[str, Any]) -> None:
    seed, image_index, scale, expected = int(case["seed"]), int(case["image_index"]), case["scale"], case["draws"]
    assert draws(seed, image_index, scale, len(expected)).tolist() == expected
    assert [plain_draw(seed, image_index, scale, position) for position in range(len(expected))] == expected


def test_philox_broadcasts_and_equals_the_plain_loop() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (5, 7, 4), dtype=np.uint32)
    keys = rng.integers(0, 2**32, (7, 2), dtype=np.uint32)
    output = philox4x32(counters, keys)
    assert output.shape == (5, 7, 4)
    assert output.dtype == np.uint32
    for i, j in np.ndindex(5, 7):
        c, k = counters[i, j].tolist(), keys[j].tolist()
        assert output[i, j].tolist() == list(plain_philox((c[0], c[1], c[2], c[3]), (k[0], k[1])))


def test_uniforms_are_the_draws_and_lie_strictly_inside_0_1() -> None:
    d, u = draws(3, 1, 2, 1000), uniforms(3, 1, 2, 1000)
    assert d.dtype == np.uint32
    assert d.max() < 2**24
    assert u.dtype == np.float64
    assert u.tolist() == [(int(x) + 0.5) * 2.0**-24 for x in d]
    ends = to_uniform(np.array([0, 2**24 - 1], dtype=np.uint32))
    assert ends.tolist() == [2.0**-25, 1 - 2.0**-25]


def test_a_prefix_does_not_depend_on_the_length() -> None:
    assert draws(9, 0, 4, 5).tolist() == draws(9, 0, 4, 256)[:5].tolist()
    assert draws(9, 0, 4, 0).shape == (0,)


def test_every_part_of_the_address_matters() -> None:
    streams = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 2**32, 0), (0, 0, 1)]
    assert len({tuple(draws(*stream, 8).tolist()) for stream in streams}) == len(streams)


def test_draws_are_uniform() -> None:
    counts = np.bincount(draws(0, 0, 0, 160_000) >> 20, minlength=16)
    chi_square = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001; the draws are fixed


def test_seeds_over_the_whole_64_bits() -> None:
    for seed in (0, 1, 2**63 - 1, 2**63, 2**64 - 1, np.uint64(2**64 - 1), np.int32(7)):
        assert check_seed(seed) == int(seed)
        assert type(check_seed(seed)) is int
    assert check_index(2**64 - 1) == 2**64 - 1
    assert 0 <= fresh_seed() < 2**64
    assert len({fresh_seed() for _ in range(4)}) == 4


@pytest.mark.parametrize("seed", [-1, 2**64, True, np.True_, 1.0, "7", None])
def test_other_seeds_are_refused(seed: Any) -> None:
    for call in (lambda: check_seed(seed), lambda: draws(seed, 0, 0, 1)):
        with pytest.raises(InvalidInput, match="seed is") as refusal:
            call()
        assert repr(seed) in refusal.value.got
        assert refusal.value.expected == "a whole number from 0 to 18446744073709551615"


def test_other_addresses_are_refused() -> None:
    for address, name in (((2**64, 0, 1), "first_index"), ((-1, 0, 1), "first_index"), ((0, 2**32, 1), "scale")):
        with pytest.raises(InvalidInput, match=rf"^{name} is"):
            draws(0, *address)
    with pytest.raises(InvalidInput, match=r"^positions is 2\.5"):
        uniforms(0, 0, 0, 2.5)  # type: ignore[arg-type]
