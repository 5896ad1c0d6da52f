"""Our parts for benchmarks, built as a run builds them: actor, reference, critic; and text of given lengths."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import tarfile
import time
import typing
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from gadcli.config.schema import ActorConfig, CriticConfig, FsdpConfig, ModelConfig, OptimConfig
from gadcli.data.batches import TokenizedRow
from gadcli.distributed.fsdp import shard
from gadcli.distributed.world import World, init_world
from gadcli.model.actor import Actor, Reference
from gadcli.model.critic import Critic
from gadcli.model.loading import load_actor, load_critic
from gadcli.model.optim import Optimizer
from gadcli.model.rollout_batch import Answer, Rollout

TEMPERATURE = 1.0
BUDGET = 4096  # tokens a micro-batch
OPTIM = OptimConfig(lr=1e-6)


def world() -> World:
    torch.set_num_threads(1)
    return init_world("cpu", FsdpConfig())


def actor(at: World, path: str, budget: int, **settings: Any) -> Actor:
    cfg = ActorConfig(optim=OPTIM, micro_batch_tokens=budget, **settings)
    model = shard(load_actor(path, cfg.model), at, FsdpConfig(), "float32")
    return Actor(model, Optimizer(model, cfg.optim, cfg.grad_clip, 100), cfg, at, TEMPERATURE, 64)


def reference(at: World, path: str) -> Reference:
    return Reference(
        shard(load_actor(path, ModelConfig(), trainable=False), at, FsdpConfig(), "float32"), adapters=False
    )


def critic(at: World, path: str, budget: int) -> Critic:
    cfg = CriticConfig(optim=OPTIM, micro_batch_tokens=budget)
    model = shard(load_critic(path, cfg.model, 1).model, at, FsdpConfig(), "float32")
    return Critic(model, Optimizer(model, cfg.optim, cfg.grad_clip, 100), cfg, at)


def texts(tokenizer: Any, lengths: list[int]) -> list[str]:
    """Pieces of Python's own library (its sources: every machine has them) of about these many tokens each."""
    corpus = "".join(inspect.getsource(module) for module in (argparse, subprocess, inspect, typing, tarfile))
    ids = tokenizer(corpus[: 8 * sum(lengths)], add_special_tokens=False).input_ids
    assert len(ids) >= sum(lengths), f"{len(ids)} tokens of text for {sum(lengths)}"
    found, at = [], 0
    for length in lengths:
        found.append(tokenizer.decode(ids[at : at + length]))
        at += length
    return found


def tokenizer_of(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


def drawn(prompts: int, group: int, prompt: int, response: int, vocabulary: int, seed: int = 0) -> Rollout:
    """A rollout of random tokens, every prompt and answer of the same length."""
    draw = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (n,), generator=draw).tolist()

    rows = [TokenizedRow(i, ids(prompt), ids(response), [], "") for i in range(prompts)]
    answers = [[Answer(ids(response), [-1.0] * response, True) for _ in range(group)] for _ in range(prompts)]
    return Rollout(rows, answers)


def cpu(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """(CPU seconds of this process, the result)."""
    start = time.process_time()
    result = work(*arguments, **options)
    return time.process_time() - start, result


class InModels:
    """CPU seconds spent in models: forward passes, backward passes and optimisers of actors and critics."""

    def __init__(self, *parts: Actor | Critic) -> None:
        self.seconds = 0.0
        self._wrap(torch.Tensor, "backward")
        for part in parts:
            self._wrap(part.optimizer, "step")
            for name in ("answer_logprobs", "answer_values"):
                if hasattr(part.model, name):
                    self._wrap(part.model, name)

    def _wrap(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            spent, result = cpu(real, *arguments, **options)
            self.seconds += spent
            return result

        setattr(owner, name, timed)


def qwen_like(folder: str) -> str:
    """A Qwen2 of the demo student's width and depth with Qwen's vocabulary of 151,936, weights drawn at random."""
    config = Qwen2Config(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=151_936, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def gemm_gflops(tokens: int, hidden: int, wide: int) -> float:
    """What this machine's matrix product reaches now, at the shape of a layer's largest one."""
    a, b = torch.randn(tokens, hidden), torch.randn(wide, hidden)
    best = min(cpu(lambda: [a @ b.T for _ in range(8)])[0] for _ in range(3))
    return 8 * 2 * tokens * hidden * wide / best / 1e9
