"""The samplers behind one small interface: vLLM in this process, or transformers' generate where vLLM is missing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gadcli.config.schema import RolloutConfig
from gadcli.model.rollout_batch import Answer


@dataclass(frozen=True)
class Sampling:
    """How to sample: `n` answers per prompt of at most `max_tokens`, at `temperature` (0 is greedy).

    This alone shapes the distribution: a model folder's generation_config.json has no say.
    """

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int

    @staticmethod
    def of(cfg: RolloutConfig, max_tokens: int, *, n: int | None = None, temperature: float | None = None) -> Sampling:
        return Sampling(
            cfg.n if n is None else n,
            cfg.temperature if temperature is None else temperature,
            cfg.top_p,
            cfg.top_k,
            max_tokens,
        )


class Sampler(ABC):
    """Draws answers with the weights of the last `load`."""

    name: str
    unproved: Sequence[str] = ()  # weights of the last `load` that could not be compared with the model's

    @abstractmethod
    def load(self, model: nn.Module) -> None:
        """Take over the model's weights. Collective: all ranks call it together."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[list[Answer]]:
        """`sampling.n` answers for each prompt. `seeds[i]` alone decides prompt i's draws where the engine allows.

        An answer's log-probs are those of the distribution it was drawn from: logits / temperature, cut by top_k and
        top_p. It ends with any of the sampler's `eos_ids`, which is part of it.
        """

    @abstractmethod
    def logprobs(self, ids: list[int]) -> list[float]:
        """Log-prob of each token of `ids` but the first, at temperature 1."""

    def sleep(self) -> None:  # noqa: B027  samplers that hold no memory to give back have nothing to do
        """Sampling is over for this step: give memory back until the next call (rollout.sleep)."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the sampler holds. The process group may be gone afterwards."""


def request_seed(run_seed: int, step: int, row_id: int) -> int:
    """A prompt's own seed: a function of run, step and row, so resuming and batching change no draw."""
    mixed = (run_seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + row_id * 0x94D049BB133111EB) % 2**64
    mixed ^= mixed >> 31
    return (mixed * 0xD6E8FEB86659FD93 % 2**64) >> 33


def cut_at_eos(ids: list[int], eos_ids: list[int]) -> tuple[list[int], bool]:
    """Token ids up to and including the first EOS, and whether there was one."""
    for index, token in enumerate(ids):
        if token in eos_ids:
            return ids[: index + 1], True
    return ids, False


def gather_logprobs(logits_LV: torch.Tensor, ids: list[int]) -> list[float]:
    """Log-prob of ids[1:] given logits at each position (temperature 1)."""
    logsoft = torch.log_softmax(logits_LV[:-1].float(), dim=-1)
    targets = torch.tensor(ids[1:], device=logits_LV.device)
    return [float(x) for x in logsoft.gather(1, targets[:, None])[:, 0]]
