"""The loss lab: what a discriminator loss asks of scores: value, gradient size, and the gap at which it rests.

Everything is read off the training code (`discriminator.pair_losses`, in float64), nothing is a second formula.
Legend: N pairs, Q quadrature nodes. Scores are raw unless said otherwise; norm = raw / response length (tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .discriminator import Pairs, pair_losses
from .scores import wins

BOX = 8.0  # half-width of the first search box, in raw scores; grows eightfold
WIDEST_BOX = 1e6
GRID, ZOOMS, ROUGH_ZOOMS = 17, 14, 3
RIDGE = 1e-15  # of many equal minima take the smallest: the one reached from scores of 0
NODES = 7


@dataclass(frozen=True)
class LossSpec:
    """One discriminator loss with its numbers and options."""

    name: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    label_smoothing: float = 0.0
    centring: float = 0.0

    def __call__(self, t_raw: Tensor, s_raw: Tensor, t_len: Tensor | float, s_len: Tensor | float) -> Tensor:
        """The loss of each pair."""
        return self.terms(t_raw, s_raw, t_len, s_len)["loss"]

    def terms(self, t_raw: Tensor, s_raw: Tensor, t_len: Tensor | float, s_len: Tensor | float) -> dict[str, Tensor]:
        """The loss of each pair and its terms, as training reports them."""
        pair = Pairs(t_raw, t_raw / t_len, s_raw, s_raw / s_len)
        loss, terms = pair_losses(
            self.name, pair, self.numbers, label_smoothing=self.label_smoothing, centring=self.centring
        )
        return {"loss": loss, **terms}


@dataclass(frozen=True)
class Point:
    """A loss at one gap: its value and the size of its gradient, |(d/dt, d/ds)|, by the critic's output."""

    output_gap: float
    raw_gap: float
    norm_gap: float
    value: float
    gradient: float


@dataclass(frozen=True)
class Rest:
    """Where training the scores themselves would end.

    kind: "point" (a minimum), "clamp" (nothing but the clamp ends the pull: beyond, the gradient is 0) or "none" (the
    pull never ends; the gaps are then nan). `raw_gap_free`: the loss does not notice raw scores drifting apart along
    a constant norm gap. d_acc, gaps and ranking_loss are what the run's metrics would show there.
    """

    kind: str
    raw_gap: float
    norm_gap: float
    ranking_loss: float
    d_acc: float
    spread: float
    raw_gap_free: bool


@dataclass(frozen=True)
class Stored:
    """A loss over stored score pairs: means of value, gradient size a pair and gaps."""

    pairs: int
    value: float
    gradient: float
    raw_gap: float
    norm_gap: float
    d_acc: float


def sweep(
    spec: LossSpec, output_gaps: Sequence[float], *, t_len: float, s_len: float, values: str = "last"
) -> list[Point]:
    """The loss along critic outputs +g/2 (teacher) and -g/2 (student).

    `values` "last": the output is the raw score. "all": it is every token's value, so the raw score is the output
    times the length, and so is its pull on the critic: a long text saturates a loss on raw scores.
    """
    gain_t, gain_s = (t_len, s_len) if values == "all" else (1.0, 1.0)
    gap = torch.tensor(output_gaps, dtype=torch.float64)
    t_out, s_out = (gap / 2).requires_grad_(), (-gap / 2).requires_grad_()
    loss = spec(t_out * gain_t, s_out * gain_s, t_len, s_len)
    grad_t, grad_s = torch.autograd.grad(loss.sum(), (t_out, s_out))
    size = torch.hypot(grad_t, grad_s)
    raw = (t_out * gain_t - s_out * gain_s).tolist()
    norm = (t_out * gain_t / t_len - s_out * gain_s / s_len).tolist()
    return [Point(*row) for row in zip(gap.tolist(), raw, norm, loss.tolist(), size.tolist(), strict=True)]


def stored(spec: LossSpec, t_raw: Sequence[float], s_raw: Sequence[float], t_len: Sequence[float],
           s_len: Sequence[float]) -> Stored:  # fmt: skip
    """The loss over N stored pairs of raw scores and response lengths (tokens)."""
    t, s, lt, ls = (torch.tensor(x, dtype=torch.float64) for x in (t_raw, s_raw, t_len, s_len))
    lt, ls = lt.clamp(min=1), ls.clamp(min=1)  # as scores.py does for an empty answer
    t.requires_grad_(), s.requires_grad_()
    loss = spec(t, s, lt, ls)
    grad_t, grad_s = torch.autograd.grad(loss.sum(), (t, s))
    with torch.no_grad():
        norm_gap = (t / lt - s / ls).mean().item()
        return Stored(len(t_raw), loss.mean().item(), torch.hypot(grad_t, grad_s).mean().item(),
                      (t - s).mean().item(), norm_gap, wins(t, s).mean().item())  # fmt: skip


