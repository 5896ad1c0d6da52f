"""Semantics pinned: the first EOS is part of the answer, nothing after it is, and padding has no say."""

from __future__ import annotations

import pytest
import torch

from algo.mutants import mutated
from gadcli.algo import masking

EOS, NAN = 2, float("nan")
# Rows: EOS in the middle (then other tokens), EOS padded with EOS, no EOS at all, EOS first.
IDS = torch.tensor([[5, 2, 7, 2], [5, 6, 2, 2], [5, 6, 7, 8], [2, 2, 2, 2]])
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()


def check_first_eos(module) -> None:
    assert torch.equal(module.response_mask(IDS, EOS), MASK)


def test_the_first_eos_counts_and_nothing_after_it() -> None:
    check_first_eos(masking)


def test_mutant_that_masks_eos_itself_is_caught() -> None:
    mutant = mutated("masking", "eos_before_BT = is_eos_BT.long().cumsum(-1) - is_eos_BT.long()",
                     "eos_before_BT = is_eos_BT.long().cumsum(-1)")  # fmt: skip
    with pytest.raises(AssertionError):
        check_first_eos(mutant)


def test_several_eos_ids_all_end_an_answer() -> None:
    # 7 and 2 both end: row 0 ends at its 2, row 2 at its 7 (third position).
    mask = masking.response_mask(IDS, [2, 7])
    assert mask[0].tolist() == [True, True, False, False]
    assert mask[2].tolist() == [True, True, True, False]


def test_left_padding_with_the_eos_id_ends_nothing() -> None:
    ids = torch.tensor([[2, 2, 5, 2], [2, 5, 6, 7]])
    valid = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    mask = masking.response_mask(ids, EOS, valid)
    assert mask.dtype == torch.bool and torch.equal(mask, valid.bool())


def test_a_truncated_answer_counts_to_its_length() -> None:
    valid = masking.length_mask(torch.tensor([2, 3, 0, 4]), 4)
    assert valid.tolist() == [[True, True, False, False], [True, True, True, False], [False] * 4, [True] * 4]
    # Row 2 of IDS has no EOS; with length 3 its pad token (id 8) is not part of it.
    assert masking.response_mask(IDS[2:3], EOS, masking.length_mask(torch.tensor([3]), 4)).sum() == 3


def test_nan_under_the_padding_reaches_neither_sum_nor_gradient() -> None:
    x = torch.tensor([[1.0, 2.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    total = masking.masked_sum(x, mask)
    assert total.item() == 3.0
    total.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 1.0, 0.0]]


def test_an_empty_row_has_mean_zero() -> None:
    assert masking.masked_mean(torch.ones(1, 3), torch.zeros(1, 3)).tolist() == [0.0]
