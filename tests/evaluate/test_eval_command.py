"""`gad eval` from the command line to its files, on a tiny model with the transformers sampler."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForTokenClassification, AutoTokenizer

from evaluate.judge_server import JudgeServer
from gadcli.cli import app
from tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def critic(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a scalar head, as a run's critic is merged."""
    folder = tmp_path_factory.mktemp("critic")
    AutoModelForTokenClassification.from_pretrained(model, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"content": [{"role": "user", "content": f"What does number {i} do?"}], "teacher_response": f"It returns {i}."}
        for i in range(12)
    ]
    path = tmp_path / "held_out.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.slow
def test_a_model_is_scored_at_two_temperatures_and_written_out(
    model: Path,
    critic: Path,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GAD_CACHE", str(tmp_path / "cache"))
    html, samples = tmp_path / "out" / "report.html", tmp_path / "out" / "samples.jsonl"
    words = ["eval", str(model), "--data", str(data), "-t", "0", "-t", "1", "--n", "2", "--max-response-length", "12"]
    words += ["--max-prompt-length", "100", "--engine", "hf", "--device", "cpu", "--html", str(html)]
    words += ["--discriminator", str(critic), "--samples", str(samples)]
    assert app.run([*words, "--json"]) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    greedy, sampled = report["models"]
    assert (greedy["temperature"], greedy["answers"], greedy["prompts"]) == (0.0, 12, 12)
    assert (sampled["temperature"], sampled["answers"], sampled["prompts"]) == (1.0, 24, 12)
    assert 0.0 <= sampled["metrics"]["val/rouge_l"] <= 1.0
    assert sampled["metrics"]["val/fresh_accuracy"] > 0.5  # random weights: anyone can tell
    assert 0.0 <= sampled["metrics"]["val/d_acc"] <= 1.0
    assert "answers: 36 of 36" in err
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(records) == 36
    assert all(1 <= record["student_length"] <= 12 for record in records)
    pairs = {
        r["row"]: [x["student"] for x in records if x["row"] == r["row"] and x["temperature"] == 1] for r in records
    }
    assert any(one != two for one, two in pairs.values())  # two draws of a prompt differ
    assert html.read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_two_models_are_compared_prompt_by_prompt_and_judged(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GAD_JUDGE_API_KEY", "sk-never-shown")
    judge = JudgeServer()
    judge.reply = lambda a, b: "[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "[[C]]"
    words = ["eval", str(model), "--against", str(model), "--data", str(data), "-t", "1", "--max-response-length", "8"]
    words += ["--max-prompt-length", "100", "--engine", "hf", "--device", "cpu", "--no-fresh", "--quiet"]
    words += ["--judge-endpoint", judge.url, "--judge-model", "j", "--judge-cache", str(tmp_path / "verdicts.jsonl")]
    assert app.run(words) == 0
    judge.close()
    out, err = capfd.readouterr()
    # The same weights and seeds on both sides: the same answers, so no difference and nothing but ties.
    assert "val/rouge_l +0.000 [+0.000, +0.000] no difference shown" in out
    assert "0 wins, 12 ties, 0 losses of 12 pairs" in out
    assert len(judge.requests) == 12  # both orders of a pair of equal answers are one question
    assert "sk-never-shown" not in out + err


@pytest.mark.slow
def test_a_judge_that_fails_leaves_the_answers_and_the_report(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAD_CACHE", str(tmp_path / "cache"))
    judge = JudgeServer()
    judge.failures = [401] * 100
    words = ["eval", str(model), "--data", str(data), "--max-response-length", "8", "--max-prompt-length", "100"]
    words += ["--engine", "hf", "--device", "cpu", "--no-fresh", "--quiet", "--html", str(tmp_path / "report.html")]
    words += ["--judge-endpoint", judge.url, "--judge-model", "j", "--judge-cache", str(tmp_path / "verdicts.jsonl")]
    assert app.run(words) == 3
    judge.close()
    out, err = capfd.readouterr()
    assert "401" in err
    assert "val/rouge_l" in out
    assert (tmp_path / "report.html").exists()
    assert len((tmp_path / "verdicts.answers.jsonl").read_text().splitlines()) == 12


def test_a_missing_file_is_a_data_error(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(model), "--data", str(tmp_path / "no.parquet"), "--engine", "hf", "--device", "cpu", "--quiet"]
    assert app.run(words) == 3
    assert "no.parquet" in capfd.readouterr().err


@pytest.mark.slow
def test_a_model_without_a_scalar_head_is_no_discriminator(
    model: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(model), "--data", str(data), "--engine", "hf", "--device", "cpu", "--quiet"]
    assert app.run([*words, "--max-prompt-length", "100", "--discriminator", str(model)]) == 2
    assert "no scalar head" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--discriminator-values", "mean"], "last or all"),
        (["--engine", "tgi"], "--engine is tgi"),
        (["-t", "-1"], "outside 0 to 10"),
        (["--judge-endpoint", "https://host/v1"], "without --judge-model"),
        (["--judge-endpoint", "host/v1", "--judge-model", "j"], "not an http"),
    ],
)
def test_wrong_options_are_usage_errors_before_anything_starts(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["eval", "model", "--data", "rows.parquet", *words]) == 2
    assert said in capfd.readouterr().err
