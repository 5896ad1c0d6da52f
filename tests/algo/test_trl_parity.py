"""Parity with losses we did not write: TRL's GRPO (sequence and token ratios), SFT and DPO, through a tiny model.

TRL computes its own log-probs from the model (temperature, shift, masks), so the whole path is compared, gradients
of every parameter included. TRL is a test-only dependency; without it these tests are skipped.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from algo.mutants import mutated
from algo.reference_logp import next_token_logp
from gadcli.algo import aggregate, kl, policy, sft, soda

pytest.importorskip("trl")
pytestmark = pytest.mark.slow  # importing TRL alone takes about 10 s

TOLERANCE = 1e-6  # absolute, on losses of order 1 and on gradients of order .1
VOCAB, PAD, EOS, WIDTH, TEMPERATURE = 40, 1, 2, 6, 0.8


@pytest.fixture(scope="module")
def trl() -> dict[str, Any]:
    # TRL imports vLLM (seconds, gigabytes) wherever it is installed; these losses need none.
    importlib.import_module("trl.import_utils").is_vllm_available = lambda min_version=None: False
    names = {"grpo_trainer": "GRPOTrainer", "grpo_config": "GRPOConfig"}
    names |= {"sft_trainer": "SFTTrainer", "sft_config": "SFTConfig"}
    names |= {"dpo_trainer": "DPOTrainer", "dpo_config": "DPOConfig"}
    return {name: getattr(importlib.import_module(f"trl.trainer.{module}"), name) for module, name in names.items()}


def tiny_model() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, pad_token_id=PAD, eos_token_id=EOS,
                                         bos_token_id=3, max_position_embeddings=64, **shape))  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # the init's near-uniform policy would hide a dropped temperature
    return model


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2", unk_token="w0")


def grpo_trainer(trl: dict[str, Any], folder: Path, level: str, loss_type: str, beta: float) -> Any:
    from datasets import Dataset

    args = trl["GRPOConfig"](
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], temperature=TEMPERATURE, beta=0.0,
        importance_sampling_level=level, loss_type=loss_type, epsilon=0.1, epsilon_high=0.2, num_generations=4,
        per_device_train_batch_size=4, max_completion_length=WIDTH,
        use_bias_correction_kl=False,  # TRL can weight its k3 by the ratio; the formula we pin does not
    )  # fmt: skip
    trainer = trl["GRPOTrainer"](
        model=tiny_model(), args=args, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["w5 w6"] * 4}), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.beta = beta  # set here, or TRL would build a reference model; ours is a tensor in the batch
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def grpo_batch(model: Any) -> dict[str, Tensor]:
    """Ragged answers, a left-padded prompt, positive and negative advantages, one zero-variance group of four."""
    g = torch.Generator().manual_seed(1)
    rows = 12
    lengths = torch.randint(1, WIDTH + 1, (rows,), generator=g)
    mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    advantages = torch.randn(rows, generator=g)
    advantages[4:8] = 0.0
    prompt_mask = torch.ones(rows, 3).long()
    prompt_mask[0, 0] = 0
    batch = {
        "prompt_ids": torch.randint(4, VOCAB, (rows, 3), generator=g),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(4, VOCAB, (rows, WIDTH), generator=g).masked_fill(mask == 0, PAD),
        "completion_mask": mask,
        "advantages": advantages,
    }
    # An old policy near the model's: whole answers and single tokens on both sides of the clips.
    with torch.no_grad():
        logp = answer_logp(model, batch)
    drift = torch.randn(rows, 1, generator=g) * 0.2 + torch.randn(rows, WIDTH, generator=g) * 0.2
    return {**batch, "old_per_token_logps": logp + drift, "ref_per_token_logps": logp - drift}


def answer_logp(model: Any, batch: dict[str, Tensor], temperature: float = TEMPERATURE) -> Tensor:
    """Ours: log-probs [B, T] of the answer's tokens."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits
    return next_token_logp(logits, ids, temperature)[:, -WIDTH:]


