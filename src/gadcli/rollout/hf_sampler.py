"""Rollouts through transformers' generate, on a whole copy of the model: slower, and runs wherever torch does."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gadcli.config.schema import RolloutConfig
from gadcli.distributed.watchdog import WATCHDOG
from gadcli.distributed.world import World
from gadcli.model.rollout_batch import Answer
from gadcli.rollout.sampler import Sampler, Sampling, cut_at_eos, gather_logprobs
from gadcli.rollout.weight_sync import changing_names, full_tensors


class SeededDraw(LogitsProcessor):
    """Turns greedy decoding into sampling whose draws depend on each prompt's own seed, not on its batch.

    The largest of logits / temperature + Gumbel noise is a sample of their softmax (the Gumbel-max trick).
    """

    def __init__(self, sampling: Sampling, seeds: list[int], device: torch.device) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        top_k = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k > 0 else []
        top_p = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        self.warpers = LogitsProcessorList([*top_k, *top_p])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits_BV = self.warpers(input_ids, scores.float() / self.sampling.temperature)
        shape = (self.sampling.n, logits_BV.shape[1])
        exponential = torch.cat(
            [
                torch.empty(shape, device=logits_BV.device).exponential_(generator=generator)
                for generator in self.generators
            ]
        )
        return logits_BV - exponential.log()


class Heartbeat(LogitsProcessor):
    """Changes nothing; tells the watchdog that another token was drawn."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        WATCHDOG.beat()
        return scores


class HfSampler(Sampler):
    """Generates in left-padded batches of at most `rollout.max_num_seqs` sequences."""

    name = "hf"

    def __init__(
        self, cfg: RolloutConfig, model_path: str, world: World, eos_ids: list[int], dtype: torch.dtype
    ) -> None:
        self.cfg, self.world, self.eos_ids = cfg, world, eos_ids
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="sdpa")
        self.model.to(world.device).eval()
        self._held: nn.Module | None = None  # whose weights we have

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        own = self.model.state_dict()
        wanted = changing_names(model) if self._held is model else set(own)
        missing = set(wanted)
        for name, tensor in full_tensors(model, wanted):
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise AssertionError(f"weights that the actor did not send: {sorted(missing)[:5]}")
        self._held = model

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[list[Answer]]:
        at_once = max(1, self.cfg.max_num_seqs // sampling.n)
        answers: list[list[Answer]] = []
        for start in range(0, len(prompts), at_once):
            part = slice(start, start + at_once)
            answers.extend(self._generate_batch(prompts[part], sampling, seeds[part]))
        return answers

    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[list[Answer]]:
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        greedy = sampling.temperature == 0
        draws = [] if greedy else [SeededDraw(sampling, seeds, self.world.device)]
        rows = [i for i in range(len(prompts)) for _ in range(sampling.n)]
        out = self.model.generate(
            ids[rows].to(self.world.device),
            attention_mask=mask[rows].to(self.world.device),
            do_sample=False,
            logits_processor=LogitsProcessorList([Heartbeat(), *draws]),
            max_new_tokens=sampling.max_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.eos_ids[0],
            output_logits=True,
            return_dict_in_generate=True,
            use_cache=True,
        )
        drawn = out.sequences[:, longest:].cpu()
        temperature = 1.0 if greedy else sampling.temperature
        logits_BTV = torch.stack(out.logits, dim=1)
        logp_BT = torch.stack(
            [
                torch.log_softmax(row.float() / temperature, -1).gather(1, tokens.to(row.device)[:, None])[:, 0]
                for row, tokens in zip(logits_BTV, drawn, strict=True)
            ]
        ).cpu()
        flat = []
        for tokens, logp in zip(drawn.tolist(), logp_BT.tolist(), strict=True):
            kept, finished = cut_at_eos(tokens, self.eos_ids)
            flat.append(Answer(kept, logp[: len(kept)], finished))
        return [flat[i : i + sampling.n] for i in range(0, len(flat), sampling.n)]

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> list[float]:
        logits = self.model(torch.tensor([ids], device=self.world.device), use_cache=False).logits[0]
        return gather_logprobs(logits, ids)

    def close(self) -> None:
        del self.model
