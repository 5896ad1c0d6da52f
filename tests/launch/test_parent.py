"""`gad train` and `gad run` from the command line to the exit code, over a small real worker.

Pins: --dry-run prints the plan, writes nothing and imports no torch · a folder with a run is refused (2), resumed, or
moved aside, never deleted · other settings on resume are 4 · what a run's folder holds · errors in four lines · the
stages of `gad run` feed each other, and finished ones are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.processes import HERE, SOURCE, wait_until

ROWS, BATCH = 50, 8
GAD = [sys.executable, str(HERE / "gad_process.py")]
SEQKD = ["train", "seqkd", "--preset", "demo", "--model", "org/student", "--exp-name", "e",
         "data.train_files=train.parquet", f"data.train_batch_size={BATCH}"]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with training data in it, and none of a run."""
    rows = [
        {"content": [{"role": "user", "content": f"What is {i}?"}], "teacher_response": f"It is {i}."}
        for i in range(ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return tmp_path


def gad(place: Path, *words: str, does: str = "steps=2", **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder; TensorBoard off unless a test wants it."""
    variables = {**os.environ, "PYTHONPATH": f"{SOURCE}:{HERE}", "SMALL_WORKER": does, "COLUMNS": "100", **env}
    return subprocess.run([*GAD, *words], cwd=place, env=variables, capture_output=True, text=True, timeout=60)


def seqkd(place: Path, *words: str, does: str = "steps=2", **env: str) -> subprocess.CompletedProcess[str]:
    return gad(place, *SEQKD, *words, does=does, **env)


def test_a_dry_run_prints_the_steps_and_writes_nothing(place: Path) -> None:
    done = seqkd(place, "--dry-run", "trainer.total_steps=0", "trainer.total_epochs=4")
    assert done.returncode == 0, done.stderr
    # 50 rows in batches of 8: 6 steps an epoch, 2 rows left over; 4 epochs: 24 steps
    assert "6 steps per epoch" in done.stdout and "24 (4 epochs of 6)" in done.stdout
    assert sorted(p.name for p in place.iterdir()) == ["train.parquet"]


def test_a_dry_run_as_json_is_one_document(place: Path) -> None:
    report = json.loads(seqkd(place, "--dry-run", "--json").stdout)
    assert report["plan"]["rows"]["kept"] == ROWS
    assert report["run_dir"] == "runs/e"


def test_a_dry_run_imports_no_torch(place: Path) -> None:
    script = (
        "import sys; from gadcli.cli import app; code = app.run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'vllm'} & set(sys.modules); sys.exit(f'imported {heavy}' if heavy else code)"
    )
    words = ["train", "warmup", "--preset", "chengla-8b", "--model", "org/x", "--dry-run", *SEQKD[-2:]]
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_runs_folder_holds_config_plan_lineage_and_logs(place: Path) -> None:
    done = seqkd(place)
    assert done.returncode == 0, done.stderr
    run = place / "runs" / "e"
    assert {"config.yaml", "plan.json", "lineage.json", "logs", "metrics.jsonl"} <= {p.name for p in run.iterdir()}
    lineage = json.loads((run / "lineage.json").read_text())
    assert lineage["stage"] == "seqkd"
    assert lineage["data"]["train.parquet"]["bytes"] == (place / "train.parquet").stat().st_size
    assert lineage["parents"]["actor"]["path"] == "org/student"
    assert "rank 0 is up" in (run / "logs" / "rank_0.log").read_text()


def test_not_a_terminal_gets_one_plain_line_a_step(place: Path) -> None:
    done = seqkd(place, does="steps=3")
    steps = [line for line in done.stdout.splitlines() if "sft" in line]
    assert len(steps) == 3
    assert "\x1b" not in done.stdout + done.stderr


def test_a_folder_with_a_run_is_refused_and_left_as_it_was(place: Path) -> None:
    seqkd(place)
    before = (place / "runs/e/metrics.jsonl").read_bytes()
    done = seqkd(place)
    assert done.returncode == 2
    assert "holds a run already" in done.stderr and "--resume" in done.stderr
    assert (place / "runs/e/metrics.jsonl").read_bytes() == before


def test_force_moves_the_old_run_aside(place: Path) -> None:
    seqkd(place)
    (place / "runs/e/mine.txt").write_text("a user's file")
    assert seqkd(place, "--force").returncode == 0
    (aside,) = (place / "runs").glob("e.bak-*")
    assert (aside / "mine.txt").read_text() == "a user's file"
    assert not (place / "runs/e/mine.txt").exists()


def test_a_folder_with_other_files_only_is_used(place: Path) -> None:
    (place / "runs/e").mkdir(parents=True)
    (place / "runs/e/notes.txt").write_text("mine")
    assert seqkd(place).returncode == 0
    assert (place / "runs/e/notes.txt").read_text() == "mine"


def peak_mb(pid: int) -> float:
    """The most memory a process has held, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def test_a_run_in_progress_keeps_its_folder_to_itself_and_its_parent_small(place: Path) -> None:
    env = {**os.environ, "PYTHONPATH": f"{SOURCE}:{HERE}", "SMALL_WORKER": "steps=1000 sleep=0.1"}
    first = subprocess.Popen([*GAD, *SEQKD], cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: (place / "runs/e/metrics.jsonl").exists(), 20)
        for flag in ("--resume", "--force"):
            done = seqkd(place, flag)
            assert done.returncode == 2 and "using this folder now" in done.stderr, done.stderr
        assert peak_mb(first.pid) <= 120
    finally:
        first.terminate()
        assert first.wait(20) == 143


def test_resume_goes_on_with_the_runs_own_settings(place: Path) -> None:
    assert seqkd(place, "actor.optim.lr=7e-6").returncode == 0
    done = gad(place, "train", "seqkd", "--exp-name", "e", "--resume")
    assert done.returncode == 0, done.stderr
    assert "lr: 7.0e-06" in (place / "runs/e/config.yaml").read_text()
    assert len(json.loads((place / "runs/e/lineage.json").read_text())["starts"]) == 2
    runs = [r for r in map(json.loads, (place / "runs/e/metrics.jsonl").read_text().splitlines()) if r["type"] == "run"]
    assert [r["resumed"] for r in runs] == [False, True]


@pytest.mark.parametrize(
    ("change", "shown"),
    [("trainer.seed=9", "trainer.seed 1 -> 9"), ("data.train_batch_size=4", "data.train_batch_size 8 -> 4")],
)
def test_resuming_with_other_settings_is_4_and_shows_them(place: Path, change: str, shown: str) -> None:
    assert seqkd(place).returncode == 0
    config = (place / "runs/e/config.yaml").read_bytes()
    done = seqkd(place, "--resume", change)
    assert done.returncode == 4 and shown in done.stderr
    assert (place / "runs/e/config.yaml").read_bytes() == config
    forced = seqkd(place, "--resume", "--force", change)
    assert forced.returncode == 0 and shown in forced.stderr


def test_resuming_with_changed_data_is_4(place: Path) -> None:
    assert seqkd(place).returncode == 0
    table = pq.read_table(place / "train.parquet")
    pq.write_table(table.slice(1), place / "train.parquet")
    done = seqkd(place, "--resume")
    assert done.returncode == 4 and "contents of train.parquet have changed" in done.stderr


def test_resuming_what_was_never_begun_is_2(place: Path) -> None:
    done = seqkd(place, "--resume")
    assert done.returncode == 2 and "no run to resume" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["data.train_files=nowhere.parquet"], 3, "nowhere.parquet"),
        (["data.response_key=teacher_respons"], 3, "data.response_key=teacher_response"),
        (["actor.optim.lrr=1"], 2, "actor.optim.lr"),
        (["--model", "./no/such/model"], 2, "no such file or folder"),
        (["data.train_batch_size=64"], 3, "do not fill one batch"),
        (["trainer.nnodes=2"], 2, "--rdzv-endpoint"),
    ],
    ids=["missing file", "missing column", "misspelt key", "missing model", "few rows", "no meeting point"],
)
def test_wrong_input_is_told_in_four_lines_before_anything_is_written(
    place: Path, words: list[str], code: int, says: str
) -> None:
    done = seqkd(place, *words)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert 1 <= len(done.stderr.splitlines()) <= 4
    assert not (place / "runs").exists()


