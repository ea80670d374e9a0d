"""The spellings of schedules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flexvar_ref.errors import InvalidInput
from flexvar_ref.scales import as_scales, as_schedule, token_count


def test_every_spelling() -> None:
    spellings: list[Any] = [
        "1_2_3x5",
        ["1", "2", "3x5"],
        [1, 2, (3, 5)],
        ((1, 1), (2, 2), (3, 5)),
        np.array([[1, 1], [2, 2], [3, 5]]),
        iter([1, (2, 2), [3, 5]]),
    ]
    for scales in spellings:
        assert as_scales(scales) == ((1, 1), (2, 2), (3, 5)), scales
    assert as_scales(np.arange(1, 4)) == ((1, 1), (2, 2), (3, 3))


NONSENSE: list[Any] = [
    *("", "nonsense", "1__2", "1_2_", "1_2x", "1_x2", "1_2x3x4", "1_-2", "1_+2", "1_ 2", "1_0", "1_2.5", "1,2", "1_²"),
    *([], [1, 2.5], [1, (2, 3, 4)], [1, (2,)], [1, None], [1, (2, 0)], [1, -2], 5, None),
]


def test_nonsense_is_refused() -> None:
    for scales in NONSENSE:
        with pytest.raises(InvalidInput) as caught:
            as_scales(scales)
        assert repr(scales) in caught.value.got


def test_a_long_text_is_not_repeated_in_full() -> None:
    with pytest.raises(InvalidInput) as caught:
        as_scales("x" * 10**6)
    assert len(str(caught.value)) < 500


def test_a_schedule_starts_with_one_token() -> None:
    assert as_schedule("1_2x3") == ((1, 1), (2, 3))
    with pytest.raises(InvalidInput, match="1x2"):
        as_schedule("1x2_4")


def test_token_count() -> None:
    assert token_count(as_scales("1_2_3_4_5_6_8_10_13_16")) == 680
    assert token_count(as_scales("1_3x5")) == 16
