"""Which sampler `rollout.engine` means."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gadcli.config.model_refusals import check_context
from gadcli.config.schema import RolloutConfig
from gadcli.distributed.fsdp import resolve_dtype
from gadcli.distributed.world import World
from gadcli.errors import ConfigError
from gadcli.rollout.sampler import Sampler


def build_sampler(
    cfg: RolloutConfig,
    model_path: str,
    world: World,
    *,
    eos_ids: list[int],
    dtype: str,
    seed: int,
    weights: bool = True,
) -> Sampler:
    """The sampler that `rollout.engine` asks for; `auto` takes vLLM where it is installed.

    `model_path` is a Hugging Face folder. Raises ConfigError for what the engine or the model cannot do. Without
    `weights` vLLM does not read its weights: `load` must come first.
    """
    check_context(model_path, Path(model_path), cfg.max_model_len)
    engine = cfg.engine
    if engine == "auto":
        engine = "vllm" if importlib.util.find_spec("vllm") else "hf"
    compute = resolve_dtype(dtype, world.device)
    if engine == "vllm":
        if not importlib.util.find_spec("vllm"):
            raise ConfigError(
                "rollout.engine is vllm, which is not installed",
                "pip install '.[cpu]' (or '.[gpu]') in a checkout of gad, or rollout.engine=hf",
            )
        from gadcli.rollout.vllm_sampler import VllmSampler

        return VllmSampler(cfg, model_path, world, eos_ids, compute, seed, weights=weights)
    if cfg.tensor_parallel_size > 1:
        raise ConfigError(
            f"rollout.tensor_parallel_size is {cfg.tensor_parallel_size}, which needs vLLM, and that is not installed",
            "pip install '.[cpu]' (or '.[gpu]') in a checkout of gad, or rollout.tensor_parallel_size=1",
        )
    if cfg.sleep:
        raise ConfigError("rollout.sleep is vLLM's, and this run samples with transformers", "rollout.sleep=false")
    from gadcli.rollout.hf_sampler import HfSampler

    return HfSampler(cfg, model_path, world, eos_ids, compute)
