"""What makes a run fit: which overrides, tried in the plan's own arithmetic, and what other machines would hold.

Advice is never a guess: every override named here was put into the config, and the estimate made anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gadcli.config.memory import ENGINE_RUNTIME, GIB, MemoryEstimate, Placement, compute_bytes, estimate, gb
from gadcli.config.schema import GadConfig

GPU_GB = 79.6  # what an "80-GB" GPU has, in GiB, as nvidia-smi counts an A100 or H100
CLUSTERS = (1, 8, 16)  # GPUs the plan tells about where the machine has none
MORE_GPUS = (2, 4, 8, 16, 32, 64, 128)
GPUS_A_NODE = 8
HEADROOM = 0.95  # of a GPU: the allocator's fragments, and what the estimate misses
LARGE = 10**9  # parameters from which a machine without GPUs is told about machines with some
LORA_RANK = 64
SMALLEST_SHARE = 0.05  # of rollout.gpu_memory_utilization, by the schema
ANSWERS_AT_ONCE = 16  # sequences that a smaller share of a GPU must still leave KV cache for


@dataclass(frozen=True)
class Advice:
    """Overrides that lower the peak of a device to `peak_gb`; `fits` says whether that is enough."""

    overrides: tuple[str, ...]
    peak_gb: float
    fits: bool


@dataclass(frozen=True)
class Holding:
    """What one GPU of `gpus` equal ones would hold, and what makes it fit where it does not."""

    gpus: int
    memory: MemoryEstimate
    fits: bool
    advice: Advice | None

    def to_json(self) -> dict[str, Any]:
        return {
            "gpus": self.gpus,
            "gpu_gb": GPU_GB,
            "training_peak": self.memory.training_peak,
            "rollout_peak": self.memory.rollout_peak,
            "host_ram_a_node": self.memory.host_ram,
            "fits": self.fits,
            "advice": list(self.advice.overrides) if self.advice else [],
            "fits_with_advice": self.fits or (self.advice is not None and self.advice.fits),
            "memory": self.memory.to_json(),
        }


def with_values(cfg: GadConfig, values: Mapping[str, Any]) -> GadConfig:
    """A copy of a config with some dotted keys set."""
    changed = copy.deepcopy(cfg)
    for key, value in values.items():
        *path, name = key.split(".")
        node: Any = changed
        for part in path:
            node = getattr(node, part)
        assert hasattr(node, name), key
        setattr(node, name, value)
    return changed


def peak_gb(memory: MemoryEstimate) -> float:
    return max(memory.training_peak, memory.rollout_peak) / GIB


def ways(cfg: GadConfig, placement: Placement) -> Iterator[dict[str, Any]]:
    """Changes that may lower the peak, the cheapest in speed and quality first."""
    trains_critic = cfg.trainer.critic_warmup >= 0
    if placement.device == "cuda":
        if cfg.actor.use_kl_loss and not cfg.actor.model.lora.rank:
            yield {"fsdp.offload_reference": True}
        if placement.engine == "vllm":
            yield {"rollout.sleep": True}
        yield from ({"rollout.gpu_memory_utilization": share} for share in smaller_shares(cfg, placement))
    else:
        yield {"rollout.kv_cache_gb": 0.25}
    yield {"actor.model.gradient_checkpointing": True}
    if trains_critic:
        yield {"critic.model.gradient_checkpointing": True}
    yield from smaller_budgets(cfg, trains_critic)
    if trains_critic and placement.device == "cuda":
        yield {"fsdp.offload_critic": True}
    yield {"actor.model.lora.rank": LORA_RANK}
    if trains_critic:
        yield {"critic.model.lora.rank": LORA_RANK}


def smaller_shares(cfg: GadConfig, placement: Placement) -> Iterator[float]:
    """Smaller shares of a GPU for the sampler that still hold its weights and a KV cache to work with."""
    if not placement.device_gb or placement.engine != "vllm" or cfg.rollout.kv_cache_gb:
        return
    itemsize = compute_bytes(cfg.actor.model, "cuda")
    weights = placement.student.causal_params * itemsize / cfg.rollout.tensor_parallel_size
    token = placement.student.kv_bytes_per_token(itemsize) / cfg.rollout.tensor_parallel_size
    need = weights + ENGINE_RUNTIME["cuda"] + ANSWERS_AT_ONCE * cfg.rollout.max_model_len * token
    share = round(cfg.rollout.gpu_memory_utilization - 0.05, 2)
    while share >= SMALLEST_SHARE and share * placement.device_gb * GIB >= need:
        yield share
        share = round(share - 0.05, 2)


def smaller_budgets(cfg: GadConfig, trains_critic: bool) -> Iterator[dict[str, Any]]:
    """Token budgets halved until one row (a prompt and its answers) fills them: fewer changes nothing."""
    row = cfg.data.max_prompt_length + cfg.data.max_response_length
    for role, budget in (("actor", cfg.actor.micro_batch_tokens), ("critic", cfg.critic.micro_batch_tokens)):
        if role == "critic" and not trains_critic:
            continue
        while budget // 2 >= row:
            budget //= 2
            yield {f"{role}.micro_batch_tokens": budget}


def advise(cfg: GadConfig, placement: Placement, limit_gb: float) -> Advice | None:
    """The fewest of `ways` that bring the peak to `limit_gb`, or all that help; None if it fits as it is.

    First one way after the other until it fits, keeping those that lower the peak; then each is taken back that
    turns out not to be needed. An estimate costs about 50 microseconds.
    """

    def peak(values: Mapping[str, Any]) -> float:
        return peak_gb(estimate(with_values(cfg, values), placement))

    lowest = peak({})
    if lowest <= limit_gb:
        return None
    chosen: dict[str, Any] = {}
    for change in ways(cfg, placement):
        tried = peak({**chosen, **change})
        if tried < lowest:
            chosen.update(change)
            lowest = tried
        if lowest <= limit_gb:
            break
    for key in list(chosen):
        rest = {k: v for k, v in chosen.items() if k != key}
        if (without := peak(rest)) <= max(limit_gb, lowest):
            chosen, lowest = rest, without
    words = tuple(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in chosen.items())
    return Advice(words, lowest, lowest <= limit_gb)


def gpus_that_fit(cfg: GadConfig, placement: Placement, limit_gb: float) -> int | None:
    """The fewest GPUs (of this kind, at these settings) whose share fits."""
    for gpus in MORE_GPUS:
        if gpus > placement.world_size and peak_gb(estimate(cfg, on_gpus(placement, gpus))) <= limit_gb:
            return gpus
    return None


def on_gpus(placement: Placement, gpus: int) -> Placement:
    """The same models on so many GPUs, in machines of eight."""
    device_gb = placement.device_gb if placement.device == "cuda" else GPU_GB
    return replace(
        placement, device="cuda", engine="vllm", world_size=gpus, device_gb=device_gb, local_size=min(gpus, GPUS_A_NODE)
    )


def what_gpus_hold(cfg: GadConfig, placement: Placement) -> list[Holding]:
    """What 1, 8 and 16 GPUs of 80 GB would hold of this run."""
    holdings = []
    for gpus in CLUSTERS:
        there = on_gpus(placement, gpus)
        fsdp = {"fsdp.replicate": cfg.fsdp.replicate if gpus % cfg.fsdp.replicate == 0 else 1}
        config = with_values(cfg, fsdp)
        limit = HEADROOM * GPU_GB
        memory = estimate(config, there)
        advice = advise(config, there, limit)
        holdings.append(Holding(gpus, memory, advice is None, advice))
    return holdings


def holding_table(holdings: list[Holding], label_width: int) -> list[str]:
    """GiB per GPU, a column a cluster: what lies there, the peaks, and whether they fit."""

    def row(label: str, cells: list[str]) -> str:
        return f"  {label:<{label_width}}" + "".join(f"{cell:>11}" for cell in cells)

    lines = [row("GiB per GPU", [f"{h.gpus} x 80 GB" for h in holdings])]
    for role in ("actor", "reference", "critic"):
        models = [getattr(h.memory, role) for h in holdings]
        if all(model is not None for model in models):
            lines.append(row("student" if role == "actor" else role, [gb(m.resident + m.gradients) for m in models]))
    lines.append(row("sampler", [gb(h.memory.sampler_weights + h.memory.kv_cache) for h in holdings]))
    lines.append(row("peak", [f"{peak_gb(h.memory):.1f}" for h in holdings]))
    lines.append(row("fits", ["yes" if h.fits else "no" for h in holdings]))
    lines.append(row("host a node", [gb(h.memory.host_ram) for h in holdings]))
    return lines


def advice_text(advice: Advice, where: str) -> str:
    words = " ".join(advice.overrides)
    if advice.fits:
        return f"{where}: fits with {words} ({advice.peak_gb:.0f} GiB)"
    return f"{where}: too small" + (f" even with {words} ({advice.peak_gb:.0f} GiB)" if words else "")


def too_large(
    cfg: GadConfig, placement: Placement, memory: MemoryEstimate, free_gb: Mapping[str, float]
) -> Iterator[str]:
    """What does not fit this machine, each with what would make it fit."""
    peak = peak_gb(memory)
    if "device" in free_gb and peak > HEADROOM * free_gb["device"]:
        limit = HEADROOM * free_gb["device"]
        text = f"needs {peak:.0f} GiB per GPU, which has {free_gb['device']:.0f}"
        yield f"{text}: {_way_out(cfg, placement, limit)}"
    if "ram" in free_gb and memory.host_ram / GIB > free_gb["ram"]:
        text = f"needs {memory.host_ram / GIB:.1f} GiB of host memory, {free_gb['ram']:.1f} are free"
        if placement.device == "cpu":
            local = placement.local_size or placement.world_size
            text += f": {_way_out(cfg, placement, free_gb['ram'] / local)}"
        yield text


def _way_out(cfg: GadConfig, placement: Placement, limit_gb: float) -> str:
    found = []
    advice = advise(cfg, placement, limit_gb)
    if advice is not None and advice.fits:
        found.append(f"{' '.join(advice.overrides)} (then {advice.peak_gb:.1f})")
    if placement.device == "cuda" and (gpus := gpus_that_fit(cfg, placement, limit_gb)):
        found.append(f"{gpus} GPUs as it is")
    if found:
        return " or ".join(found)
    tried = f"; least with {' '.join(advice.overrides)}: {advice.peak_gb:.1f}" if advice and advice.overrides else ""
    return f"no setting makes it fit{tried}"
