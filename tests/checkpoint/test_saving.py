"""What save, load, choose and prune promise in one process.

Pinned here (rows 31, 32, 33, 38 of the fault matrix): a partial newest is told and skipped, a flipped byte and a cut
file are found, missing parts are named, a full disk leaves the last checkpoint byte-identical.
"""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoint.saving import save, snapshot
from gadcli.checkpoint.manifest import latest_valid, list_checkpoints, read_manifest, read_trainer, verify
from gadcli.checkpoint.retention import set_aside_newer
from gadcli.errors import CheckpointError, ConfigError, ResourceError
from gadcli.train import checkpoint as engine
from gadcli.train.checkpoint import load_checkpoint, load_rng


def steps(run_dir: Path) -> list[str]:
    return sorted(p.name for p in run_dir.iterdir())


def empty_state() -> dict:
    return {"model": {"w": torch.zeros(6)}, "optim": {"w/exp_avg": torch.zeros(6), "lr": 0.0}}


def test_everything_comes_back_as_it_was_given(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    state = empty_state()
    manifest = load_checkpoint(path, "actor", state)
    assert torch.equal(state["model"]["w"], torch.full((6,), 3.0))
    assert torch.equal(state["optim"]["w/exp_avg"], torch.full((6,), 6.0))
    assert state["optim"]["lr"] == 0.5
    assert read_trainer(path) == {"step": 3, "epoch": 1}
    rng = load_rng(path)
    assert rng is not None and torch.equal(rng["cpu"], torch.get_rng_state())
    assert (manifest.step, manifest.stage, manifest.world_size, manifest.models) == (3, "gad", 1, ["actor", "critic"])
    assert (tmp_path / "latest").read_text() == "3\n"
    # every file of the folder but the manifest itself is listed
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert files - {"MANIFEST.json"} == set(manifest.files)


def test_the_two_newest_stay_and_the_best_with_them(tmp_path: Path) -> None:
    for step, score in enumerate([0.3, 0.9, 0.4, 0.5, 0.6], 1):
        save(tmp_path, step, score=score, keep_best="val/rouge_l")
    # of steps 1..5 the newest two are 4 and 5; rouge_l was best (0.9) at 2
    assert steps(tmp_path) == ["global_step_2", "global_step_4", "global_step_5", "latest"]


def test_a_metric_of_which_less_is_better_keeps_the_smallest(tmp_path: Path) -> None:
    from gadcli.checkpoint.retention import less_is_better

    for step, score in enumerate([0.3, 0.1, 0.4, 0.5], 1):
        save(tmp_path, step, score=score, keep_best="min:val/rouge_l")
    assert steps(tmp_path) == ["global_step_2", "global_step_3", "global_step_4", "latest"]
    assert less_is_better("val/loss") and less_is_better("val/perplexity") and not less_is_better("val/rouge_l")


def test_keeping_fewer_than_two_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_last"):
        save(tmp_path, 1, keep_last=1)
    assert steps(tmp_path) == []


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="never overwritten"):
        save(tmp_path, 1, value=9)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "grown", "no manifest", "torn manifest", "renamed"])
def test_a_damaged_newest_is_told_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    first, newest = save(tmp_path, 1), save(tmp_path, 2)
    shard = newest / "actor" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    manifest = newest / "MANIFEST.json"
    if damage == "flip":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[:-1])
    elif damage == "grown":
        shard.write_bytes(data + b"\0")
    elif damage == "missing":
        shard.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "torn manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        newest.rename(tmp_path / "global_step_9")
        newest = tmp_path / "global_step_9"
    said: list[str] = []
    assert latest_valid(tmp_path, said.append) == first
    assert len(said) == 1 and newest.name in said[0] and "using global_step_1" in said[0]


def test_a_resumed_run_can_save_the_steps_of_the_damaged_checkpoints_it_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    (damaged / "trainer" / "trainer.json").write_text("{}")
    content = snapshot(damaged)
    (tmp_path / "global_step_3").mkdir()  # never finished
    chosen = latest_valid(tmp_path, lambda line: None)
    assert chosen == tmp_path / "global_step_1"
    moved = set_aside_newer(tmp_path, chosen)
    assert [path.name for path in moved] == ["global_step_2.damaged", "global_step_3.damaged"]
    assert snapshot(moved[0]) == content  # renamed, nothing deleted
    assert latest_valid(tmp_path, pytest.fail) == chosen
    verify(save(tmp_path, 2))
    # Were the damaged one still counted among the two newest, step 1 would be pruned here and one sound one left.
    assert [path.name for path in list_checkpoints(tmp_path)] == ["global_step_1", "global_step_2"]
    assert set_aside_newer(tmp_path, tmp_path / "global_step_2") == []


