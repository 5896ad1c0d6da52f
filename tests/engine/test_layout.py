"""Sharing a prompt among its answers changes nothing: log-probs, values and gradients equal the unshared ones.

Semantics pinned here: an answer sees its prompt and itself only; positions restart; a first token is predicted by the
prompt's last; padding is inert; micro-batch splits respect the token budget; every model family that we claim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gadcli.config.schema import LoraConfig, ModelConfig
from gadcli.engine.layout import Group, lay_out, micro_batches, to_padded, unshared
from gadcli.engine.models import load_actor, load_critic
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
    groups = some_groups()
    logp_N, entropy_N = model.answer_logprobs(lay_out(groups), 0.8)
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
    for layout in (lay_out(groups), lay_out(unshared(groups))):
        logp_N, entropy_N = model.answer_logprobs(layout, 1.0)
        (logp_N.sum() + 0.1 * entropy_N.sum()).backward()
        results.append((logp_N.detach(), gradients(model)))
    (shared, shared_grad), (alone, alone_grad) = results
    assert float((shared - alone).abs().max()) < TOLERANCE
    assert worst_relative(shared_grad, alone_grad) < TOLERANCE
    assert len(shared_grad) == (
        28 if rank else 20
    )  # 7 linears x 2 layers x (A, B); else 9 tensors x 2, embedding, norm


def test_an_answer_that_saw_its_sibling_would_be_caught(tmp_path: Path) -> None:
    """The mutant: a plain causal mask over the shared row, as if answers followed each other."""
    model: Any = load_actor(str(write_tiny_model(tmp_path)), ModelConfig())
    groups = some_groups()
    layout = lay_out(groups)
    length = layout.mask_R1LL.shape[-1]
    layout.mask_R1LL[:] = torch.ones(length, length, dtype=torch.bool).tril()
    oracle = torch.cat([plain_logprobs(model, group, 1.0) for group in groups])
    assert float((model.answer_logprobs(layout, 1.0)[0] - oracle).detach().abs().max()) > 100 * TOLERANCE


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
    groups = [Group([0] * (1 + i), [[0] * (i % 4)]) for i in range(20)]
    batches = list(micro_batches(groups, 48))
    assert sorted(i for batch in batches for i in batch) == list(range(20))
    for batch in batches:
        longest = max(groups[i].n_tokens for i in batch)
        assert longest * len(batch) <= 48


def test_a_group_over_the_budget_goes_alone() -> None:
    groups = [Group([0] * 100, [[0]]), Group([0] * 2, [[0]])]
    assert list(micro_batches(groups, 10)) == [[0], [1]]
