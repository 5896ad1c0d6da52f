"""Rollouts with transformers' generate, on a full copy of the model: slower than vLLM, and runs wherever torch does."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
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
from gadcli.rollout.sync_proof import assert_equal
from gadcli.rollout.weight_sync import ActorWeights, changing_names, full_tensors


class SeededDraw(LogitsProcessor):
    """Turns greedy decoding into sampling whose draws depend on each prompt's own seed, not on its batch.

    The largest of logits / temperature + Gumbel noise is a sample of their softmax (the Gumbel-max trick); without
    noise (temperature 0) it is the greedy token. `logps` keeps, for each step, the log-probs [B] of what was drawn,
    under the distribution it was drawn from: tempered, and cut by top_k and top_p.
    """

    def __init__(self, sampling: Sampling, seeds: list[int], device: torch.device) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self.temperature = sampling.temperature or 1.0
        greedy = sampling.temperature == 0
        top_k = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k > 0 and not greedy else []
        top_p = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 and not greedy else []
        self.warpers = LogitsProcessorList([*top_k, *top_p])
        self.logps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        WATCHDOG.beat()  # a rollout is one call that may take long: each token is progress
        logits_BV = self.warpers(input_ids, scores.float() / self.temperature)
        noised_BV = logits_BV - self._exponential(logits_BV).log() if self.sampling.temperature else logits_BV
        drawn_B1 = noised_BV.argmax(-1, keepdim=True)  # what `generate` takes, too
        self.logps.append((logits_BV.gather(1, drawn_B1) - logits_BV.logsumexp(-1, keepdim=True))[:, 0])
        return noised_BV

    def _exponential(self, logits_BV: torch.Tensor) -> torch.Tensor:
        shape = (self.sampling.n, logits_BV.shape[1])
        draws = [torch.empty(shape, device=logits_BV.device).exponential_(generator=g) for g in self.generators]
        return torch.cat(draws)


class HfSampler(Sampler):
    """Generates in left-padded batches of at most `rollout.max_num_seqs` sequences."""

    name = "hf"

    def __init__(
        self, cfg: RolloutConfig, model_path: str, world: World, eos_ids: list[int], dtype: torch.dtype
    ) -> None:
        self.cfg, self.world, self.eos_ids = cfg, world, eos_ids
        # The folder's generation_config.json (penalties, warpers, ends of its own) must not reach a rollout: answers
        # are draws of softmax(logits / T), or their log-probs would be another distribution's.
        self.model = AutoModelForCausalLM.from_pretrained(
            model_path,
            dtype=dtype,
            attn_implementation="sdpa",
            generation_config=GenerationConfig(),
            trust_remote_code=False,
        )
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
        assert_equal(ActorWeights(model), sorted(wanted), own)
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
        draw = SeededDraw(sampling, seeds, self.world.device)
        rows = [i for i in range(len(prompts)) for _ in range(sampling.n)]
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=sampling.max_tokens, eos_token_id=self.eos_ids, pad_token_id=self.eos_ids[0]
        )
        out_BL = self.model.generate(
            ids[rows].to(self.world.device),
            attention_mask=mask[rows].to(self.world.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([draw]),
        )
        drawn = out_BL[:, longest:].cpu()
        logp_BT = torch.stack(draw.logps, dim=1).cpu()
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