def gradients(model: Any) -> Tensor:
    grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return grad


CASES = {
    # our (mode, agg) for TRL's (importance_sampling_level, loss_type); clip_c beyond reach, as TRL has no dual clip
    "gspo": ("gspo", "seq-mean-token-mean", "sequence", "grpo"),
    "grpo": ("grpo", "seq-mean-token-mean", "token", "grpo"),
    "ppo": ("ppo", "token-mean", "token", "bnpo"),
    "dr_grpo": ("ppo", "seq-mean-token-sum-norm", "token", "dr_grpo"),
}


def check_grpo(trainer: Any, case: str, *, policy_module: ModuleType = policy,
               kl_module: ModuleType = kl, beta: float = 0.0) -> None:  # fmt: skip
    mode, agg, _, _ = CASES[case]
    model = trainer.model
    batch = grpo_batch(model)
    expected = trainer._compute_loss(model, batch)
    expected.backward()
    expected_grad = gradients(model)

    logp, mask = answer_logp(model, batch), batch["completion_mask"]
    old, ref = batch["old_per_token_logps"], batch["ref_per_token_logps"]
    loss, metrics = policy_module.policy_loss(mode, logp, old, batch["advantages"], mask, clip_low=0.1, clip_high=0.2,
                                              clip_c=1e9, agg=agg, horizon=float(WIDTH))  # fmt: skip
    if beta:
        loss = loss + beta * kl_module.kl_loss("low_var_kl", logp, ref, mask, agg=agg)[0]
    loss.backward()
    assert 0 < metrics["actor/pg_clipfrac"].value < 1  # the batch reaches the clips, and not only them
    assert loss.item() == pytest.approx(expected.item(), abs=TOLERANCE)
    assert torch.allclose(gradients(model), expected_grad, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("case", list(CASES))
def test_policy_loss_and_gradients_equal_trls(trl: dict[str, Any], tmp_path: Path, case: str) -> None:
    check_grpo(grpo_trainer(trl, tmp_path, *CASES[case][2:], beta=0.0), case)


def test_k3_in_the_loss_equals_trls_beta(trl: dict[str, Any], tmp_path: Path) -> None:
    check_grpo(grpo_trainer(trl, tmp_path, "sequence", "grpo", beta=0.3), "gspo", beta=0.3)


POLICY_MUTANTS = [
    ("masked_mean(delta_BT, mask).detach()[:, None]", "masked_mean(delta_BT, mask)[:, None]"),  # no stop-gradient
    ("masked_mean(delta_BT, mask).detach()", "delta_BT.sum(-1).detach()"),  # sum for mean
    ("masked_mean(delta_BT, mask).detach()", "delta_BT.mean(-1).detach()"),  # over the padded width
    ("resolve_agg(mode, agg)", '"token-mean"'),  # tokens for rows
    ("resolve_agg(mode, agg)", '"seq-mean-token-sum"'),
    ("clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)"),
]


def test_mutants_fail_the_parity_with_trl(trl: dict[str, Any], tmp_path: Path) -> None:
    trainer = grpo_trainer(trl, tmp_path, "sequence", "grpo", beta=0.0)
    check_grpo(trainer, "gspo")
    for old, new in POLICY_MUTANTS:
        with pytest.raises(AssertionError):
            check_grpo(trainer, "gspo", policy_module=mutated("policy", old, new))


TOKEN_MUTANTS = {
    "grpo": [
        ("resolve_agg(mode, agg)", '"token-mean"'),
        ("clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)"),
        ("torch.maximum(-adv * ratio_BT,", "torch.minimum(-adv * ratio_BT,"),
        ('SEQUENCE_LEVEL = ("gspo", "gspo_token")', "SEQUENCE_LEVEL = POLICY_LOSSES"),  # one ratio an answer
    ],
    "ppo": [("resolve_agg(mode, agg)", '"seq-mean-token-mean"')],  # mean of means
    "dr_grpo": [
        ("resolve_agg(mode, agg)", '"seq-mean-token-sum"'),  # sum for mean
        ("Denominators(rows, tokens, horizon)", "Denominators(rows, tokens, mask.sum(-1).max().item() - 1)"),
    ],
}
KL_MUTANTS = [
    ("ref_BT.detach().float() - logp_BT.float()", "logp_BT.float() - ref_BT.detach().float()"),
    ("(x_BT.exp() - x_BT - 1.0).clamp(-10.0, 10.0)", "0.5 * x_BT.square()"),
    ("kl_BT, mask_BT, agg, Denominators", 'kl_BT, mask_BT, "token-mean", Denominators'),
]


@pytest.mark.parametrize("case", list(TOKEN_MUTANTS))
def test_mutants_of_token_losses_fail_the_parity_with_trl(trl: dict[str, Any], tmp_path: Path, case: str) -> None:
    trainer = grpo_trainer(trl, tmp_path, *CASES[case][2:], beta=0.0)
    check_grpo(trainer, case)
    mutants = [{"policy_module": mutated("policy", old, new)} for old, new in TOKEN_MUTANTS[case]]
    for mutant in mutants:
        with pytest.raises(AssertionError):
            check_grpo(trainer, case, **mutant)


def test_mutants_of_the_kl_fail_the_parity_with_trl(trl: dict[str, Any], tmp_path: Path) -> None:
    trainer = grpo_trainer(trl, tmp_path, "sequence", "grpo", beta=0.3)
    for old, new in KL_MUTANTS:
        with pytest.raises(AssertionError):
            check_grpo(trainer, "gspo", kl_module=mutated("kl", old, new), beta=0.3)


def check_sft(trainer: Any, *, sft_module: ModuleType = sft) -> None:
    """Two ragged micro-batches of one optimiser step, divided by the step's tokens."""
    model = trainer.model
    g = torch.Generator().manual_seed(2)
    parts = []
    for rows in (1, 5):
        ids = torch.randint(4, VOCAB, (rows, 9), generator=g)
        lengths = torch.randint(4, 10, (rows,), generator=g)
        valid = torch.arange(9) < lengths[:, None]
        answer = valid & (torch.arange(9) >= 3)  # three prompt tokens
        parts.append((ids.masked_fill(~valid, PAD), valid.long(), answer))
    tokens = sum(int(answer.sum()) for *_, answer in parts)

    expected = 0.0
    for ids, valid, answer in parts:
        inputs = {"input_ids": ids, "attention_mask": valid, "labels": ids.masked_fill(~answer, -100)}
        part = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(tokens))
        part.backward()
        expected += part.item()
    expected_grad = gradients(model)

    total = 0.0
    for ids, valid, answer in parts:
        logits = model(input_ids=ids, attention_mask=valid).logits
        part, _ = sft_module.sft_loss(next_token_logp(logits, ids), answer[:, 1:], float(tokens))
        part.backward()
        total += part.item()
    assert total == pytest.approx(expected, abs=TOLERANCE)
    assert torch.allclose(gradients(model), expected_grad, atol=TOLERANCE, rtol=1e-4)


