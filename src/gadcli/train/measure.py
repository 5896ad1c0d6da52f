"""Metrics that no loss reports: answer lengths, memory."""

from __future__ import annotations

from pathlib import Path

import torch

from gadcli.algo.mean import Mean, extreme_of, mean_of
from gadcli.data.batches import TokenizedRow
from gadcli.model.rollout_batch import Rollout


def length_metrics(rows: list[TokenizedRow], rollout: Rollout | None, max_response_length: int) -> dict[str, Mean]:
    """Tokens of the teacher's and student's answers (EOS included) and the share of answers cut at the limit."""
    metrics = {"teacher_length/mean": mean_of(torch.tensor([len(row.teacher_ids) for row in rows]))}
    if rollout is not None:
        lengths = torch.tensor(rollout.lengths)
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
