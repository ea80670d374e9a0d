"""Random schedules follow the published rule, whose distribution is computed here by enumeration."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import pytest

from flexvar_ref import token_count
from flexvar_ref.errors import ConfigError
from flexvar_ref.training.randomness import SCHEDULE, stream
from flexvar_ref.training.schedules import ScheduleRule, default_sides, random_schedule, random_sides

Sides = tuple[int, ...]
DRAWS = 30_000


def published_distribution() -> dict[Sides, float]:
    """The probability of every schedule for side 16."""
    drawn: dict[Sides, float] = defaultdict(float)
    drawn[(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)] += 0.05
    inner = [
        low + high
        for low in itertools.combinations(range(3, 11), 5)
        for high in itertools.combinations(range(11, 16), 2)
    ]
    for sides in inner:
        drawn[(1, 2, *sides, 16)] += 0.95 / len(inner)
    thinned: dict[Sides, float] = defaultdict(float)
    for drops, share in ((0, 0.90), (1, 0.05), (2, 0.03), (3, 0.01), (4, 0.01)):  # at least 1, 2, 3, 4: 10, 5, 2, 1 %
        for sides, p in drawn.items():
            kept = list(itertools.combinations(sides[2:-1], len(sides) - 3 - drops))
            for middle in kept:
                thinned[(*sides[:2], *middle, sides[-1])] += p * share / len(kept)
    final: dict[Sides, float] = defaultdict(float)
    waiting = thinned
    while waiting:
        shortened: dict[Sides, float] = defaultdict(float)
        for sides, p in waiting.items():
            if sum(s * s for s in sides) <= 680:
                final[sides] += p
                continue
            for place in range(len(sides) - 4, len(sides)):
                shortened[sides[:place] + sides[place + 1 :]] += p / 4
        waiting = shortened
    return final


def chi_square(counts: Counter[Sides], expected: dict[Sides, float]) -> tuple[float, int]:
    """The statistic and the degrees of freedom. Outcomes that are expected less than ten times count as one."""
    total = sum(counts.values())
    rare = {sides for sides, p in expected.items() if p * total < 10}
    cells = [(counts[sides], p * total) for sides, p in expected.items() if sides not in rare]
    cells.append((sum(counts[sides] for sides in rare), sum(expected[sides] for sides in rare) * total))
    return sum((got - wanted) ** 2 / wanted for got, wanted in cells), len(cells) - 1


def bound(freedom: int) -> float:
    """The chi-square that is exceeded once in 30,000 tries (4 standard deviations; Wilson and Hilferty)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4 * math.sqrt(spread)) ** 3


@pytest.fixture(scope="module")
def expected() -> dict[Sides, float]:
    return published_distribution()


def test_the_statistics_are_those_of_the_published_rule(expected: dict[Sides, float]) -> None:
    assert sum(expected.values()) == pytest.approx(1)
    rule, draws = ScheduleRule(), stream(0, SCHEDULE)
    counts = Counter(random_sides(rule, draws) for _ in range(DRAWS))
    assert set(counts) <= set(expected)
    statistic, freedom = chi_square(counts, expected)
    assert freedom > 500
    assert statistic < bound(freedom)


def test_another_rule_is_rejected(expected: dict[Sides, float]) -> None:
    """Negative control: rules with another token budget, 679 and 10,000, exceed the bound."""
    for rule in (ScheduleRule(budget=679), ScheduleRule(budget=10_000)):
        draws = stream(0, SCHEDULE)
        counts = Counter(random_sides(rule, draws) for _ in range(DRAWS // 3))
        statistic, freedom = chi_square(counts, expected)
        assert statistic > bound(freedom)


def test_every_size_of_model_has_schedules() -> None:
    for side in (1, 2, 3, 4, 8, 12, 16, 24, 32):
        rule, draws = ScheduleRule(side), stream(1, SCHEDULE)
        drawn = [random_sides(rule, draws) for _ in range(300)]
        assert all(sides[0] == 1 and list(sides) == sorted(set(sides)) and sides[-1] <= side for sides in drawn)
        assert all(sum(s * s for s in sides) <= rule.tokens for sides in drawn)
        assert side < 3 or any(sides[-1] == side for sides in drawn)
        assert side < 8 or len(set(drawn)) > 20


def test_a_schedule_is_a_function_of_seed_and_step() -> None:
    rule = ScheduleRule()
    assert random_schedule(rule, stream(5, SCHEDULE, 7)) == random_schedule(rule, stream(5, SCHEDULE, 7))
    others = {random_schedule(rule, stream(seed, SCHEDULE, step)) for seed, step in ((5, 8), (6, 7), (5, 7), (7, 5))}
    assert len(others) == 4


def test_the_default_follows_the_size() -> None:
    assert default_sides(16) == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert default_sides(4) == (1, 2, 3, 4)
    assert ScheduleRule().tokens == 680 == token_count(tuple((s, s) for s in default_sides(16)))


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="side is 0"):
        ScheduleRule(0)
    with pytest.raises(ConfigError, match="token_budget is -1"):
        ScheduleRule(16, -1)