def test_a_folder_that_cannot_be_written_is_2(place: Path) -> None:
    (place / "file").write_text("")
    done = seqkd(place, "trainer.output_dir=file")
    assert done.returncode == 2 and "error:" in done.stderr


def test_a_failing_workers_words_and_code_are_the_commands(place: Path) -> None:
    done = seqkd(place, does="steps=1 code=5")
    assert done.returncode == 5
    assert done.stderr.splitlines()[-2:] == ["error: what went wrong, where", "hint: what=to_do"]


def test_a_lost_worker_is_started_again_as_often_as_allowed(place: Path) -> None:
    done = seqkd(place, "--max-restarts", "2", does="steps=1 silent=7")
    assert done.returncode == 7
    assert done.stderr.count("starting again from the last checkpoint") == 2


def test_stages_in_a_row_feed_each_other_and_finished_ones_are_skipped(place: Path) -> None:
    words = ["run", "--preset", "demo", "--model", "org/student", "--exp-name", "all", "data.train_files=train.parquet",
             "trainer.tensorboard.auto_start=never"]  # fmt: skip
    assert gad(place, *words, "--stages", "seqkd,warmup").returncode == 0
    done = gad(place, *words, "--resume")
    assert done.returncode == 0, done.stderr
    run = place / "runs" / "all"
    state = json.loads((run / "run.json").read_text())
    assert [s["state"] for s in state["stages"]] == ["done", "done", "done"]
    assert done.stderr.count("is done already") == 2
    parents = json.loads((run / "gad" / "lineage.json").read_text())["parents"]
    assert parents["actor"]["run"].endswith("all/warmup") and parents["actor"]["step"] == 2
    assert parents["critic"]["path"].endswith("warmup/global_step_2/critic")
    first = json.loads((run / "warmup" / "lineage.json").read_text())["parents"]
    assert first["actor"]["path"].endswith("seqkd/global_step_2/actor") and "critic" not in first


