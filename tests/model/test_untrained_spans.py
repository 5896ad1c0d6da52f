"""`data.turns=each`: other speakers' turns are forwarded and not predicted, packed or padded."""

from __future__ import annotations

import pytest

from gadcli.model.packing import Group, Layout, lay_out, lay_out_padded

# A chat: prompt 1 2; trained 3 4; another speaker's 5 6 7; trained 8.
CHAT = Group([1, 2], [[3, 4, 5, 6, 7, 8]], untrained=((2, 5),))
PLAIN = Group([9], [[10, 11]])


@pytest.mark.parametrize("make", [lay_out, lay_out_padded])
def test_only_trained_tokens_are_targets_and_each_is_predicted_by_the_token_before_it(make: object) -> None:
    layout: Layout = make([CHAT, PLAIN])  # type: ignore[operator]
    ids = layout.ids_RL.flatten()
    assert layout.target_N.tolist() == [3, 4, 8, 10, 11] and layout.lengths == [3, 2]
    assert ids[layout.own_N].tolist() == [3, 4, 8, 10, 11]
    assert ids[layout.predictor_N].tolist() == [2, 3, 7, 9, 10]
    assert [i for i in ids.tolist() if i] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # all are forwarded


def test_without_untrained_spans_every_token_is_predicted() -> None:
    assert PLAIN.predicted([10, 11]) == [0, 1]
    assert Group([1], [[2, 3]], untrained=((0, 1),)).predicted([2, 3]) == [1]
