"""Discriminator losses over (teacher, student) score pairs, and the R1 gradient penalty.

Legend: N pairs, T tokens, H embedding width. d is the gap a loss looks at: norm_t - norm_s (`original`: raw_t - raw_s).
Sources: `original` is the GAD paper's Bradley-Terry loss (arXiv 2511.10643); v1, v2, v2_raw and final are its
successors from field practice, each with a bound or regulariser that the one before lacked; R1 is arXiv 1801.04406.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .mean import Mean, mean_of
from .scores import d_acc

Numbers = Mapping[str, float]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Pairs:
    """Scores of N pairs: raw, and divided by the response length."""

    t_raw_N: Tensor
    t_norm_N: Tensor
    s_raw_N: Tensor
    s_norm_N: Tensor

    @property
    def raw_gap_N(self) -> Tensor:
        return self.t_raw_N - self.s_raw_N

    @property
    def norm_gap_N(self) -> Tensor:
        return self.t_norm_N - self.s_norm_N


def discriminator_loss(
    name: str,
    t_raw_N: Tensor,
    t_norm_N: Tensor,
    s_raw_N: Tensor,
    s_norm_N: Tensor,
    numbers: Numbers | None = None,
    *,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
    pairs: float | None = None,
) -> tuple[Tensor, dict[str, Mean]]:
    """(loss, metrics): the sum over these pairs divided by `pairs`, the pairs of the whole optimiser step.

    name        loss of a pair, with rank(x) = -log sigmoid(x) and x = clamp(d / temperature, +-clamp)
    original    rank(raw_t - raw_s); takes no numbers
    v1          relu(margin - d) + ranking_weight rank(x)
    v2          v1 + relu(d - max_margin)
    v2_raw      v1 + relu(raw_t - raw_s - max_margin) + score_reg (raw_t^2 + raw_s^2)
    final       ranking_weight rank(x) + score_reg (raw_t^2 + raw_s^2) + penalty_weight relu(d - penalty_threshold)^2

    `numbers` are the fields of that loss's config section, all of them and no other (KeyError, ValueError).
    `label_smoothing` e in [0, .5]: rank becomes (1-e) rank(x) + e rank(-x), whose minimum is at a finite gap.
    `centring` adds centring (raw_t + raw_s)^2, which leaves the gap free and holds the pair around 0.
    Gradients flow to both sides. No pairs give 0 with a graph, so an empty rank can still run backward.

    Metrics (`critic/...`), means over pairs: ranking_loss and hinges before their weight (ln 2 = .693 = cannot tell
    apart, whatever the weight), score_reg, diff_penalty and centring as they enter d_loss; score_diff (the d above),
    raw_score_diff, value means (raw) and d_acc.
    """
    pair = Pairs(_wide(t_raw_N), _wide(t_norm_N), _wide(s_raw_N), _wide(s_norm_N))
    loss_N, terms = pair_losses(name, pair, numbers, label_smoothing=label_smoothing, centring=centring)
    gap_N = pair.raw_gap_N if name == "original" else pair.norm_gap_N
    terms |= {
        "d_loss": loss_N,
        "score_diff": gap_N,
        "raw_score_diff": pair.raw_gap_N,
        "teacher_value_mean": pair.t_raw_N,
        "student_value_mean": pair.s_raw_N,
    }
    metrics = {f"critic/{term}": mean_of(x_N) for term, x_N in terms.items()}
    metrics["critic/d_acc"] = d_acc(pair.t_raw_N, pair.s_raw_N)
    # A global denominator: micro-batches and ranks of any size then add up to the loss of the whole step.
    return loss_N.sum() / (pairs if pairs is not None else max(loss_N.numel(), 1)), metrics


def pair_losses(
    name: str, pair: Pairs, numbers: Numbers | None, *, label_smoothing: float, centring: float
) -> tuple[Tensor, Terms]:
    """(loss [N], terms by metric name): what `discriminator_loss` sums, a pair at a time."""
    if name not in _LOSSES:
        raise ValueError(f"unknown discriminator loss {name!r}; known: {', '.join(_LOSSES)}")
    numbers = {} if numbers is None else numbers
    _check_numbers(name, numbers)
    loss_N, terms = _LOSSES[name](pair, numbers, label_smoothing)
    if centring:
        terms["centring"] = centring * (pair.t_raw_N + pair.s_raw_N).square()
        loss_N = loss_N + terms["centring"]
    return loss_N, terms


def gradient_penalty(
    t_raw_N: Tensor, embeds_NTH: Tensor, *, weight: float, rows: float | None = None
) -> tuple[Tensor, dict[str, Mean]]:
    """R1: weight / 2 · mean over teacher rows of |d raw / d input embeddings|² (sum over T and H).

    `embeds_NTH` must require grad and be what t_raw_N was computed from; the result can be backpropagated (double
    backward, so the critic's attention must support it: "eager" does). `rows`: teacher rows of the whole step.
    Source: Mescheder et al., arXiv 1801.04406, eq. 9, on the real (here: teacher's) data only.
    """
    (grad_NTH,) = torch.autograd.grad(t_raw_N.sum(), embeds_NTH, create_graph=True)
    norm2_N = grad_NTH.float().flatten(1).square().sum(-1)
    loss = 0.5 * weight * norm2_N.sum() / (rows if rows is not None else max(norm2_N.numel(), 1))
    return loss, {"critic/gradient_penalty": mean_of(norm2_N)}


def _wide(x: Tensor) -> Tensor:
    """At least float32: a gap of bfloat16 scores is mostly rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rank(x_N: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(x), smoothed; through softplus, which neither overflows nor loses its tail."""
    if label_smoothing == 0.0:
        return F.softplus(-x_N)
    return (1 - label_smoothing) * F.softplus(-x_N) + label_smoothing * F.softplus(x_N)


def _tempered_rank(pair: Pairs, numbers: Numbers, label_smoothing: float) -> Tensor:
    clamp = numbers["clamp"]
    return _rank((pair.norm_gap_N / numbers["temperature"]).clamp(-clamp, clamp), label_smoothing)


def _score_reg(pair: Pairs, numbers: Numbers) -> Tensor:
    return numbers["score_reg"] * (pair.t_raw_N.square() + pair.s_raw_N.square())


def _original(pair: Pairs, numbers: Numbers, label_smoothing: float) -> tuple[Tensor, Terms]:
    rank_N = _rank(pair.raw_gap_N, label_smoothing)
    return rank_N, {"ranking_loss": rank_N}


def _v1(pair: Pairs, numbers: Numbers, label_smoothing: float) -> tuple[Tensor, Terms]:
    hinge_N = F.relu(numbers["margin"] - pair.norm_gap_N)
    rank_N = _tempered_rank(pair, numbers, label_smoothing)
    return hinge_N + numbers["ranking_weight"] * rank_N, {"hinge_loss": hinge_N, "ranking_loss": rank_N}


def _bounded(pair: Pairs, bounded_gap_N: Tensor, numbers: Numbers, label_smoothing: float) -> tuple[Tensor, Terms]:
    """v1 with an upper hinge on `bounded_gap_N`."""
    loss_N, terms = _v1(pair, numbers, label_smoothing)
    upper_N = F.relu(bounded_gap_N - numbers["max_margin"])
    return loss_N + upper_N, {
        "hinge_loss_lower": terms["hinge_loss"],
        "hinge_loss_upper": upper_N,
        "ranking_loss": terms["ranking_loss"],
    }


def _v2(pair: Pairs, numbers: Numbers, label_smoothing: float) -> tuple[Tensor, Terms]:
    return _bounded(pair, pair.norm_gap_N, numbers, label_smoothing)


def _v2_raw(pair: Pairs, numbers: Numbers, label_smoothing: float) -> tuple[Tensor, Terms]:
    # Bounding the norm gap lets raw scores drift as far as the lengths allow (gaps of hundreds): bound those.
    loss_N, terms = _bounded(pair, pair.raw_gap_N, numbers, label_smoothing)
    reg_N = _score_reg(pair, numbers)
    return loss_N + reg_N, terms | {"score_reg": reg_N}


def _final(pair: Pairs, numbers: Numbers, label_smoothing: float) -> tuple[Tensor, Terms]:
    rank_N = _tempered_rank(pair, numbers, label_smoothing)
    reg_N = _score_reg(pair, numbers)
    penalty_N = numbers["penalty_weight"] * F.relu(pair.norm_gap_N - numbers["penalty_threshold"]).square()
    return numbers["ranking_weight"] * rank_N + reg_N + penalty_N, {
        "ranking_loss": rank_N,
        "score_reg": reg_N,
        "diff_penalty": penalty_N,
    }


_V1_NUMBERS = ("margin", "ranking_weight", "temperature", "clamp")
NUMBERS: dict[str, tuple[str, ...]] = {
    "original": (),
    "v1": _V1_NUMBERS,
    "v2": (*_V1_NUMBERS, "max_margin"),
    "v2_raw": (*_V1_NUMBERS, "max_margin", "score_reg"),
    "final": ("ranking_weight", "temperature", "clamp", "score_reg", "penalty_threshold", "penalty_weight"),
}
_LOSSES: dict[str, Callable[[Pairs, Numbers, float], tuple[Tensor, Terms]]] = {
    "original": _original,
    "v1": _v1,
    "v2": _v2,
    "v2_raw": _v2_raw,
    "final": _final,
}


def _check_numbers(name: str, numbers: Numbers) -> None:
    unused = set(numbers) - set(NUMBERS[name])
    if unused:
        raise ValueError(f"discriminator loss {name!r} has no number {', '.join(sorted(unused))}")
