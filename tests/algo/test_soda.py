"""SODA's loss by hand, its split over micro-batches, and its gradient; parity with TRL is in test_trl_parity.py."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from algo.mutants import mutated
from gadcli.algo import soda

TEACHER, SNAPSHOT = torch.tensor([-10.0, -20.0, -5.0]), torch.tensor([-12.0, -9.0, -5.0])
TEACHER_REF, SNAPSHOT_REF = torch.tensor([-14.0, -19.0, -5.0]), torch.tensor([-11.0, -10.0, -5.0])


def check(module: ModuleType = soda) -> None:
    # Gains: teacher 4, -1, 0; snapshot -1, 1, 0. Brackets: 5, -2, 0; margins at beta .5: 2.5, -1, 0.
    loss, metrics = module.soda_loss(TEACHER, SNAPSHOT, TEACHER_REF, SNAPSHOT_REF, beta=0.5)
    by_hand = [math.log1p(math.exp(-2.5)), math.log1p(math.exp(1.0)), math.log(2)]
    assert loss.item() == pytest.approx(sum(by_hand) / 3, rel=1e-6)
    assert metrics["actor/soda_loss"].value == pytest.approx(sum(by_hand) / 3, rel=1e-6)
    assert metrics["actor/soda_margin"].value == pytest.approx(0.5)
    assert metrics["actor/soda_acc"].value == pytest.approx(1.5 / 3)  # won, lost, tied
    assert metrics["actor/soda_teacher_gain"].value == pytest.approx(1.0)
    assert metrics["actor/soda_snapshot_gain"].value == pytest.approx(0.0)


def test_the_loss_and_its_metrics_by_hand() -> None:
    check()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("beta * (teacher_gain_N - snapshot_gain_N)", "beta * (snapshot_gain_N - teacher_gain_N)"),
        ("beta * (teacher_gain_N - snapshot_gain_N)", "teacher_gain_N - snapshot_gain_N"),
        ("teacher_N.float() - teacher_ref_N", "teacher_N.float() + teacher_ref_N"),
        ("snapshot_N.float() - snapshot_ref_N", "snapshot_N.float() - teacher_ref_N"),
        ("F.softplus(-margin_N)", "F.relu(1 - margin_N)"),
        ("max(loss_N.numel(), 1)", "1"),
        ("wins(teacher_gain_N, snapshot_gain_N)", "(teacher_gain_N > snapshot_gain_N)"),
    ],
)
def test_mutants_of_the_loss_are_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check(mutated("soda", old, new))


def test_it_starts_at_ln_2_with_a_gradient_of_half_beta_to_each_side() -> None:
    teacher, snapshot = TEACHER.clone().requires_grad_(), SNAPSHOT.clone().requires_grad_()
    loss, metrics = soda.soda_loss(teacher, snapshot, TEACHER, SNAPSHOT, beta=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and metrics["actor/soda_acc"].value == 0.5
    # d/dm of -log sigmoid(m) at 0 is -1/2; m moves by beta; the mean is over 3 pairs.
    assert torch.allclose(teacher.grad, torch.full((3,), -0.1 / 3)) and torch.allclose(snapshot.grad, -teacher.grad)


def test_micro_batches_of_any_size_add_up_to_the_step() -> None:
    whole = soda.soda_loss(TEACHER, SNAPSHOT, TEACHER_REF, SNAPSHOT_REF, beta=0.3)[0]
    parts = [
        soda.soda_loss(TEACHER[p], SNAPSHOT[p], TEACHER_REF[p], SNAPSHOT_REF[p], beta=0.3, pairs=3)[0]
        for p in (slice(0, 1), slice(1, 3))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)
    assert soda.soda_loss(*[torch.zeros(0)] * 4, beta=0.3)[0].item() == 0.0  # an empty rank
