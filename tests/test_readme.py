"""Every `gad` command of README runs as written, on stand-ins: a tiny model, 300 rows, runs of one step.

What would train for days is run with --dry-run (its plan must come out); everything else runs for real.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import write_tiny_data, write_tiny_model
from train.training import environment, prepare, train

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
DOCS = [page for page in PAGES if "```bash" in page.read_text() and page.name != "cli.md"]  # that one is generated
PLAN_ONLY = ("train", "run")  # subcommands that would train
STAND_INS = {"Qwen/Qwen3-8B": "model", "BASE": "model"}
ELSEWHERE = (
    "make",
    "pip",
    "vllm",
    "srun",
    "source",
    "python",
    "PYTHONPATH=gguf-converter",
)  # what other tests or no test can run


def documented() -> list[str]:
    """Command lines of the documents' bash blocks, without comments."""
    lines = []
    for path in DOCS:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.S):
            lines += [line.split("  #")[0].split(" #")[0].strip() for line in block.splitlines() if line.strip()]
    return list(dict.fromkeys(lines))  # the Chinese README repeats the English one's


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as README's reader has it: answers.parquet, and runs that its commands refer to."""
    folder = tmp_path_factory.mktemp("readme")
    write_tiny_model(folder / "model")
    config = folder / "model" / "config.json"  # the 8B preset wants room for 2,048 tokens
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    write_tiny_data(folder / "answers.parquet", 300)
    for name in ("train.parquet", "val.parquet"):
        shutil.copy(folder / "answers.parquet", folder / name)
    (folder / "runs").mkdir()
    run = prepare(folder / "runs" / "s2", folder, "warmup", "trainer.total_steps=1", "data.val_rows=4")
    train(run)
    shutil.copytree(run, folder / "runs" / "s1")
    (folder / "runs" / "mine").mkdir()
    shutil.copytree(run, folder / "runs" / "mine" / "gad")
    for stand_in in ("checkpoints/exp/global_step_1", "CKPT"):
        shutil.copytree(run / "global_step_1", folder / stand_in)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_command_is_known_to_this_test() -> None:
    commands = documented()
    assert len(commands) > 12
    assert {shlex.split(line)[0] for line in commands} <= {"gad", *ELSEWHERE}


def test_what_the_readme_serves_is_what_its_merge_writes() -> None:
    merge, serve = (
        next(line for line in documented() if line.startswith(start)) for start in ("gad merge", "vllm serve")
    )
    assert shlex.split(serve)[2] == f"{shlex.split(merge)[-1]}/actor"  # a run holds actor and critic


@pytest.mark.parametrize("line", [line for line in documented() if line.startswith("gad ")])
def test_a_documented_command_runs(line: str, workplace: Path) -> None:
    words = [STAND_INS.get(word, word).replace("global_step_500", "global_step_1") for word in shlex.split(line)[1:]]
    for target in ("student", "out", "DIR"):  # an earlier line's: no merge writes over one
        shutil.rmtree(workplace / target, ignore_errors=True)
    if words[0] in PLAN_ONLY:  # elsewhere: the folders it would write are there already, for the other commands
        words += ["--output-dir", "elsewhere"] + ([] if "--dry-run" in words else ["--dry-run"])
    if words[0] == "monitor":
        words.append("--once")
    env = environment() | {"GAD_CACHE": str(workplace / "cache"), "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [sys.executable, "-m", "gadcli", *words], cwd=workplace, env=env, capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    if words[0] == "merge":
        assert list(workplace.glob(f"{words[words.index('-o') + 1] if '-o' in words else 'DIR'}/**/config.json"))
    if "--dry-run" in words:
        assert "plan:" in done.stdout
