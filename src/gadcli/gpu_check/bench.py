"""What the checks work on: a model of random weights in a shape of its own, rollouts of random tokens, a clock."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from gadcli.config.schema import ActorConfig, CriticConfig, FsdpConfig, LoraConfig, ModelConfig, OptimConfig
from gadcli.data.batches import TokenizedRow
from gadcli.distributed.fsdp import shard
from gadcli.distributed.world import World, init_world
from gadcli.model.actor import Actor
from gadcli.model.critic import Critic
from gadcli.model.loading import load_actor, load_critic
from gadcli.model.optim import Optimizer
from gadcli.model.rollout_batch import Answer, Rollout

SHAPES: dict[str, dict[str, int]] = {
    "toy": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
    },
    "0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was seen, what was wanted, and whether that holds (None: for information)."""

    check: str
    what: str
    seen: str
    wanted: str = ""
    holds: bool | None = None


def at_most(check: str, what: str, seen: float, limit: float | None) -> Finding:
    """A figure, and whether it stays within `limit` (None: for information)."""
    wanted = "" if limit is None else f"≤ {limit:.3g}"
    return Finding(check, what, f"{seen:.3g}", wanted, None if limit is None else seen <= limit)


def at_least(check: str, what: str, seen: float, limit: float | None) -> Finding:
    wanted = "" if limit is None else f"≥ {limit:,.10g}"
    return Finding(check, what, f"{seen:,.3f}", wanted, None if limit is None else seen >= limit)


@dataclass(frozen=True)
class Bench:
    """A device, a shape, and a step's batch: `prompts` of `prompt` tokens, `answers` of `answer` tokens to each."""

    size: str
    world: World
    folder: str
    prompts: int
    answers: int
    prompt: int
    answer: int
    budget: int
    rate: dict[str, float] = field(default_factory=dict)  # of bf16 products, once measured

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def shape(self) -> dict[str, Any]:
        return {**SHAPES[self.size], "model_type": "qwen3", "tie_word_embeddings": False}

    def ids(self, count: int, seed: int) -> list[int]:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(2, SHAPES[self.size]["vocab_size"] - 1, (count,), generator=draw).tolist()

    def rollout(self, seed: int = 0, *, ragged: bool = True) -> Rollout:
        """Prompts and answers of at most their lengths, of half at least where ragged."""
        draw = torch.Generator().manual_seed(seed)

        def some(longest: int, own: int) -> list[int]:
            share = 0.5 + 0.5 * float(torch.rand((), generator=draw)) if ragged else 1.0
            return self.ids(max(1, int(longest * share)), own)

        rows = [
            TokenizedRow(i, some(self.prompt, seed + i), some(self.answer, seed + 100 + i), [], "")
            for i in range(self.prompts)
        ]
        drawn = [[some(self.answer, seed + 1000 * i + g) for g in range(self.answers)] for i in range(self.prompts)]
        return Rollout(rows, [[Answer(ids, [-1.0] * len(ids), True) for ids in group] for group in drawn])

    def actor(self, dtype: str = "auto", *, checkpointing: bool = False, lora: int = 0, lr: float = 1e-5) -> Actor:
        model_cfg = ModelConfig(dtype=dtype, gradient_checkpointing=checkpointing, lora=LoraConfig(rank=lora))
        cfg = ActorConfig(model=model_cfg, micro_batch_tokens=self.budget, optim=OptimConfig(lr=lr))
        model = shard(load_actor(self.folder, model_cfg), self.world, FsdpConfig(), dtype)
        return Actor(model, Optimizer(model, cfg.optim, cfg.grad_clip, 100), cfg, self.world, 1.0, self.answer)

    def critic(self) -> Critic:
        cfg = CriticConfig(micro_batch_tokens=self.budget)
        model = shard(load_critic(self.folder, cfg.model, 5).model, self.world, FsdpConfig(), "auto")
        return Critic(model, Optimizer(model, cfg.optim, cfg.grad_clip, 100), cfg, self.world)

    def milliseconds(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """The fastest of some runs, the device waited for, after one that compiles and allocates."""
        times = []
        for _ in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return 1e3 * min(times[1:])

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak_over(self, work: Callable[[], Any]) -> float | None:
        """Bytes of the device that `work` took at most beyond what was taken before; None on CPUs."""
        if not self.on_gpu:
            work()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return float(torch.cuda.max_memory_allocated() - before)


@contextmanager
def make_bench(device: str) -> Iterator[Bench]:
    """A 0.6B shape on a GPU, a toy on a CPU, its random weights in a temporary folder."""
    world = init_world(device, FsdpConfig())
    on_gpu = world.device.type == "cuda"
    size = "0.6b" if on_gpu else "toy"
    with tempfile.TemporaryDirectory(prefix="gad-doctor-") as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**SHAPES[size], tie_word_embeddings=False),
            dtype=torch.bfloat16 if on_gpu else torch.float32,
        )
        model.save_pretrained(Path(folder))
        del model
        lengths = (8, 8, 512, 256, 16384) if on_gpu else (2, 3, 12, 7, 64)
        yield Bench(size, world, folder, *lengths)
