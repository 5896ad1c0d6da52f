"""Whether a loaded model computes in our packed layout what it computes by itself: asked of it, not assumed.

A list of known families would go stale; a model that scales its logits, caps its scores or mixes tokens by other means
than attention would train wrongly in silence. So every loaded model is asked with two short answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gadcli.errors import ConfigError
from gadcli.model.attention import SHARED
from gadcli.model.packing import Group, Layout, lay_out, lay_out_padded, unshared

TOLERANCE = 2e-3  # float32 rounding of a deep model is below 1e-4; a wrong mask or head is off by 1e-1 and more


def choose_layout(model: Any, path: str, attention: str) -> None:
    """Sets `model.gad_shares` and `model.gad_note` (what a user should know of it, or "").

    Raises ConfigError where neither layout agrees with the model's own forward pass, or that is not finite.
    """
    model.gad_shares, model.gad_note = True, ""
    groups = _question(model.config.vocab_size)
    ours = _difference(model, lay_out(groups), groups, attention)
    if ours <= TOLERANCE:
        return
    model.gad_shares = False
    capped = getattr(model.config, "attn_logit_softcapping", None)  # which the fused kernels would leave out
    own = "sdpa" if attention == SHARED and model._supports_sdpa and not capped else "eager"
    model.set_attn_implementation(own)
    padded = _difference(model, lay_out_padded(groups), groups, own)
    if math.isnan(padded):
        raise ConfigError(f"{path}: its outputs are not finite: weights are NaN or infinite", "take another checkpoint")
    if not padded <= TOLERANCE:
        raise ConfigError(
            f"{path}: a model of type {model.config.model_type} is not computed as it computes itself "
            f"(outputs differ by {padded:.2g}): its head is more than one matrix",
            "use a model whose logits are hidden states times one matrix (Llama, Qwen, Mistral, Gemma, …)",
        )
    model.gad_note = (
        f"{path}: the attention of a model of type {model.config.model_type} cannot share a prompt among its answers "
        f"(outputs would differ by {ours:.2g}): every answer is forwarded in a padded row with its own prompt, "
        "slower and with more memory"
    )


def _question(vocabulary: int) -> list[Group]:
    """Two prompts, one with two answers: packing, sharing and restarted positions all show."""
    ids = [(7 * i * i + 3 * i + 5) % vocabulary for i in range(17)]
    return [Group(ids[:5], [ids[5:8], ids[8:10]]), Group(ids[10:14], [ids[14:17]])]


@torch.no_grad()
def _difference(model: Any, layout: Layout, groups: list[Group], attention: str) -> float:
    """Largest difference between our pass over `layout` and the model's own over each answer alone."""
    was_training = model.training
    model.eval()
    try:
        ours = _ours(model, layout)
        with _attention(model, "eager", attention):
            own = torch.cat([_own(model, group) for group in unshared(groups)])
    except (TypeError, RuntimeError, ValueError):  # it cannot run the layout at all
        return float("inf")
    finally:
        model.train(was_training)
    return float((ours - own).abs().max())


@contextmanager
def _attention(model: Any, name: str, usual: str) -> Iterator[None]:
    """The plainest attention, which every family has and which leaves nothing out, for the model's own answer."""
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _ours(model: Any, layout: Layout) -> Tensor:
    if hasattr(model, "answer_logprobs"):
        return model.answer_logprobs(layout, 1.0)[0]
    return model.answer_values(layout)


def _own(model: Any, row: Group) -> Tensor:
    ids = torch.tensor([row.prompt_ids + row.answers[0]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    answer = slice(len(row.prompt_ids), None)
    if not hasattr(model, "answer_logprobs"):
        return logits[answer, 0]
    return torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[answer.start - 1 :, 0]
