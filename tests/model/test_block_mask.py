"""The block mask made from spans is the one that torch makes from every pair of tokens, and costs no L x L tensor."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from gadcli.model.block_mask import flex_mask
from gadcli.model.packing import Group, Layout, lay_out

CPU = torch.device("cpu")


def some_layouts(count: int) -> list[Layout]:
    """Ragged groups, some with empty answers, some with one answer alone, of few and of many blocks."""
    draw = random.Random(0)

    def group() -> Group:
        lengths = [draw.randint(0, 40) for _ in range(draw.randint(1, 5))]
        return Group([1] * draw.randint(1, 60), [[2] * n for n in lengths] if any(lengths) else [[2]])

    return [lay_out([group() for _ in range(draw.randint(1, 5))]) for _ in range(count)]


def by_pairs(layout: Layout, window: int | None, block: int) -> Any:
    """The visibility written down token by token: same group, prompt or own answer, not ahead, within the window."""
    assert layout.spans is not None
    group = torch.tensor([g for g, spans in enumerate(layout.spans) for _ in range(sum(spans))])
    part = torch.tensor([p for spans in layout.spans for p, size in enumerate(spans) for _ in range(size)])
    position = layout.positions_RL[0]

    def seen(_b: Any, _h: Any, q: Any, k: Any) -> Any:
        near = position[q] - position[k] < window if window is not None else True
        return (k <= q) & (group[q] == group[k]) & ((part[k] == 0) | (part[k] == part[q])) & near

    return create_block_mask(seen, None, None, len(group), len(group), device="cpu", BLOCK_SIZE=block)


@pytest.mark.parametrize("window", [None, 5, 23])
def test_block_lists_from_spans_are_those_of_every_pair(window: int | None) -> None:
    for layout in some_layouts(20):
        ours, theirs = flex_mask(layout, window, CPU, 16), by_pairs(layout, window, 16)
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        for lists in ("kv", "full_kv", "q", "full_q"):
            assert torch.equal(getattr(ours, f"{lists}_num_blocks"), getattr(theirs, f"{lists}_num_blocks"))
        for row, count in enumerate(ours.full_kv_num_blocks[0, 0].tolist()):
            assert (
                ours.full_kv_indices[0, 0, row, :count].tolist() == theirs.full_kv_indices[0, 0, row, :count].tolist()
            )
        tokens = torch.arange(layout.ids_RL.shape[1])
        pair = (0, 0, tokens[:, None], tokens[None, :])
        assert torch.equal(ours.mask_mod(*pair), theirs.mask_mod(*pair))


def test_no_tensor_of_all_pairs_is_made() -> None:
    """15,360 tokens: 120 blocks each way. The largest tensor holds a block's pair each, 14,400, or a token each."""
    layout = lay_out([Group([1] * 512, [[2] * 256] * 8) for _ in range(6)])

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.itemsize)
            return out

    with Largest() as largest:
        flex_mask(layout, None, CPU)
    assert layout.ids_RL.shape[1] == 15_360
    assert largest.numel <= 15_360