def rest(spec: LossSpec, *, t_len: float, s_len: float, accuracy: float = 1.0, spread: float = 0.0) -> Rest:
    """Where the loss rests, for a discriminator of a given quality. Quality enters in two ways:

    accuracy p   Evidence in a pair points to the teacher's text with probability p. The critic knows which way it
                 points, not whether it is right: it gives a to the text it takes for the teacher's and b to the
                 other, minimising p l(a, b) + (1-p) l(b, a). `original` then rests at the log-odds, a - b = logit p.
    spread       Scores scatter by this standard deviation (raw) for reasons of their own: topic, prompt, noise. The
                 critic moves both means. Then d_acc = Phi(gap / (spread sqrt 2)) measures how well texts are told
                 apart, while a loss that is linear in the gap does not see it.
    """
    risk = _risk(spec, t_len, s_len, accuracy, spread)
    # Search along the norm gap and across it: v1 and v2 look at the first only, so their valley is the second axis.
    along = torch.tensor([1 / t_len, -1 / s_len], dtype=torch.float64)
    along = along / along.norm()
    across = torch.stack([-along[1], along[0]])
    best, inside = _minimise(lambda u, w: risk(u * along[0] + w * across[0], u * along[1] + w * across[1]))
    a, b = (best[0] * along + best[1] * across).tolist()

    def at(x: float, y: float) -> float:
        return risk(torch.tensor([x], dtype=torch.float64), torch.tensor([y], dtype=torch.float64)).item()

    if not inside:
        kind = "none"
    elif at(1.5 * a, 1.5 * b) > at(a, b) + 1e-11:
        kind = "point"
    else:
        kind = "clamp" if _gradient(risk, 2 * a, 2 * b) == 0.0 else "none"
    drift = 100 * across
    free = abs(at(a + drift[0].item(), b + drift[1].item()) - at(a, b)) < 1e-12
    if kind == "none":
        return Rest(kind, math.nan, math.nan, math.nan, math.nan, spread, free)
    # Equal up to the search's precision is a tie.
    gap = 0.0 if abs(a - b) < 1e-6 * (1 + abs(a)) else a - b
    p, win = accuracy, _win(gap, spread)
    rank = _risk(spec, t_len, s_len, p, spread, term="ranking_loss")
    return Rest(
        kind,
        raw_gap=(2 * p - 1) * gap,
        norm_gap=p * (a / t_len - b / s_len) + (1 - p) * (b / t_len - a / s_len),
        ranking_loss=rank(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)).item(),
        d_acc=p * win + (1 - p) * (1 - win),
        spread=spread,
        raw_gap_free=free,
    )


Risk = Callable[[Tensor, Tensor], Tensor]


def _risk(spec: LossSpec, t_len: float, s_len: float, p: float, spread: float, term: str = "loss") -> Risk:
    """Expected loss (or one of its terms) where the text taken for the teacher's scores a and the other b."""
    nodes, weights = _gauss_hermite(NODES) if spread > 0 else (torch.zeros(1).double(), torch.ones(1).double())
    e1_Q, e2_Q = (x.flatten() * spread for x in torch.meshgrid(nodes, nodes, indexing="ij"))
    w_Q = torch.outer(weights, weights).flatten()

    def risk(a: Tensor, b: Tensor) -> Tensor:
        high, low = a[..., None] + e1_Q, b[..., None] + e2_Q
        value = p * spec.terms(high, low, t_len, s_len)[term]
        if p < 1:
            value = value + (1 - p) * spec.terms(low, high, t_len, s_len)[term]
        return (value * w_Q).sum(-1)

    return risk


def _minimise(f: Risk) -> tuple[Tensor, bool]:
    """(minimiser [2], whether it lies inside the widest box) of a convex function, kinks and flats included."""
    box = BOX
    while True:
        at = _minimise_box(f, box, ROUGH_ZOOMS)
        if at.abs().max() < 0.8 * box:
            return _minimise_box(f, box, ZOOMS), True
        if box > WIDEST_BOX:
            return at, False
        box *= 8


def _minimise_box(f: Risk, box: float, zooms: int) -> Tensor:
    """Minimiser (u, w) in a box. For every w of a zooming grid, u is minimised by a zooming grid of its own: unlike
    one grid over the plane, that follows a valley in any direction."""
    low, high = torch.tensor([-box], dtype=torch.float64), torch.tensor([box], dtype=torch.float64)
    for _ in range(zooms):
        w = _grid(low, high)[0]
        u, value = _minimise_u(f, w, box, zooms)
        best = int(value.argmin())
        at, step = torch.stack([u[best], w[best]]), w[1] - w[0]
        low, high = (at[1] - step)[None], (at[1] + step)[None]
    return at


def _minimise_u(f: Risk, w: Tensor, box: float, zooms: int) -> tuple[Tensor, Tensor]:
    """For each w, the minimising u in [-box, box] and the value there."""
    low, high = torch.full_like(w, -box), torch.full_like(w, box)
    for _ in range(zooms):
        u = _grid(low, high)
        ridge = RIDGE * (u.square() + w[:, None].square())
        value, best = (f(u, w[:, None].expand_as(u)) + ridge).min(-1)
        at, step = u.gather(1, best[:, None])[:, 0], u[:, 1] - u[:, 0]
        low, high = at - step, at + step
    return at, value


def _grid(low: Tensor, high: Tensor) -> Tensor:
    return low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, GRID, dtype=torch.float64)


def _gradient(risk: Risk, a: float, b: float) -> float:
    at = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(risk(at[:1], at[1:]).sum(), at)
    return grad.norm().item()


def _gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for the expectation over a standard normal (Golub-Welsch: Jacobi matrix of Hermite's He)."""
    off = torch.arange(1, n, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0].square()


def _win(gap: float, spread: float) -> float:
    """How often the score that is higher by `gap` on average is the higher one."""
    if spread > 0:
        return 0.5 * (1 + math.erf(gap / (2 * spread)))
    return 0.5 if gap == 0 else float(gap > 0)
