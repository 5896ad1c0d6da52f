"""What one step measured: means to be reduced over ranks, seconds per phase, answer lengths, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gadcli.algo.mean import Mean, add_metrics, extreme_of, mean_of
from gadcli.data.batches import TokenizedRow
from gadcli.model.rollout_batch import Rollout


@dataclass
class StepLog:
    """Collects one step. `on_phase` is told each phase as it begins (heartbeat and hang watchdog)."""

    step: int
    on_phase: Callable[[str, int], None] = lambda phase, step: None
    means: dict[str, Mean] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def add(self, metrics: Mapping[str, Mean]) -> None:
        """Means that still have to be reduced over ranks."""
        add_metrics(self.means, dict(metrics))

    def put(self, name: str, value: float) -> None:
        """A number that is already the same on all ranks (or this rank's to tell)."""
        self.values[name] = value

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; phases of one name add up."""
        self.on_phase(name, self.step)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def timings(self) -> dict[str, float]:
        """`timing_s/<phase>` and `timing_s/step`, the latter from the log's birth until now."""
        whole = time.monotonic() - self.started
        return {f"timing_s/{name}": s for name, s in self.seconds.items()} | {"timing_s/step": whole}


def length_metrics(rows: list[TokenizedRow], rollout: Rollout | None, max_response_length: int) -> dict[str, Mean]:
    """Tokens of the teacher's and student's answers (EOS included), as far as the discriminator reads them
    (`critic.reads`), and the share of answers cut at the limit."""
    metrics = {"teacher_length/mean": mean_of(torch.tensor([len(row.read_ids) for row in rows]))}
    if rollout is not None:
        lengths = torch.tensor(rollout.read_lengths)
        cut = torch.tensor([not answer.finished for group in rollout.answers for answer in group])
        metrics |= {
            "response_length/mean": mean_of(lengths),
            "response_length/max": extreme_of(lengths, "max"),
            "response_length/min": extreme_of(lengths, "min"),
            "response_length/clip_ratio": mean_of(cut),
        }
    return metrics


def host_metrics(device: torch.device) -> dict[str, float]:
    """Resident memory of this process and, on GPUs, the allocator's peak; GiB, of rank 0."""
    metrics = {}
    status = Path("/proc/self/status")
    if status.exists():
        rss_kb = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        metrics["perf/rss_gb"] = rss_kb / 2**20
    if device.type == "cuda":
        metrics["perf/gpu_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
    return metrics
