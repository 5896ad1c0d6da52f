"""Reduction over ranks: one global mean, whatever each rank brings."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gadcli.metrics.reduce import reduce_means


@dataclass
class Mean:
    total: float
    count: float


WORKER = """
import json, os, sys, datetime
import torch, torch.distributed as dist
torch.set_num_threads(1)
from dataclasses import dataclass
from gadcli.metrics.reduce import reduce_means
@dataclass
class Mean:
    total: object
    count: object
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=20))
mine = [{"critic/d_loss": Mean(torch.tensor(1.0), torch.tensor(1.0)), "response_length/max": Mean(7.0, 1.0),
         "critic/advantages/min": Mean(-3.0, 1.0)},
        {"critic/d_loss": Mean(9.0, 3), "actor/pg_loss": Mean(2.0, 4.0), "response_length/max": Mean(5.0, 1.0),
         "critic/advantages/min": Mean(2.0, 1.0)}][rank]
first = reduce_means(mine)
second = reduce_means({} if rank else {"critic/d_loss": Mean(6.0, 2.0)})
print(json.dumps([first, second]))
"""


def test_two_ranks_reduce_to_the_global_mean_not_a_mean_of_means(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    answers = [json.loads(worker.communicate(timeout=60)[0]) for worker in workers]
    assert answers[0] == answers[1]
    first, second = answers[0]
    # (1 + 9) / (1 + 3) = 2.5; the mean of means would be (1/1 + 9/3) / 2 = 2
    assert first["critic/d_loss"] == 2.5
    assert first["actor/pg_loss"] == 0.5  # only rank 1 has it: 2 / 4
    assert first["response_length/max"] == 7.0 and first["critic/advantages/min"] == -3.0
    assert second == {"critic/d_loss": 3.0}  # rank 1 brings nothing and still takes part


def test_without_a_process_group_it_is_the_local_mean() -> None:
    assert reduce_means({"critic/d_acc": Mean(3.0, 4.0), "critic/d_loss": Mean(0.0, 0.0)}) == {"critic/d_acc": 0.75}


def test_a_name_the_table_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="critic/d_ac"):
        reduce_means({"critic/d_ac": Mean(1.0, 1.0)})