ROW = ["run", "--preset", "demo", "--model", "org/student", "--exp-name", "r", "data.train_files=train.parquet",
       f"data.train_batch_size={BATCH}"]  # fmt: skip


def test_what_the_last_stage_refuses_is_told_before_the_first_one_runs(place: Path) -> None:
    done = gad(place, *ROW, "rollout.n=1")  # seqkd samples nothing and would run; warmup cannot
    assert done.returncode == 2 and "rollout.n is 1" in done.stderr
    assert not (place / "runs").exists()


def test_a_dry_run_of_a_row_as_json_is_one_list_of_plans(place: Path) -> None:
    done = gad(place, *ROW, "--dry-run", "--json")
    assert [report["run_dir"] for report in json.loads(done.stdout)] == ["runs/r/seqkd", "runs/r/warmup", "runs/r/gad"]


def test_a_model_that_is_a_file_of_another_kind_is_2_before_anything_is_written(place: Path) -> None:
    done = seqkd(place, "--model", "train.parquet")
    assert done.returncode == 2 and "train.parquet: a file that is no .gguf" in done.stderr
    assert not (place / "runs").exists()


def test_quiet_keeps_tensorboards_address_to_itself(place: Path) -> None:
    done = seqkd(place, "--quiet", "trainer.tensorboard.auto_start=always")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_stage_that_fails_stops_the_row_and_is_noted_with_its_reason(place: Path) -> None:
    words = ["run", "--preset", "demo", "--model", "org/student", "--exp-name", "all", "data.train_files=train.parquet"]
    done = gad(place, *words, does="steps=1 code=5")
    assert done.returncode == 5
    stages = json.loads((place / "runs/all/run.json").read_text())["stages"]
    assert [s["state"] for s in stages] == ["failed", "pending", "pending"]
    assert stages[0]["reason"] == "what went wrong, where"
    assert gad(place, *words).returncode == 2  # held; --resume repeats the failed stage
    again = gad(place, *words, "--resume", "trainer.tensorboard.auto_start=never")
    assert again.returncode == 0, again.stderr
