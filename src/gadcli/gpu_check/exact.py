"""Is it right: attention against plain attention, packing, equal scores, resume, weight sync."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from gadcli.config.schema import RolloutConfig
from gadcli.gpu_check.bench import Bench, Finding, at_most
from gadcli.model import attention
from gadcli.model.actor import Actor
from gadcli.model.packing import Group, lay_out, unshared
from gadcli.rollout.sampler import Sampler, Sampling
from gadcli.rollout.weight_sync import make_probe

RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of values and gradients, by norm


def check_attention(bench: Bench) -> list[Finding]:
    """The compiled kernel, forward and backward, against one plain call per prompt and answer in float32."""
    layout = lay_out(bench.rollout(3).student_groups()[:3]).to(bench.device)
    assert layout.spans is not None
    length = layout.ids_RL.shape[1]
    heads = ((16, 8, 128), (9, 3, 64), (28, 4, 128)) if bench.on_gpu else ((4, 2, 32),)
    plain = attention._Attend(False, None, None)
    found = []
    for dtype in RELATIVE:
        for window in (None, 64 if bench.on_gpu else 5):
            worst = 0.0
            for q_heads, k_heads, size in heads:
                draw = torch.Generator(bench.device).manual_seed(0)
                qkv = [
                    torch.randn(1, n, length, size, device=bench.device, dtype=dtype, generator=draw).requires_grad_()
                    for n in (q_heads, k_heads, k_heads)
                ]
                wide = [tensor.detach().float().requires_grad_() for tensor in qkv]
                if bench.on_gpu:
                    ours = attention._flex(qkv[0], qkv[1], qkv[2], layout, None, window)
                else:
                    ours = attention._by_span(plain, qkv[0], qkv[1], qkv[2], layout.spans, window)
                truth = attention._by_span(plain, wide[0], wide[1], wide[2], layout.spans, window)
                grads = torch.autograd.grad(ours.float().square().sum(), qkv)
                true_grads = torch.autograd.grad(truth.square().sum(), wide)
                pairs = [(ours, truth), *zip(grads, true_grads, strict=True)]
                worst = max(worst, *(_relative(a, b) for a, b in pairs))
            what = f"{str(dtype).removeprefix('torch.')}, window {window}: values and gradients"
            found.append(at_most("attention", what, worst, RELATIVE[dtype]))
    return found


def _relative(ours: Any, truth: Any) -> float:
    ours, truth = ours.detach().float(), truth.detach()
    return float((ours - truth).norm() / truth.norm().clamp(min=1e-12))


def check_scores(bench: Bench) -> list[Finding]:
    """One text after one prompt, among neighbours of several lengths: what its score varies by is rounding."""
    critic = bench.critic()
    prompt, text = bench.ids(bench.prompt // 2, 5), bench.ids(bench.answer, 9)
    groups = []
    for i in range(6):
        groups += [Group(prompt, [text], 2 * i), Group(bench.ids(3 + 5 * i, i), [bench.ids(4 + i, i)], 2 * i + 1)]
    scores = torch.stack([raw[0] for raw in critic.score(groups)[::2]])
    spread, floor = float(scores.amax() - scores.amin()), critic.precision * max(4.2, 8 * float(scores.abs().amax()))
    twins = critic.score([Group(prompt, [text, bench.ids(3, 1), text])])[0]
    return [
        at_most("scores", "one text's scores vary by (limit: the noise floor)", spread, floor),
        at_most("scores", "equal answers of a group are apart by", float((twins[0] - twins[2]).abs()), 0.0),
    ]


def check_packing(bench: Bench) -> list[Finding]:
    """Log-probs of packed answers against each answer alone, and of the compute type against float32."""
    rollout = bench.rollout()
    groups, width = rollout.student_groups()[:2], rollout.width
    actor = bench.actor()
    packed, alone = actor.logprobs(groups, width), actor.logprobs(unshared(groups), width)
    exact = bench.actor("float32").logprobs(groups, width)
    counted = (packed != 0).sum()
    apart, rounding = (float((packed - other).abs().sum() / counted) for other in (alone, exact))
    limit = max(1e-5, 2 * rounding)
    return [
        at_most("packing", "packed against alone, mean nats", apart, limit),
        at_most("packing", "compute type against float32, mean nats", rounding, None),
    ]


def check_resume(bench: Bench) -> list[Finding]:
    """Two updates, the state copied to the host and into a new actor, two more: bit-equal to four in a row."""
    from gadcli.train.async_save import host_copy
    from gadcli.train.model_state import model_state, optimizer_state

    def learn(actor: Actor, seed: int) -> None:
        for i in range(2):
            draw = torch.Generator().manual_seed(seed + i)
            advantages = torch.randn(bench.prompts, bench.answers, generator=draw)
            actor.update(bench.rollout(seed + i), advantages, None, None)

    whole = bench.actor(lr=1e-4)
    learn(whole, 0)
    saved = host_copy([model_state(whole.model), optimizer_state(whole.model, whole.optimizer)])
    learn(whole, 10)
    resumed = bench.actor(lr=1e-4)
    resumed.optimizer.updates = 2
    fresh = [model_state(resumed.model), optimizer_state(resumed.model, resumed.optimizer)]
    with torch.no_grad():
        for state, there in zip(saved, fresh, strict=True):
            for name, tensor in there.items():
                _local(tensor).copy_(_local(state[name]))
    learn(resumed, 10)
    ours, theirs = model_state(resumed.model), model_state(whole.model)
    differ = [name for name in theirs if not torch.equal(_local(ours[name]), _local(theirs[name]))]
    return [at_most("resume", f"of {len(theirs)} weights that differ after a restart", len(differ), 0)]


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_sync(bench: Bench) -> list[Finding]:
    """A sync, an update, a sync: the tensors are compared bit for bit inside `load`, the log-probs here."""
    from gadcli.rollout.build import build_sampler

    engine = "vllm" if importlib.util.find_spec("vllm") else "hf"
    cfg = RolloutConfig(
        engine=engine,
        n=4,
        max_num_seqs=32,
        max_model_len=bench.prompt + bench.answer + 32,
        kv_cache_gb=2.0 if bench.on_gpu else 0.02,
        sleep=bench.on_gpu and engine == "vllm",
    )
    sampler = build_sampler(cfg, bench.folder, bench.world, eos_ids=[1], dtype="auto", seed=1, weights=False)
    actor = bench.actor(lr=1e-3)
    try:
        return list(_synced(bench, sampler, actor, engine))
    finally:
        sampler.close()


def _synced(bench: Bench, sampler: Sampler, actor: Actor, engine: str) -> list[Finding]:
    ids = bench.ids(min(64, bench.prompt), 3)
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    probe = make_probe(ids, 0.0, dtype)
    found = []
    for step in (1, 2):
        sampler.load(actor.model)
        logp = actor.logprobs([Group(ids[:1], [ids[1:]])], len(ids) - 1, temperature=1.0)[0].tolist()
        difference = probe.check(logp, sampler.logprobs(ids), step)
        what = f"{engine}, sync {step}: tensors bit-equal; log-probs apart"
        found.append(at_most("sync", what, difference, probe.tolerance))
        actor.update(bench.rollout(), torch.randn(bench.prompts, bench.answers), None, None)
    sampling = Sampling(1, 0.0, 1.0, -1, 8)
    prompts, seeds = [bench.ids(bench.prompt // 2, i) for i in range(4)], [1, 2, 3, 4]
    awake = [[a.ids for a in group] for group in sampler.generate(prompts, sampling, seeds)]
    sampler.sleep()
    again = [[a.ids for a in group] for group in sampler.generate(prompts, sampling, seeds)]
    return [*found, Finding("sync", "same answers after sleep and wake", str(awake == again), "True", awake == again)]
