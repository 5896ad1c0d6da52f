"""A checkpoint of two small tensors, saved by one process: what the single-process tests start from."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gadcli.train.checkpoint import save_checkpoint


def save(run_dir: Path, step: int, value: float | None = None, *, score: float | None = None, size: int = 6,
         keep_last: int = 2, keep_best: str = "") -> Path:  # fmt: skip
    """global_step_<step> whose actor weights all equal `value` (default: the step), and critic weights minus that."""
    weight = torch.full((size,), float(step if value is None else value))
    metrics = {} if score is None else {"val/rouge_l": score}
    return save_checkpoint(
        run_dir, step, stage="gad", config_hash="c0ffee",
        models={"actor": {"w": weight}, "critic": {"score.weight": -weight[:2]}},
        optims={"actor": {"w/exp_avg": weight * 2, "lr": 0.5}},
        trainer={"step": step, "epoch": 1}, rng={"cpu": torch.get_rng_state()},
        assets={"actor": write_config},
        metrics=metrics, keep_last=keep_last, keep_best=keep_best,
    )  # fmt: skip


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a tree with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rewrite_manifest(checkpoint: Path) -> None:
    """Makes the manifest agree with tampered files again, as someone who plants a payload would."""
    from gadcli.checkpoint.manifest import hash_file

    path = checkpoint / "MANIFEST.json"
    raw = json.loads(path.read_text())
    for name in raw["files"]:
        entry = hash_file(checkpoint / name)
        raw["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    path.write_text(json.dumps(raw))
