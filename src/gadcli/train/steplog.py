"""What one step measured: means to be reduced over ranks, seconds a phase, and the phase a watcher sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from gadcli.algo.mean import Mean, add_metrics


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
