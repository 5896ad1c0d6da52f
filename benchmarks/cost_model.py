"""What a step costs by arithmetic: checked against step.py's figures, and extrapolated to GPUs.

    python benchmarks/cost_model.py [RESULT.json of `step.py update` …]

Counted are multiplications and additions of matrix products and attention, forward and backward; time is that over a
rate. The same counts, with prompts shared and not, predict what sharing is worth. The extrapolation is arithmetic with
assumed efficiencies, printed with it: nobody has measured it. Legend: P prompts, G answers each, W devices.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    hidden: int
    wide: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.wide

    @property
    def weights(self) -> int:
        return self.layers * self.layer_weights + self.vocabulary * self.hidden


SMOLLM2 = Model(576, 1536, 30, 9, 3, 64, 49152)
QWEN3_8B = Model(4096, 12288, 36, 32, 8, 128, 151936)


@dataclass(frozen=True)
class Work:
    """P prompts of `prompt` tokens with G answers of `response` tokens; the critic reads the teacher's answer too."""

    prompts: int
    group: int
    prompt: int
    response: int

    def tokens(self, *, shared: bool, answers: int) -> int:
        return self.prompts * (
            self.prompt + answers * self.response if shared else answers * (self.prompt + self.response)
        )

    def scores(self, *, shared: bool, answers: int) -> float:
        """Query-key pairs that the kernels compute: triangles for prompts, whole rectangles for answers behind them."""
        p, r = self.prompt, self.response
        return self.prompts * (p * p / 2 + answers * r * (p + r) if shared else answers * (p + r) ** 2 / 2)


def pass_flops(model: Model, work: Work, *, shared: bool, answers: int, backward: bool, head: bool) -> float:
    """One pass. Backward is twice forward; attention's backward computes its scores anew (2.5), the head's its logits
    too (3)."""
    layers = 2 * model.layers * model.layer_weights * work.tokens(shared=shared, answers=answers)
    attention = 4 * model.layers * model.heads * model.head_size * work.scores(shared=shared, answers=answers)
    logits = 2 * model.vocabulary * model.hidden * work.prompts * answers * work.response if head else 0
    return (3 * layers + 3.5 * attention + 4 * logits) if backward else layers + attention + logits


def update_flops(model: Model, work: Work, *, shared: bool) -> dict[str, float]:
    """The update's three passes; without sharing the critic reads the teacher beside every answer."""
    group = work.group
    critic = Work(work.prompts * (1 if shared else group), group, work.prompt, work.response)
    return {
        "reference": pass_flops(model, work, shared=shared, answers=group, backward=False, head=True),
        "actor": pass_flops(model, work, shared=shared, answers=group, backward=True, head=True),
        "critic": pass_flops(model, critic, shared=True, answers=group + 1 if shared else 2, backward=True, head=False),
    }


def check(path: Path) -> None:
    """Predicted and measured: seconds at the product rate measured in the same turn, and what sharing is worth."""
    found = json.loads(path.read_text())
    s = found["settings"]
    work = Work(s["prompts"], s["group"], s["prompt"], s["response"])
    rounds = found["rounds"]["update"]
    rate = statistics.median(r["gemm_gflops"] for r in rounds) * 1e9
    flops = {name: update_flops(SMOLLM2, work, shared=name == "shared") for name in ("shared", "alone")}
    print(
        f"{path.name}: {s['prompts']} x {s['prompt']} tokens, {s['group']} x {s['response']}; {rate / 1e9:.1f} GFLOP/s"
    )
    for part in ("reference", "actor", "critic"):
        seconds = {n: statistics.median(r[f"{n}_{part}"] for r in rounds) for n in flops}
        share = flops["shared"][part] / rate / seconds["shared"]
        print(
            f"  {part:10} shared {seconds['shared']:6.2f} CPU-s, arithmetic alone {flops['shared'][part] / rate:6.2f} "
            f"({100 * share:3.0f} % of the product rate); worth {seconds['alone'] / seconds['shared']:.2f}x, "
            f"predicted {flops['alone'][part] / flops['shared'][part]:.2f}x"
        )


# Assumptions of the extrapolation, an H100's: products at 40 % of 989 TFLOP/s in bf16; 3.35 TB/s of memory at 60 %;
# FSDP's traffic at 300 GB/s within a node of 8 and 40 GB/s a device between nodes, half of it hidden behind compute.
RATE, MEMORY, NEAR, FAR, HIDDEN = 0.4 * 989e12, 0.6 * 3.35e12, 300e9, 40e9, 0.5


def extrapolate(work: Work, devices: int, *, shared: bool) -> dict[str, float]:
    """Seconds of a step of an 8B student, reference and critic of its size. Not measured."""
    model = QWEN3_8B
    flops = update_flops(model, work, shared=shared)
    compute = sum(flops.values()) / devices / RATE
    gathered = 2 * model.weights * (devices - 1) / devices  # bf16, once a pass: forward, backward; gradients in fp32
    traffic = (2 + 2 + 1) * gathered + 2 * 2 * gathered
    network = (1 - HIDDEN) * traffic / (NEAR if devices <= 8 else FAR)
    sequences = work.prompts * work.group / devices
    kv = 4 * model.layers * model.kv_heads * model.head_size * (work.prompt + work.response / 2)
    decode = work.response * (2 * model.weights + sequences * kv) / MEMORY
    prefill = 2 * model.weights * work.prompts * work.prompt / devices / RATE
    return {"update": compute, "network": network, "rollout": decode + prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    for path in parser.parse_args().results:
        check(path)
    work = Work(128, 8, 512, 256)
    print("EXTRAPOLATED, not measured: 8B, 128 prompts of 512 tokens x 8 answers of 256, H100s, seconds a step")
    for devices in (8, 16, 32, 64):
        rows = {name: extrapolate(work, devices, shared=name == "shared") for name in ("shared", "alone")}
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in rows["shared"].items())
        totals = {name: sum(row.values()) for name, row in rows.items()}
        print(f"  {devices:3} devices: {totals['shared']:6.1f} ({parts}); without sharing {totals['alone']:6.1f}")


if __name__ == "__main__":
    main()
