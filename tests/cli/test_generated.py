"""Generated pages and completions: current, valid shell, and offering what the program takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ASK_BASH = (
    'source completions/gad.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _gad; printf "%s\\n" "${COMPREPLY[@]}"'
)


def complete(*words: str) -> list[str]:
    command = ["bash", "-c", ASK_BASH, "bash", "gad", *words]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=30).stdout.split()


def test_bash_offers_commands_flags_presets_and_keys() -> None:
    assert "preset" in complete("pre")
    assert set(complete("preset", "")) >= {"list", "show", "diff", "--help"}
    assert set(complete("preset", "show", "--stage", "")) == {"seqkd", "warmup", "gad"}
    assert "--json" in complete("doctor", "--j")
    assert complete("preset", "show", "demo", "rollout.temp") == ["rollout.temperature="]


@pytest.mark.parametrize(("shell", "file"), [("bash", "gad.bash"), ("zsh", "_gad"), ("fish", "gad.fish")])
def test_completions_parse_in_their_shell(shell: str, file: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    subprocess.run([shell, "-n", str(REPO / "completions" / file)], check=True, timeout=30)


def test_a_stale_page_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "repo"
    for folder in ("docs", "completions", "presets", "src"):
        shutil.copytree(REPO / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    check = [sys.executable, "docs/generate.py"]
    environment = {"PYTHONPATH": str(copy / "src"), "PATH": "/usr/bin:/bin"}
    subprocess.run(check, cwd=copy, env=environment, check=True, capture_output=True, timeout=60)
    (copy / "completions" / "gad.bash").write_text("# old\n")
    done = subprocess.run([*check, "--check"], cwd=copy, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "completions/gad.bash" in done.stderr
