"""Mixing: against numbers worked out by hand, with a mutant each; the shares add up to one."""

from __future__ import annotations

import pytest
import torch

from algo.mutants import mutated
from gadcli.algo.rewards import Part, mix_rewards

# Two prompts, two answers each. D: spread 2 and 4; F: spread 1 in the first group, none in the second.
D_PG = torch.tensor([[1.0, 3.0], [0.0, 4.0]])
F_PG = torch.tensor([[1.0, 0.0], [1.0, 1.0]])


def test_unscaled_rewards_are_a_weighted_sum() -> None:
    mixed_PG, _ = mix_rewards([Part(D_PG, 0.8), Part(F_PG, 0.5)])
    torch.testing.assert_close(mixed_PG, torch.tensor([[1.3, 2.4], [0.5, 3.7]]))


def test_group_scaling_divides_by_the_groups_own_spread() -> None:
    """std of (1, 3) is sqrt 2, of (0, 4) 2 sqrt 2: both become -+1/sqrt 2; a group without spread is 0."""
    mixed_PG, _ = mix_rewards([Part(D_PG, 1.0, "group"), Part(F_PG, 1.0, "group")])
    h = 0.5**0.5
    torch.testing.assert_close(mixed_PG, torch.tensor([[0.0, 0.0], [-h, h]]), atol=2e-6, rtol=0)


def test_the_clip_bounds_the_sum_and_not_its_parts() -> None:
    mixed_PG, _ = mix_rewards([Part(D_PG), Part(F_PG, -1.0)], clip=2.0)
    assert mixed_PG.tolist() == [[0.0, 2.0], [-1.0, 2.0]]


def shares(parts: list[Part], mix=mix_rewards) -> list[float]:  # type: ignore[no-untyped-def]
    _, covariances = mix(parts)
    total = sum(float(c) for c in covariances)
    return [float(c) / total for c in covariances]


def test_shares_add_up_and_are_the_hand_computed_ones() -> None:
    """The sum is (2, 3), (1, 5), its deviations (-.5, .5), (-2, 2). With D's values that gives 1 + 8, with F's -.5."""
    found = shares([Part(D_PG), Part(F_PG)])
    assert found == pytest.approx([9 / 8.5, -0.5 / 8.5])
    assert sum(found) == pytest.approx(1.0)


def test_a_reward_that_is_the_same_for_all_of_a_group_has_no_share() -> None:
    assert shares([Part(D_PG), Part(torch.tensor([[7.0, 7.0], [-3.0, -3.0]]))]) == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total_PG - total_PG.mean(-1, keepdim=True)", "total_PG - total_PG.mean()"),
        ("total_PG - total_PG.mean(-1, keepdim=True)", "total_PG"),
        ("part.weight * scaled(part)", "scaled(part)"),
    ],
)
def test_mutants_of_the_shares_are_seen(old: str, new: str) -> None:
    parts = [Part(D_PG, 0.5), Part(torch.tensor([[0.0, 1.0], [-3.0, -3.0]]), 2.0)]
    assert shares(parts, mutated("rewards", old, new).mix_rewards) != pytest.approx(shares(parts))


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown scale"):
        mix_rewards([Part(D_PG, 1.0, "batch")])
