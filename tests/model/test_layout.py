"""Sharing a prompt among its answers changes nothing: log-probs, values and gradients equal the unshared ones.

Semantics pinned here: an answer sees its prompt and itself only; positions restart; a first token is predicted by the
prompt's last; groups packed into one row do not see each other; no token of a packed row is padding; micro-batch splits
respect the token budget and are balanced; every model family that we claim, with sliding windows and capped logits.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from gadcli.config.schema import LoraConfig, ModelConfig
from gadcli.model.attention import _Attend, _by_span, flex_mask
from gadcli.model.loading import load_actor, load_critic
from gadcli.model.packing import Group, lay_out, lay_out_padded, micro_batches, to_padded, unshared
from tiny import FAMILIES, write_tiny_model

TOLERANCE = 2e-5  # float32 rounding through two layers, log-probs and relative gradients


def some_groups() -> list[Group]:
    """Ragged prompts and answers, one empty, one pair equal."""
    draw = torch.Generator().manual_seed(3)
    ids = lambda n: torch.randint(2, 250, (n,), generator=draw).tolist()  # noqa: E731
    same = ids(4)
    return [
        Group(ids(9), [ids(5), ids(1), same, same]),
        Group(ids(3), [ids(7), [], ids(2), ids(6)]),
    ]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def worst_relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)) for n in a)


def plain_logprobs(model: Any, group: Group, temperature: float) -> torch.Tensor:
    """The oracle: each answer alone behind its prompt, through the model's own forward, no mask of ours."""
    rows = []
    for answer in group.answers:
        if not answer:
            continue
        logits = model(input_ids=torch.tensor([group.prompt_ids + answer]), use_cache=False).logits[0].float()
        start = len(group.prompt_ids)
        logp = torch.log_softmax(logits[start - 1 : -1] / temperature, -1)
        rows.append(logp[torch.arange(len(answer)), torch.tensor(answer)])
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_logprobs_equal_each_answer_alone_in_the_models_own_forward(family: str, tmp_path: Path) -> None:
    model: Any = load_actor(str(write_tiny_model(tmp_path, family)), ModelConfig())
    assert model.gad_shares
    groups = some_groups()
    logp_N, entropy_N = model.answer_logprobs(lay_out(groups), 0.8)
    model.set_attn_implementation("eager")  # transformers' own code, masks included
    oracle = torch.cat([plain_logprobs(model, group, 0.8) for group in groups])
    assert float((logp_N - oracle).detach().abs().max()) < TOLERANCE
    assert (entropy_N > 0).all()
    (logp_N * torch.linspace(0.5, 1.5, len(logp_N))).sum().backward()
    shared = gradients(model)
    (oracle * torch.linspace(0.5, 1.5, len(oracle))).sum().backward()
    assert worst_relative(shared, gradients(model)) < TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_sharing_is_exact_with_lora_and_gradient_checkpointing(rank: int, checkpointing: bool, tmp_path: Path) -> None:
    cfg = ModelConfig(lora=LoraConfig(rank=rank), gradient_checkpointing=checkpointing)
    model: Any = load_actor(str(write_tiny_model(tmp_path)), cfg)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide LoRA altogether
            torch.nn.init.normal_(p, std=0.1)
    groups = some_groups()
    results = []
    for layout in (lay_out(groups), lay_out(unshared(groups)), lay_out_padded(groups)):
        logp_N, entropy_N = model.answer_logprobs(layout, 1.0)
        (logp_N.sum() + 0.1 * entropy_N.sum()).backward()
        results.append((logp_N.detach(), gradients(model)))
    shared, shared_grad = results[0]
    for alone, alone_grad in results[1:]:
        assert float((shared - alone).abs().max()) < TOLERANCE
        assert worst_relative(shared_grad, alone_grad) < TOLERANCE
    assert len(shared_grad) == (
        28 if rank else 20
    )  # 7 linears x 2 layers x (A, B); else 9 tensors x 2, embedding, norm


