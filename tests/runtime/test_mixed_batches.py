"""Images of different users in one batch: each equals itself alone, bit for bit on ort-cpu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexvar_runtime import FlexVARPipeline, Guidance, Sampling
from flexvar_runtime.output import Settings

SCHEDULE = "1_2_3x2_4"
SEEDS = st.integers(0, 2**64 - 1)
WEIGHTS = st.one_of(st.sampled_from([0.0, 2.5]), st.floats(0, 12, width=32))


@dataclass(frozen=True)
class User:
    """One image of a batch."""

    label: int
    seed: int
    index: int
    weight: float


USERS = st.builds(User, st.integers(0, 10), SEEDS, SEEDS, WEIGHTS)
BATCHES = st.lists(USERS, min_size=1, max_size=8)
SAMPLINGS = st.sampled_from([Sampling(), Sampling(5, 0.5, "none"), Sampling(0, 0.9, "3x2")])


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[FlexVARPipeline]:
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipeline:
        yield pipeline


def check_batch(pipe: FlexVARPipeline, users: list[User], rule: str, sampling: Sampling) -> None:
    together = pipe(
        [user.label for user in users],
        SCHEDULE,
        [Guidance(user.weight, rule) for user in users],
        sampling,
        seed=[user.seed for user in users],
        first_index=[user.index for user in users],
    )
    for i, user in enumerate(users):
        alone = pipe([user.label], SCHEDULE, Guidance(user.weight, rule), sampling, user.seed, user.index)
        for one, scale in zip(alone.tokens, together.tokens, strict=True):
            np.testing.assert_array_equal(one[0], scale[i])
        np.testing.assert_array_equal(alone.images[0], together.images[i])
        assert alone.settings[0] == together.settings[i]


def mixed(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@mixed(10)
@given(users=BATCHES, rule=st.sampled_from(["ramp", "constant"]), sampling=SAMPLINGS)
def test_each_image_equals_itself_alone(
    pipe: FlexVARPipeline, users: list[User], rule: str, sampling: Sampling
) -> None:
    check_batch(pipe, users, rule, sampling)


@pytest.mark.slow
@mixed(100)
@given(users=BATCHES, rule=st.sampled_from(["ramp", "constant"]), sampling=SAMPLINGS)
def test_each_of_many_images_equals_itself_alone(
    pipe: FlexVARPipeline, users: list[User], rule: str, sampling: Sampling
) -> None:
    check_batch(pipe, users, rule, sampling)


def test_weight_0_beside_weight_2_5(pipe: FlexVARPipeline) -> None:
    """Alone the first runs one sequence, in the batch two."""
    check_batch(pipe, [User(3, 1, 0, 0.0), User(7, 2, 5, 2.5), User(10, 3, 0, 0.0)], "ramp", Sampling())


def test_what_a_batch_records(pipe: FlexVARPipeline) -> None:
    out = pipe([3, 7], "1_2", seed=[11, 42], guidance=[2.5, 4.0])
    assert out.seed == (11, 42)
    assert [(s.label, s.seed, s.index, s.guidance.scale) for s in out.settings] == [(3, 11, 0, 2.5), (7, 42, 0, 4.0)]
    for image in out.settings:
        assert Settings.from_json(image.to_json(), "an image") == image
    numbers = pipe([3, 7], "1_2", seed=5, first_index=[8, 3])
    assert numbers.seed == 5 and [s.index for s in numbers.settings] == [8, 3]
    arrays = pipe(np.array([3, 7]), "1_2", seed=np.array([11, 42], np.uint64), guidance=np.array([2.5, 4.0]))
    np.testing.assert_array_equal(arrays.images, out.images)
    assert pipe([3, 7], "1_2", seed=5, guidance=4).settings[1].guidance == Guidance(4.0, "ramp", 16)


def test_edits_mix_users_too(pipe: FlexVARPipeline) -> None:
    picture = (np.indices((16, 16)).sum(0) * 8).astype(np.uint8)[..., None].repeat(3, axis=2)
    options: dict[str, Any] = {"schedule": SCHEDULE, "strength": 0.5, "size": (16, 16)}
    together = pipe.edit(picture, "refine", labels=[1, 2], seed=[5, 9], guidance=[0.0, 3.0], **options)
    for i, (label, seed, weight) in enumerate([(1, 5, 0.0), (2, 9, 3.0)]):
        alone = pipe.edit(picture, "refine", labels=[label], seed=seed, guidance=weight, **options)
        np.testing.assert_array_equal(alone.images[0], together.images[i])
        assert alone.settings[0] == together.settings[i]