def test_sft_loss_and_gradients_equal_trls_and_mutants_do_not(trl: dict[str, Any], tmp_path: Path) -> None:
    from datasets import Dataset

    args = trl["SFTConfig"](output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = trl["SFTTrainer"](model=tiny_model(), args=args, processing_class=tiny_tokenizer(),
                                train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7, EOS]]}))  # fmt: skip
    check_sft(trainer)
    for old, new in [
        ("Denominators(tokens=tokens)", "Denominators()"),  # each micro-batch by its own tokens: a sum of means
        ('"token-mean"', '"seq-mean-token-mean"'),  # mean of means
        ("-logp_BT.float()", "-logp_BT.float() / 0.8"),
    ]:
        with pytest.raises(AssertionError):
            check_sft(trainer, sft_module=mutated("sft", old, new))


def test_every_aggregation_but_the_plain_row_sum_has_a_parity_case() -> None:
    covered = {agg for _, agg, _, _ in CASES.values()}
    assert set(aggregate.AGG_MODES) - covered == {"seq-mean-token-sum"}  # by hand in test_policy.py


def check_soda(trainer: Any, batch: dict[str, Tensor], *, soda_module: ModuleType = soda) -> None:
    """Ragged pairs whose start model is not the student: loss, gradients, margin and accuracy."""
    model = trainer.model
    expected = trainer._compute_loss(model, batch, return_outputs=False)
    expected.backward()
    expected_grad = gradients(model)
    logged = {name: values.pop() for name, values in trainer._metrics["train"].items() if isinstance(values, list)}

    ids, answer = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    logp_B = next_token_logp(logits, ids).masked_fill(~answer, 0.0).sum(-1)
    teacher, snapshot = logp_B.chunk(2)
    loss, metrics = soda_module.soda_loss(
        teacher, snapshot, batch["ref_chosen_logps"], batch["ref_rejected_logps"], beta=0.3
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=TOLERANCE)
    assert torch.allclose(gradients(model), expected_grad, atol=TOLERANCE, rtol=1e-4)
    assert metrics["actor/soda_margin"].value == pytest.approx(logged["rewards/margins"], abs=1e-5)
    assert metrics["actor/soda_acc"].value == pytest.approx(logged["rewards/accuracies"])
    assert metrics["actor/soda_acc"].value == pytest.approx(2 / 5)


