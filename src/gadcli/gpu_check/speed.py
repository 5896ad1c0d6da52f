"""How fast and how large: the device's own rate, mask and head, an update, sharing, memory against the plan."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from gadcli.config.memory import Placement, cut_passes, estimate_model
from gadcli.config.modelinfo import model_shape
from gadcli.config.schema import FsdpConfig
from gadcli.gpu_check.bench import Bench, Finding, at_least, at_most
from gadcli.model import attention, chunked_logprobs
from gadcli.model.block_mask import flex_mask
from gadcli.model.packing import lay_out
from gadcli.model.rollout_batch import teacher_groups

SHARE, SHARING, PLAN = 0.25, 1.5, 0.05  # of the bf16 rate in SFT; of unshared over shared time; of the plan's error
WAITS = 12  # of an update, however many micro-batches it has
TOKENS_PER_S = 30_000  # of SFT on a 0.6B shape, the target on an H100


def check_rate(bench: Bench) -> list[Finding]:
    """What large products reach here: the measure for everything else."""
    size = 8192 if bench.on_gpu else 256
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    rate = 2 * size**3 / bench.milliseconds(lambda: a @ b) * 1e3
    bench.rate["product"] = rate
    return [Finding("rate", f"{size} x {size} products", f"{rate / 1e12:.2f} TFLOP/s")]


def check_mask(bench: Bench) -> list[Finding]:
    """Block masks made in an update (at most one per micro-batch), and what one costs the host."""
    layout = lay_out(bench.rollout(3, ragged=False).student_groups())
    made = [0]
    plain = attention.flex_mask

    def spy(*args: Any) -> Any:
        made[0] += 1
        return plain(*args)

    attention.flex_mask = spy  # type: ignore[assignment]
    try:
        actor = bench.actor()
        actor.update(bench.rollout(), torch.zeros(bench.prompts, bench.answers), None, None)
    finally:
        attention.flex_mask = plain
    row = bench.prompt + bench.answers * bench.answer
    micro_batches = -(-bench.prompts * row // bench.budget)
    ms = bench.milliseconds(lambda: flex_mask(layout, None, bench.device))
    return [
        at_most("mask", "block masks made in an update", made[0], micro_batches),
        Finding("mask", f"one mask of {layout.ids_RL.shape[1]} tokens", f"{ms:.1f} ms"),
    ]


def check_head(bench: Bench) -> list[Finding]:
    """Head chunks, forward and backward: the one in use against others."""
    tokens, shape = (8192 if bench.on_gpu else 64), bench.shape
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    hidden = torch.randn(tokens, shape["hidden_size"], device=bench.device, dtype=dtype).requires_grad_()
    weight = torch.randn(shape["vocab_size"], shape["hidden_size"], device=bench.device, dtype=dtype)
    weight = weight.mul_(0.02).requires_grad_()
    target = torch.randint(0, shape["vocab_size"], (tokens,), device=bench.device)

    def both(chunk: int) -> None:
        logp, _ = chunked_logprobs._ChunkedLogprobs.apply(hidden, weight, target, 1.0, 0.0, chunk)
        logp.sum().backward()
        hidden.grad = weight.grad = None

    own = max(1, chunked_logprobs.CHUNK_LOGITS[bench.device.type] // shape["vocab_size"])
    found = {chunk: bench.milliseconds(lambda chunk=chunk: both(chunk), 2) for chunk in sorted({own, 256, 2048})}  # type: ignore[misc]
    return [
        Finding("head", f"{tokens} tokens in chunks of {chunk}" + (" (in use)" if chunk == own else ""), f"{ms:.1f} ms")
        for chunk, ms in found.items()
    ]


def check_update(bench: Bench) -> list[Finding]:
    """Tokens per second of SFT and of a policy update; what sharing prompts is worth; where the host waits."""
    rollout, actor = bench.rollout(), bench.actor()
    groups = teacher_groups(rollout.rows) * (8 if bench.on_gpu else 1)
    tokens = sum(group.n_tokens for group in groups)
    ms = bench.milliseconds(lambda: actor.sft_update(groups))
    shape = model_shape(bench.shape)
    products = 6 * (shape.causal_params - shape.embedding_params) * tokens / ms * 1e3
    share = products / bench.rate.get("product", float("inf"))
    target = bench.on_gpu and "H100" in torch.cuda.get_device_name()
    found = [
        at_least("update", "SFT, tokens/s", tokens / ms * 1e3, TOKENS_PER_S if target else None),
        at_least("update", "SFT, share of the rate of products", share, SHARE if target else None),
    ]
    advantages = torch.randn(bench.prompts, bench.answers)
    shared = bench.milliseconds(lambda: actor.update(rollout, advantages, None, None))
    actor.model.gad_shares = False
    actor.model.set_attn_implementation("sdpa")
    apart = bench.milliseconds(lambda: actor.update(rollout, advantages, None, None))
    wanted = SHARING if bench.on_gpu else None
    found.append(at_least("update", "unshared over shared update", apart / shared, wanted))
    return [*found, *_waits(bench)]


def _waits(bench: Bench) -> list[Finding]:
    if not bench.on_gpu:
        return []
    actor = bench.actor()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            actor.update(bench.rollout(), torch.zeros(bench.prompts, bench.answers), None, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [at_most("update", "host waits in an update", len(seen), WAITS)]


def check_memory(bench: Bench) -> list[Finding]:
    """The peak of two updates against the plan's figure, with and without checkpointing and adapters."""
    shape, found = model_shape(bench.shape), []
    row = bench.prompt + bench.answers * bench.answer
    passes = cut_passes(row, bench.answers * bench.answer, bench.budget, bench.prompts, bench.answers)
    placement = Placement(bench.device.type, "hf", 1, shape, None)
    for checkpointing in (False, True):
        for lora in (0, 16):

            def learn(checkpointing: bool = checkpointing, lora: int = lora) -> None:
                actor, rollout = bench.actor(checkpointing=checkpointing, lora=lora), bench.rollout(ragged=False)
                for _ in range(2):
                    actor.update(rollout, torch.randn(bench.prompts, bench.answers), None, None)

            peak = bench.peak_over(learn)
            cfg = bench.actor(checkpointing=checkpointing, lora=lora).cfg.model
            plan = estimate_model(shape, cfg, placement, FsdpConfig(), passes, causal=True)
            planned = plan.resident + plan.updating
            what = f"checkpointing {checkpointing}, adapters {lora}: plan over peak"
            if peak is None:
                found.append(Finding("memory", what, f"plan {planned / 2**20:.1f} MiB"))
            else:
                holds = abs(planned / peak - 1) <= PLAN
                found.append(Finding("memory", what, f"{planned / peak:.3f}", f"within {PLAN:.0%}", holds))
    return found
