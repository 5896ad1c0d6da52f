"""Rollouts through vLLM, living in the training process; see docs on weight sync for what each trap was."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gadcli.config.schema import RolloutConfig
from gadcli.engine.dist import World
from gadcli.engine.rollout import Sampler, Sampling
from gadcli.engine.rows import Answer
from gadcli.engine.sync import full_tensors
from gadcli.engine.watchdog import WATCHDOG
from gadcli.errors import ConfigError, SyncError

_CHANGED_BY_LLM = ("LOCAL_WORLD_SIZE", "LD_PRELOAD", "NUMEXPR_MAX_THREADS")


class VllmSampler(Sampler):
    """One vLLM engine a rank, without a server: `load` overwrites its weights in place."""

    name = "vllm"

    def __init__(
        self, cfg: RolloutConfig, model_path: str, world: World, eos_ids: list[int], dtype: torch.dtype, seed: int
    ) -> None:
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise ConfigError(
                "VLLM_ENABLE_V1_MULTIPROCESSING must be 0 before vLLM is imported",
                "start training with `gad train`, which sets it",
            )
        logging.getLogger("vllm").addHandler(logging.NullHandler())
        with _unchanged_process_state():
            from vllm import LLM

            self.llm: Any = LLM(**_engine_arguments(cfg, model_path, world, dtype, seed))
        self.eos_ids = eos_ids
        self._beat_at_each_step()

    def _beat_at_each_step(self) -> None:
        """A rollout is one call that may take long: each of the engine's own steps is progress."""
        engine = self.llm.llm_engine
        step = engine.step

        def step_and_beat() -> Any:
            WATCHDOG.beat()
            return step()

        engine.step = step_and_beat

    def load(self, model: nn.Module) -> None:
        sent: set[str] = set()

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in full_tensors(model):
                sent.add(name)
                yield name, tensor

        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream()})
        missing = {name for name, _ in model.named_parameters() if ".lora_" not in name}
        missing = {name.replace(".base_layer.", ".") for name in missing} - sent
        if missing:  # vLLM itself only warns
            raise SyncError(f"weights that were not sent to the sampler: {sorted(missing)[:5]}")
        if not self.llm.reset_prefix_cache():
            raise SyncError("the sampler's prefix cache could not be cleared: it would answer with old weights")

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[list[Answer]]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0 if sampling.top_k < 0 else sampling.top_k,
                max_tokens=sampling.max_tokens,
                seed=seed if sampling.temperature else None,
                stop_token_ids=self.eos_ids,
                logprobs=0,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [[_answer(completion) for completion in output.outputs] for output in outputs]

    def logprobs(self, ids: list[int]) -> list[float]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        return [at[token].logprob for token, at in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]

    def close(self) -> None:
        """Shut the engine down. It destroys the process group with it, so this comes last, after a barrier."""
        engine = getattr(self.llm, "llm_engine", None)
        core = getattr(engine, "engine_core", None)
        if core is not None:
            core.shutdown()
        del self.llm


def _engine_arguments(
    cfg: RolloutConfig, model_path: str, world: World, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": model_path,
        "dtype": str(dtype).removeprefix("torch."),
        "enforce_eager": cfg.enforce_eager,
        "max_model_len": cfg.max_model_len,
        "max_num_seqs": cfg.max_num_seqs,
        "tensor_parallel_size": cfg.tensor_parallel_size,
        "distributed_executor_backend": "external_launcher",
        "seed": seed,
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature: comparable with the trainer's
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
    }
    if world.device.type == "cpu":
        # A prompt prefilled in two parts makes vLLM rewind its request's generator, which CPU generators cannot do
        # ("CPU Generator does not use offset"): prefill whole prompts only.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(cfg.max_model_len, 4096)
    if world.device.type == "cpu" or cfg.kv_cache_gb:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(cfg, model_path, dtype)
    else:
        arguments["gpu_memory_utilization"] = cfg.gpu_memory_utilization
    return arguments


def kv_cache_bytes(cfg: RolloutConfig, model_path: str, dtype: torch.dtype) -> int:
    """`rollout.kv_cache_gb`, or room for max_num_seqs sequences of max_model_len, between 256 MiB and 1 GiB."""
    if cfg.kv_cache_gb:
        return int(cfg.kv_cache_gb * 2**30)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize
    wanted = token_bytes * cfg.max_model_len * cfg.max_num_seqs
    one_sequence = token_bytes * (cfg.max_model_len + 256)
    return max(one_sequence, min(max(wanted, 2**28), 2**30))


def _answer(completion: Any) -> Answer:
    ids = list(completion.token_ids)
    logps = [float(at[token].logprob) for token, at in zip(ids, completion.logprobs, strict=True)]
    return Answer(ids, logps, completion.finish_reason == "stop")


@contextmanager
def _unchanged_process_state() -> Iterator[None]:
    """LLM() changes the environment, reseeds torch's global generator and fixes the thread count: undo all three."""
    environment = {key: os.environ.get(key) for key in _CHANGED_BY_LLM}
    rng, threads, set_num_threads = torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_rng_state(rng)
        for key, value in environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
