"""`gad run --dry-run`: each stage's plan knows that there is a stage before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gadcli.cli.app import app
from tiny import write_tiny_data, write_tiny_model


@pytest.mark.parametrize("as_json", [False, True])
def test_a_chained_gad_is_not_told_to_run_warmup_first(tmp_path: Path, as_json: bool) -> None:
    model, data = write_tiny_model(tmp_path / "model"), write_tiny_data(tmp_path / "train.parquet")
    words = ["run", "--preset", "demo", "--model", str(model), "--dry-run", f"data.train_files={data}"]
    words += [f"trainer.output_dir={tmp_path / 'runs'}", "critic.model.num_layers=0", "actor.model.train_layers=0"]
    result = CliRunner().invoke(app, words + (["--json"] if as_json else []))
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "run warmup first" not in text
    assert "student that seqkd leaves" in text and "student and discriminator that warmup leaves" in text
    assert "critic_warmup=9 of 9" not in text  # a warm-up is the critic's alone: nothing unusual
    if as_json:
        assert len(json.loads(result.stdout)) == 3
