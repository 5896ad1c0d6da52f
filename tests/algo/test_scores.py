"""Semantics pinned: where a text's score is read, what its norm divides by, and that equal text scores equally."""

from __future__ import annotations

import pytest
import torch

from algo.mutants import mutated
from gadcli.algo import scores

VALUES = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]]).bool()


def check_last(module) -> None:
    # Both rows end at position 2 (value 4): lengths 3 and 2, so norms are 4/3 and 4/2.
    raw, norm = module.scores(VALUES, MASK, "last")
    assert raw.tolist() == [4.0, 4.0]
    assert norm.tolist() == pytest.approx([4 / 3, 2.0], rel=1e-6)


def check_all(module) -> None:
    # Row 0: 1+2+4 = 7 over 3 tokens; row 1: 2+4 = 6 over 2.
    raw, norm = module.scores(VALUES, MASK, "all")
    assert raw.tolist() == [7.0, 6.0]
    assert norm.tolist() == pytest.approx([7 / 3, 3.0], rel=1e-6)


def check_both(module) -> None:
    check_last(module)
    check_all(module)


def test_last_reads_the_last_response_token_wherever_padding_stands() -> None:
    check_last(scores)


def test_all_sums_every_response_token() -> None:
    check_all(scores)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("amax(-1, keepdim=True)", "amax(-1, keepdim=True) - 1"),  # off by one: reads the token before EOS
        ("positions == last_B", "positions == mask.shape[-1] - 1"),  # last column, padding or not
        ("raw_B / lengths(mask).clamp(min=1)", "raw_B / mask.shape[-1]"),  # divides by the padded length
        ("masked_sum(values_BT.float(), keep)", "(values_BT.float() * keep).mean(-1)"),  # mean for sum
    ],
)
def test_mutants_of_the_score_are_caught(old: str, new: str) -> None:
    mutant = mutated("scores", old, new)
    with pytest.raises(AssertionError):
        check_both(mutant)


def test_only_the_last_token_gets_a_gradient_in_last() -> None:
    values = VALUES.clone().requires_grad_()
    scores.scores(values, MASK, "last")[0].sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("how", ["last", "all"])
def test_equal_text_scores_equally_on_both_sides_whatever_the_padding(how: str) -> None:
    # The same three tokens plus EOS: the teacher's side padded right to 6 with pad = EOS, the student's side padded
    # right to 5 with another id. A critic's value depends on the text read so far, so it is equal at equal tokens;
    # what it emits on padding differs and must not matter.
    text = [5, 6, 7, 2]
    value_of = torch.tensor([0.0, 0.0, 0.7, 0.0, 0.0, -1.5, 2.25, 0.125, 9.0])
    teacher, student = torch.tensor([[*text, 2, 2]]), torch.tensor([[*text, 8]])
    sides = []
    for ids in (teacher, student):
        mask = torch.arange(ids.shape[1])[None] < len(text)
        values = value_of[ids].masked_fill(~mask, float("nan"))
        sides.append(scores.scores(values, mask, how))
    assert torch.equal(sides[0][0], sides[1][0]) and torch.equal(sides[0][1], sides[1][1])
    assert scores.d_acc(sides[0][0], sides[1][0]).value == 0.5


def test_an_eos_on_one_side_only_would_show() -> None:
    # The law above must be able to fail: without its EOS the student's last token is 7, value .125 instead of .7.
    value_of = torch.tensor([0.0, 0.0, 0.7, 0.0, 0.0, -1.5, 2.25, 0.125])
    with_eos, without = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[5, 6, 7]])
    raw = [scores.scores(value_of[ids], torch.ones_like(ids), "last")[0].item() for ids in (with_eos, without)]
    assert raw == pytest.approx([0.7, 0.125])


def test_a_row_without_response_tokens_scores_zero() -> None:
    for how in ("last", "all"):
        raw, norm = scores.scores(torch.ones(1, 3), torch.zeros(1, 3), how)
        assert raw.tolist() == [0.0] and norm.tolist() == [0.0]


def test_d_acc_counts_a_tie_as_one_half() -> None:
    # win, tie, loss, win: (1 + .5 + 0 + 1) / 4
    acc = scores.d_acc(torch.tensor([2.0, 1.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 1.0, 1.0]))
    assert acc.value == 0.625 and acc.count == 4


def check_rounding(module) -> None:
    # The same text at two places of a batch: some 2e-7 apart at any score below 1, relative above; 1e-5 is a win.
    t, s = (
        torch.tensor([0.01, 0.01, 100.0, 100.0, 1.0]),
        torch.tensor([0.01 + 2e-7, 0.01 - 2e-7, 100.00002, 99.99998, 1 - 1e-5]),
    )
    assert module.wins(t, s).tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]


def test_scores_within_rounding_are_a_tie() -> None:
    check_rounding(scores)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<= ROUNDING * torch.maximum(t.abs(), s.abs()).clamp(min=1.0)", "<= 0"),
        (".clamp(min=1.0)", ""),
        ("ROUNDING * torch.maximum(t.abs(), s.abs()).clamp(min=1.0)", "ROUNDING"),
        ("ROUNDING = 1e-6", "ROUNDING = 1e-4"),
    ],
)
def test_mutants_of_the_tie_are_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_rounding(mutated("scores", old, new))


def test_d_acc_mutant_that_gives_ties_to_the_teacher_is_caught() -> None:
    mutant = mutated("scores", "torch.where(tie, 0.5, (t > s).float())", "(t >= s).float()")
    assert mutant.d_acc(torch.ones(2), torch.ones(2)).value != 0.5


def test_unknown_values_are_refused() -> None:
    with pytest.raises(ValueError, match="mean"):
        scores.scores(VALUES, MASK, "mean")


def test_a_text_of_one_token_has_norm_equal_to_raw() -> None:
    raw, norm = scores.scores(torch.tensor([[3.0, 9.0]]), torch.tensor([[1, 0]]), "last")
    assert raw.item() == 3.0 and norm.item() == 3.0


def test_bfloat16_values_are_summed_in_float32() -> None:
    # 256 + 1 is 256 in bfloat16 (spacing 2 there)
    raw, _ = scores.scores(torch.tensor([[256.0, 1.0]]).bfloat16(), torch.ones(1, 2), "all")
    assert raw.item() == 257.0
