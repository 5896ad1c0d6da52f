"""Semantics pinned: padding has no say in sums and means, whatever lies under it."""

from __future__ import annotations

import torch

from gadcli.algo import masking

NAN = float("nan")


def test_nan_under_the_padding_reaches_neither_sum_nor_gradient() -> None:
    x = torch.tensor([[1.0, 2.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    total = masking.masked_sum(x, mask)
    assert total.item() == 3.0
    total.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 1.0, 0.0]]


def test_an_empty_row_has_mean_zero() -> None:
    assert masking.masked_mean(torch.ones(1, 3), torch.zeros(1, 3)).tolist() == [0.0]