@pytest.mark.parametrize("mutant", ["siblings", "neighbours", "prompt unseen"])
def test_an_answer_that_saw_more_or_less_would_be_caught(mutant: str, tmp_path: Path) -> None:
    """A causal mask over a whole group, the same over the whole row, and answers without their prompt."""
    model: Any = load_actor(str(write_tiny_model(tmp_path)), ModelConfig())
    groups = some_groups()
    layout = lay_out(groups)
    assert layout.spans is not None
    wrong = {
        "siblings": tuple((sum(group),) for group in layout.spans),
        "neighbours": ((sum(map(sum, layout.spans)),),),
        "prompt unseen": tuple((size,) for group in layout.spans for size in group),
    }
    oracle = torch.cat([plain_logprobs(model, group, 1.0) for group in groups])
    found = model.answer_logprobs(dataclasses.replace(layout, spans=wrong[mutant]), 1.0)[0]
    assert float((found - oracle).detach().abs().max()) > 100 * TOLERANCE


def test_a_packed_row_holds_every_token_once_and_nothing_else() -> None:
    groups = some_groups()
    layout = lay_out(groups)
    assert layout.ids_RL.shape == (1, sum(group.n_tokens for group in groups))
    assert layout.spans == ((9, 5, 1, 4, 4), (3, 7, 2, 6))  # the empty answer takes no token
    assert lay_out(unshared(groups)[:1]).spans == ((14,),)  # one answer: plain causal, prompt and all


def test_a_window_shorter_than_the_text_changes_what_is_computed(tmp_path: Path) -> None:
    """Else the windows in FAMILIES would test nothing: the same weights without a window differ."""
    path = str(write_tiny_model(tmp_path, "mistral"))
    model: Any = load_actor(path, ModelConfig())
    layout = lay_out(some_groups())
    windowed = model.answer_logprobs(layout, 1.0)[0]
    model.config.sliding_window = None
    assert float((model.answer_logprobs(layout, 1.0)[0] - windowed).detach().abs().max()) > 100 * TOLERANCE


def test_the_block_mask_for_gpus_is_what_the_cpu_path_computes(tmp_path: Path) -> None:
    """flex attention runs forward on CPUs too, uncompiled and slowly: enough to check the mask that GPUs will use."""
    layout = lay_out(some_groups())
    draw = torch.Generator().manual_seed(1)
    length = layout.ids_RL.shape[1]
    q, k, v = (torch.randn(1, heads, length, 16, generator=draw) for heads in (4, 2, 2))
    attend = _Attend(False, 0.3, None)
    assert layout.spans is not None
    for window in (None, 6):
        ours = _by_span(attend, q, k, v, layout.spans, window)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is slow
            mask = flex_mask(layout, window, q.device)
            flexed = flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
        assert torch.allclose(ours, flexed, atol=1e-5)
        wrong = flex_mask(layout, 3, q.device)
        assert not torch.allclose(
            ours, flex_attention(q, k, v, block_mask=wrong, scale=0.3, enable_gqa=True), atol=1e-3
        )


def test_equal_texts_score_equally_wherever_they_stand_in_the_group(tmp_path: Path) -> None:
    """Teacher and student text that are the same, EOS included, must be worth the same to the critic."""
    loaded = load_critic(str(write_tiny_model(tmp_path)), ModelConfig(), seed=5)
    assert loaded.fresh_head
    layout = lay_out(some_groups())
    values_BT = to_padded(loaded.model.answer_values(layout), layout.lengths, 7)
    assert torch.allclose(values_BT[2], values_BT[3], atol=1e-6, rtol=0)
    assert float((values_BT[0] - values_BT[2]).detach().abs().max()) > 1e-3


def test_the_same_seed_draws_the_same_scalar_head_and_another_seed_another(tmp_path: Path) -> None:
    path = str(write_tiny_model(tmp_path))
    heads = [load_critic(path, ModelConfig(), seed).model.score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_micro_batches_hold_every_group_once_within_the_budget() -> None:
    tokens = [1 + i + i % 4 for i in range(20)]
    batches = micro_batches(tokens, 50)
    assert sorted(i for batch in batches for i in batch) == list(range(20))
    sums = [sum(tokens[i] for i in batch) for batch in batches]
    assert max(sums) <= 50
    assert len(batches) == -(-sum(tokens) // 50)  # as few as the sum allows
    assert max(sums) - min(sums) <= 4  # and balanced


def test_a_group_over_the_budget_goes_alone() -> None:
    assert sorted(micro_batches([101, 3, 2], 10)) == [[0], [1, 2]]


def test_more_micro_batches_can_be_asked_for_but_none_is_empty() -> None:
    assert sorted(micro_batches([4, 4, 4], 100, at_least=2)) in ([[0, 2], [1]], [[0], [1, 2]])
    assert sorted(micro_batches([4, 4, 4], 100, at_least=9)) == [[0], [1], [2]]
