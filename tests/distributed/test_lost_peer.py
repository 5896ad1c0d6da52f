"""A rank whose peer is gone ends with 7 and says so, instead of looking like a bug."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from gadcli.distributed.worker_end import as_peer_error
from train.training import prepare, start, steps, write_inputs

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41234"


def test_a_rank_whose_peer_was_killed_ends_with_7(tmp_path: Path) -> None:
    run_dir = prepare(
        tmp_path / "run", write_inputs(tmp_path / "inputs"), "seqkd", "trainer.total_steps=100000", "data.val_files=[]"
    )
    first, second = start(run_dir, world=2)
    deadline = time.monotonic() + 150
    while not ((run_dir / "metrics.jsonl").exists() and steps(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.05)
    second.send_signal(signal.SIGKILL)
    assert first.wait(60) == 7, (run_dir / "logs" / "rank_0.log").read_text()[-2000:]
    record = json.loads((run_dir / "logs" / "rank_0.exit.json").read_text())
    assert record["kind"] == "PeerError" and record["message"].startswith("rank 0 lost its peers: ")
    second.wait()


@pytest.mark.parametrize(
    ("error", "known"),
    [(RuntimeError(GLOO), True), (RuntimeError("shape '[2]' is invalid"), False), (ValueError(GLOO), False)],
)
def test_only_what_the_transport_raises_is_a_lost_peer(error: Exception, known: bool) -> None:
    assert (as_peer_error(error) is not None) == known
