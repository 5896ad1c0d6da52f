"""What a merge starts from, whichever layout it came in: named tensors, a folder of assets, what they are, lineage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gadcli.checkpoint.merge.tensors import SourceTensor
from gadcli.errors import CheckpointError


@dataclass(frozen=True)
class LoraInfo:
    """Scale of an adapter: delta = scale * B @ A. `rank` None: not recorded, taken from the shapes."""

    alpha: float
    rank: int | None = None
    rslora: bool = False
    task_type: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise CheckpointError(f"LoRA's alpha is {self.alpha}: every weight would be lost", "--lora-alpha A")

    def scale(self, rank: int) -> float:
        return float(self.alpha / (rank**0.5 if self.rslora else rank))


@dataclass
class Source:
    """A checkpoint of one model. `integrity` re-reads the files and raises on damage (run beside the writing)."""

    folder: Path
    layout: str
    tensors: dict[str, SourceTensor]
    assets: Path | None
    lineage: dict[str, Any]
    lora: LoraInfo | None = None
    integrity: Callable[[], None] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def has_lora(self) -> bool:
        return any(".lora_" in name for name in self.tensors)

    @property
    def is_critic(self) -> bool:
        """A scalar head says so; the saved `architectures` of verl's critics still says CausalLM."""
        return any(name.startswith(("score.", "v_head.")) for name in self.tensors)