def test_an_unfinished_save_is_told_and_removed_by_the_next(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    shutil.copytree(first, tmp_path / "global_step_2.tmp")
    said: list[str] = []
    assert latest_valid(tmp_path, said.append) == first
    assert "global_step_2.tmp: unfinished" in said[0]
    save(tmp_path, 3)
    assert steps(tmp_path) == ["global_step_1", "global_step_3", "latest"]


def test_no_usable_checkpoint_is_none_and_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    assert latest_valid(tmp_path / "nothing", said.append) is None
    (save(tmp_path, 1) / "MANIFEST.json").unlink()
    assert latest_valid(tmp_path, said.append) is None
    assert len(said) == 1 and "there is no older one" in said[0]
    assert list_checkpoints(tmp_path) == []


def test_verify_names_the_damaged_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    shard = path / "critic" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 255
    shard.write_bytes(data)
    verify(path, deep=False)  # sizes fit: only the hash can tell
    verify(path, ["actor/"])
    with pytest.raises(CheckpointError, match=r"critic/__0_0\.distcp: sha256"):
        verify(path)


def test_a_missing_model_or_part_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="holds no reference model"):
        load_checkpoint(path, "reference", {"model": {}})
    with pytest.raises(CheckpointError, match="holds no critic optim"):
        load_checkpoint(path, "critic", {"optim": {}})
    shutil.rmtree(path / "critic")
    with pytest.raises(CheckpointError, match=r"critic/.*missing"):
        load_checkpoint(path, "actor", empty_state())


def test_a_critic_of_another_step_is_found(tmp_path: Path) -> None:
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    shutil.rmtree(two / "critic")
    shutil.copytree(one / "critic", two / "critic")
    with pytest.raises(CheckpointError, match="critic/"):
        verify(two)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"w": torch.zeros(5)}, r"w is \(\(6,\), 'float32'\)"),
        ({"w": torch.zeros(6, dtype=torch.bfloat16)}, "bfloat16"),
        ({"w": torch.zeros(6), "v": torch.zeros(1)}, "1 entries missing from the checkpoint: v"),
        ({}, "1 entries left over in the checkpoint: w"),
    ],
)
def test_a_model_that_differs_is_refused_and_untouched(tmp_path: Path, state: dict, reason: str) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path, "actor", {"model": state})
    assert all(not t.any() for t in state.values())


def test_too_little_disk_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = snapshot(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(ResourceError, match=r"need 67\.1 MB, have 1\.0 MB"):  # 64 MiB of slack, and 80 bytes
        save(tmp_path, 2)
    assert snapshot(tmp_path) == before


FILLS_UP = """
import signal, resource, sys
from pathlib import Path
from checkpoint.saving import save
from gadcli.errors import ResourceError
save(Path(sys.argv[1]), 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))   # a write beyond 1 MiB fails as on a full disk
try:
    save(Path(sys.argv[1]), 2, size=1_000_000)                   # 4 MB
except ResourceError as error:
    print(error.message)
    sys.exit(int(error.exit_code))
"""


def test_a_disk_that_fills_while_writing_leaves_the_last_one_intact(tmp_path: Path) -> None:
    import os

    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": f"{root / 'src'}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FILLS_UP, str(tmp_path)], env=env, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 6, done.stderr[-2000:]
    assert "need" in done.stdout and "have" in done.stdout
    assert steps(tmp_path) == ["global_step_1", "latest"]
    verify(tmp_path / "global_step_1")


@pytest.fixture
def small_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_an_asset_that_cannot_be_written_commits_nothing(tmp_path: Path, small_files: None) -> None:
    with pytest.raises(ResourceError):
        save(tmp_path, 1, size=100_000)
    assert steps(tmp_path) == []


def test_a_disk_that_fills_under_the_generators_is_a_full_disk_too(tmp_path: Path, small_files: None) -> None:
    # The weights fit into 4096 bytes a file, the state of torch's generator (5056) does not: safetensors' own error.
    with pytest.raises(ResourceError, match="disk full"):
        save(tmp_path, 1)
    assert steps(tmp_path) == []


def test_the_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = path / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="format 2"):
        read_manifest(path)


def test_bytes_are_counted_once_for_the_disk_check() -> None:
    # 6 float32 = 24 bytes in a nest; on another rank than 0 a plain tensor is written by rank 0 only
    tree = {"a": [torch.zeros(4), {"b": torch.zeros(2)}], "lr": 0.1}
    assert engine._local_bytes(tree, 0) == 24
    assert engine._local_bytes(tree, 1) == 0