def soda_batch(model: Any) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    rows = 10  # five teacher's answers, then five snapshots'
    lengths = torch.randint(4, 10, (rows,), generator=g)
    valid = torch.arange(9) < lengths[:, None]
    answer = valid & (torch.arange(9) >= 3)  # three prompt tokens
    ids = torch.randint(4, VOCAB, (rows, 9), generator=g).masked_fill(~valid, PAD)
    with torch.no_grad():
        logp_BT = next_token_logp(model(input_ids=ids, attention_mask=valid.long()).logits, ids)
    drift_B = torch.tensor([-3.0, 3.0, -2.0, 1.0, 0.5, 1.0, -2.0, -3.0, 2.0, -1.0])  # two pairs won, three lost
    start_B = logp_BT.masked_fill(~answer[:, 1:], 0.0).sum(-1) + drift_B
    return {"input_ids": ids, "attention_mask": valid.long(), "completion_mask": answer.long(),
            "ref_chosen_logps": start_B[:5], "ref_rejected_logps": start_B[5:]}  # fmt: skip


def test_soda_and_its_gradients_equal_trls_dpo_and_mutants_do_not(trl: dict[str, Any], tmp_path: Path) -> None:
    from datasets import Dataset

    args = trl["DPOConfig"](output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], beta=0.3,
                            precompute_ref_log_probs=True, per_device_train_batch_size=1)  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["w5 w6"], "chosen": ["w7 w8"], "rejected": ["w9"]})
    model = tiny_model()
    trainer = trl["DPOTrainer"](model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer())
    batch = soda_batch(trainer.model)
    check_soda(trainer, batch)
    for old, new in [
        ("beta * (teacher_gain_N - snapshot_gain_N)", "beta * (snapshot_gain_N - teacher_gain_N)"),
        ("teacher_N.float() - teacher_ref_N.detach().float()", "teacher_N.float()"),  # no reference
        ("F.softplus(-margin_N)", "F.relu(1 - margin_N)"),
        ("F.softplus(-margin_N)", "(1 - margin_N / 0.6) ** 2"),  # IPO
    ]:
        with pytest.raises(AssertionError):
            check_soda(trainer, batch, soda_module=mutated("soda", old, new))
