"""Float32 matrix products as torch computes them (MKL) and as our CPU workers do where that is faster (oneDNN).

    python benchmarks/products.py [--tokens 1024] [--rounds 5] [--out FILE.json]

One thread, the three products of a training step (forward, gradient of the input, gradient of the weight) at the shapes
of the demo's student and of a 0.5B one, in turns in one process; GFLOP/s. The last column is our largest error against
double precision over that of torch's own product.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import contest
from gadcli.distributed import cpu_matmul as products

# (hidden, wide) of a linear layer
SHAPES = {
    "135M, MLP": (576, 1536), "135M, keys": (576, 192), "135M, head": (576, 49_152), "0.5B, MLP": (896, 4864),
}  # fmt: skip


def gflops(left: torch.Tensor, right: torch.Tensor) -> float:
    """Best of three calls."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        torch.mm(left, right)
        best = min(best, time.process_time() - start)
    return 2 * left.shape[0] * left.shape[1] * right.shape[1] / best / 1e9


def error(left: torch.Tensor, right: torch.Tensor) -> float:
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).abs().max() / exact.abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON, and a plot beside them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = products.mkl_is_slow(products.cpu_vendor())
    print(f"{products.cpu_vendor() or 'no x86'}: our workers take {'oneDNN' if chosen else 'what torch takes'} here")
    ratio, rates = {}, {}
    for name, (hidden, wide) in SHAPES.items():
        tokens = min(args.tokens, 8 * 1024 * 1024 // wide)  # the head's products come in chunks
        x, weight, grad = torch.randn(tokens, hidden), torch.randn(wide, hidden), torch.randn(tokens, wide)
        for what, left, right in (("forward", x, weight.t()), ("input", grad, weight), ("weight", grad.t(), x)):
            usual, ours = [], []
            for _ in range(args.rounds):
                usual.append(gflops(left, right))
                torchs = error(left, right)
                library = products.use_onednn()
                ours.append(gflops(left, right))
                rounding = error(left, right) / torchs
                library._destroy()
            row = f"{name}, {what}"
            ratio[row] = contest.ratios(usual, ours)
            rates[row] = {"torch": usual, "oneDNN": ours, "error ratio": rounding}
            print(f"  {row:22} torch {max(usual):5.0f}   oneDNN {max(ours):5.0f} GFLOP/s   error x {rounding:.1f}")
    contest.print_table("oneDNN / torch", "times", ratio)
    results = {"machine": contest.machine(), "settings": {"tokens": args.tokens}, "ratios": ratio, "rates": rates}
    contest.write(args.out, results, "products.py: GFLOP/s, oneDNN / torch (MKL)", ratio)


if __name__ == "__main__":
    main()
