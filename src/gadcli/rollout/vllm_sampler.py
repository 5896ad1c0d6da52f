"""Rollouts through vLLM, living in the training process; see docs on weight sync for what each trap was."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gadcli.config.modelinfo import model_shape, read_model_config
from gadcli.config.schema import RolloutConfig
from gadcli.distributed.watchdog import WATCHDOG
from gadcli.distributed.world import World
from gadcli.errors import ConfigError, SyncError
from gadcli.model.rollout_batch import Answer
from gadcli.rollout.sampler import Sampler, Sampling
from gadcli.rollout.sync_proof import EngineProof, checkpoint_form
from gadcli.rollout.weight_sync import changing_names, full_tensors, weight_names, whole_layers

_CHANGED_BY_LLM = ("LOCAL_WORLD_SIZE", "LD_PRELOAD", "NUMEXPR_MAX_THREADS")


class VllmSampler(Sampler):
    """One vLLM engine a rank (or a team of ranks), without a server: `load` overwrites its weights in place."""

    name = "vllm"

    def __init__(
        self,
        cfg: RolloutConfig,
        model_path: str,
        world: World,
        eos_ids: list[int],
        dtype: torch.dtype,
        seed: int,
        *,
        weights: bool = True,
    ) -> None:
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise ConfigError(
                "VLLM_ENABLE_V1_MULTIPROCESSING must be 0 before vLLM is imported",
                "start training with `gad train`, which sets it",
            )
        if cfg.sleep and world.device.type != "cuda":
            raise ConfigError("rollout.sleep gives GPU memory back, and this run has no GPU", "rollout.sleep=false")
        logging.getLogger("vllm").addHandler(logging.NullHandler())
        with _unchanged_process_state(), _unchanged_model_class(model_path):
            from vllm import LLM

            if cfg.tensor_parallel_size > 1 and world.device.type == "cpu":
                _own_shared_memory()
            arguments = _engine_arguments(cfg, model_path, world, dtype, seed)
            try:
                self.llm: Any = LLM(**arguments, load_format="auto" if weights else "dummy")
            except (ValueError, NotImplementedError) as error:
                if "memory" in str(error):  # the worker says which settings help
                    raise
                said = " ".join(str(error).split())[:200]
                raise ConfigError(f"{model_path}: vLLM cannot run it: {said}", "rollout.engine=hf") from error
        self.eos_ids, self.dtype = eos_ids, dtype
        (engine,) = self.llm.apply_model(lambda model: model)
        self._proof = EngineProof(engine)
        self._tp = _tp_group(cfg.tensor_parallel_size, world)
        self._may_sleep, self._asleep = cfg.sleep, False
        self._held: Any = None  # whose weights we have: of that model we load what training moves
        self._beat_at_each_step()

    def _beat_at_each_step(self) -> None:
        """A rollout is one call that may take long: each of the engine's own steps is progress."""
        engine = self.llm.llm_engine
        step = engine.step

        def step_and_beat() -> Any:
            WATCHDOG.beat()
            return step()

        engine.step = step_and_beat

    def sleep(self) -> None:
        if self._may_sleep and not self._asleep:
            self.llm.sleep(level=1)  # level 2 would lose weights that a critic-only step does not send again
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def load(self, model: Any) -> None:
        """Take over the weights that may differ from those we hold; SyncError if we then hold others (`sync_proof`)."""
        self._wake()
        # Where the engine has no head of its own (Gemma), a tied one is its embedding, and vLLM refuses the name.
        headless = getattr(model.config, "tie_word_embeddings", False) and not self._proof.place("lm_head.weight")
        names = [name for name in weight_names(model) if not (headless and name == "lm_head.weight")]
        wanted = set(names)
        if self._held is model:
            wanted = whole_layers(names, changing_names(model), self._proof.packed)
        self._held = None  # until this has gone well
        with self._proof.around_load(model, [name for name in names if name in wanted], self.dtype):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._pieces(model, wanted)})
        self.unproved = self._proof.unknown
        if not self.llm.reset_prefix_cache():
            raise SyncError("the sampler's prefix cache could not be cleared: it would answer with old weights")
        self._held = model

    def _pieces(self, model: nn.Module, wanted: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """What vLLM loads: each weight in the engine's dtype, joined experts one by one as in a checkpoint's files."""
        for name, tensor in full_tensors(model, wanted, self.dtype):
            yield from ({name: tensor} if self._proof.place(name) else checkpoint_form(model, name, tensor)).items()

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[list[Answer]]:
        if self._tp is None:
            return self._generate(prompts, sampling, seeds)
        # Ranks that share an engine must ask it for the same, in the same order; each keeps its own answers.
        asked: list[Any] = [None] * dist.get_world_size(self._tp)
        dist.all_gather_object(asked, (prompts, seeds), group=self._tp)
        answers = self._generate([p for ps, _ in asked for p in ps], sampling, [s for _, ss in asked for s in ss])
        first = sum(len(ps) for ps, _ in asked[: dist.get_rank(self._tp)])
        return answers[first : first + len(prompts)]

    def _generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[list[Answer]]:
        from vllm import SamplingParams

        self._wake()
        params = [
            SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0 if sampling.top_k < 0 else sampling.top_k,
                max_tokens=sampling.max_tokens,
                seed=seed if sampling.temperature else None,
                stop_token_ids=self.eos_ids,
                ignore_eos=True,  # vLLM would add the ids of generation_config.json: ours are the only ends
                logprobs=0,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [[_answer(completion) for completion in output.outputs] for output in outputs]

    def logprobs(self, ids: list[int]) -> list[float]:
        from vllm import SamplingParams

        self._wake()
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


def _tp_group(size: int, world: World) -> Any:
    """The process group of the ranks that share this rank's engine, as vLLM pairs them: `size` consecutive ones."""
    if size == 1:
        return None
    teams = [list(range(first, first + size)) for first in range(0, world.size, size)]
    groups = [dist.new_group(team, backend="gloo") for team in teams]  # every rank makes every group
    return groups[world.rank // size]


def _own_shared_memory() -> None:
    """vLLM's CPU build names a team's shared memory by its ranks alone. What a killed run left, or another run of this
    machine has, would be met ("create shm in SHMManager failed. errno: 17"): the names get a word of this run's."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    word = [uuid.uuid4().hex[:12]]
    dist.broadcast_object_list(word, src=0)
    plain = _CPUSHMDistributed.make_group_name
    _CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: f"{plain(communicator)}-{word[0]}")


def _engine_arguments(
    cfg: RolloutConfig, model_path: str, world: World, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": model_path,
        "dtype": str(dtype).removeprefix("torch."),
        "enforce_eager": cfg.enforce_eager or world.device.type == "cpu",
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
        "enable_sleep_mode": cfg.sleep,
    }
    if world.device.type == "cpu":
        # A prompt prefilled in two parts makes vLLM rewind its request's generator, which CPU generators cannot do
        # ("CPU Generator does not use offset"): prefill whole prompts only.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(cfg.max_model_len, 4096)
    if world.device.type == "cpu" or cfg.kv_cache_gb:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(cfg, model_path, dtype)
    if world.device.type == "cuda":
        # With the bytes given, the share only says what must be free at start-up; vLLM's default of .92 is not, beside
        # the models that train.
        arguments["gpu_memory_utilization"] = 0.01 if cfg.kv_cache_gb else cfg.gpu_memory_utilization
    return arguments


def kv_cache_bytes(cfg: RolloutConfig, model_path: str, dtype: torch.dtype) -> int:
    """`rollout.kv_cache_gb`, or room for max_num_seqs sequences of max_model_len, between 256 MiB and 1 GiB."""
    if cfg.kv_cache_gb:
        return int(cfg.kv_cache_gb * 2**30)
    shape = model_shape(read_model_config(model_path) or {})
    token_bytes = shape.kv_bytes_per_token(dtype.itemsize) // min(cfg.tensor_parallel_size, shape.kv_heads)
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


@contextmanager
def _unchanged_model_class(model_path: str) -> Iterator[None]:
    """For families that vLLM runs by transformers' modules (OLMo 2, SmolLM3, StarCoder2, …) it decorates their class in
    place. Models of ours made later must not ask for vLLM's config, and those made before must not be compiled by it;
    the engine's own instance keeps its settings."""
    from transformers import MODEL_MAPPING, AutoConfig

    kind: Any = MODEL_MAPPING.get(type(AutoConfig.from_pretrained(model_path, trust_remote_code=False)), None)
    plain = getattr(kind, "__init__", None)
    yield
    if plain is not None and kind.__init__ is not plain:
        kind.__init__ = plain
        kind.do_not_compile = True
