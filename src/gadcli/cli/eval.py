"""`gad eval`: a model's answers to held-out rows beside the teacher's, and beside another model's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gadcli.cli.common import JsonOption, QuietOption, overridden

if TYPE_CHECKING:
    from gadcli.dashboard.progress import Progress
    from gadcli.endpoint.client import ChatEndpoint
    from gadcli.evaluate.answers import AnswerRequest, AnswerSet
    from gadcli.evaluate.report import Report

MODEL_HELP = "Model: hub name, HF folder, .gguf, or a run's global_step_N/actor."


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    data: Annotated[list[str], typer.Option("--data", "-d", metavar="FILE", help="Held-out rows; repeatable.")],
    against: Annotated[
        str | None, typer.Option(metavar="M2", help="Second model to compare with on the same prompts.")
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option("--temperature", "-t", metavar="T", help="Sampling temperature; 0: greedy; repeatable. [0]"),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, metavar="N", help="Answers per prompt (1 if greedy).")] = 1,
    rows: Annotated[int, typer.Option(min=0, metavar="N", help="Number of rows, chosen by hash; 0: all.")] = 0,
    max_prompt_length: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum tokens per prompt; longer rows are dropped.")
    ] = 1024,
    max_response_length: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum tokens per answer.")] = 256,
    prompt_key: Annotated[str, typer.Option(metavar="KEY", help="Column of the messages.")] = "content",
    response_key: Annotated[
        str, typer.Option(metavar="KEY", help="Column of the teacher's answers.")
    ] = "teacher_response",
    engine: Annotated[str, typer.Option(metavar="E", help="Sampler: auto, vllm or hf.")] = "auto",
    device: Annotated[str, typer.Option(metavar="D", help="Device: auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed for sampling and the fresh discriminator.")] = 1,
    fresh: Annotated[
        bool, typer.Option("--fresh/--no-fresh", help="Train a new discriminator on these answers.")
    ] = True,
    discriminator: Annotated[
        str, typer.Option(metavar="R", help="Also score with a trained discriminator: global_step_N/critic.")
    ] = "",
    discriminator_values: Annotated[
        str, typer.Option(metavar="V", help="critic.values of its run: last or all.")
    ] = "last",
    reads: Annotated[
        str, typer.Option(metavar="V", help="Its run's critic.reads: all or answer (lengths count the same).")
    ] = "all",
    template_kwargs: Annotated[
        str, typer.Option(metavar="YAML", help="Variables for the chat template: '{enable_thinking: false}'.")
    ] = "{}",
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-endpoint",
            metavar="URL",
            help="OpenAI-compatible judge: https://host/v1; key in GAD_JUDGE_API_KEY.",
        ),
    ] = None,
    judge_model: Annotated[str, typer.Option(metavar="NAME", help="Model name of the judge.")] = "",
    judge_cache: Annotated[
        Path, typer.Option(metavar="FILE", help="File that keeps the judge's replies, so that none is paid for twice.")
    ] = Path("gad-judge.jsonl"),
    judge_max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum tokens of a judge's reply, its reasoning included.")
    ] = 2048,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML report.")] = None,
    samples: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every answer as JSONL.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Evaluate a model on held-out rows: overlap, lengths, a new discriminator and, if given, a judge."""
    from gadcli.dashboard.progress import Progress
    from gadcli.data.read.choose import choose_files
    from gadcli.errors import ConfigError
    from gadcli.evaluate.answers import AnswerRequest

    temperatures = tuple(dict.fromkeys(temperature or [0.0]))
    _check(engine, device, temperatures, judge_url, judge_model, discriminator_values)
    if reads not in ("all", "answer"):
        raise ConfigError(f"--reads is {reads}", "all or answer, as the run's critic.reads")
    judge = None
    if judge_url:
        from gadcli.evaluate.judge import judge_endpoint

        judge = judge_endpoint(judge_url, judge_model, judge_max_tokens)
    chosen = choose_files(data, "val")  # a misspelt file should not wait for a model to load
    for place, note in chosen.notes:
        print(f"{place}: {note}", file=sys.stderr)
    request = AnswerRequest(
        model=model, files=tuple(chosen.files), temperatures=temperatures, n=n, rows=rows,
        max_prompt_length=max_prompt_length, max_response_length=max_response_length, prompt_key=prompt_key,
        response_key=response_key, engine=engine, device=device, seed=seed, discriminator=discriminator,
        discriminator_values=discriminator_values, reads=reads,
        template_kwargs=overridden("gad", None, [f"data.template_kwargs={template_kwargs}"]).data.template_kwargs,
    )  # fmt: skip
    with Progress("answers", quiet, last=True) as bar:
        sets = _draw(request, against, bar)
    # On disk before anything else may fail: sampling them is the dear part.
    samples = samples or (judge_cache.with_suffix(".answers.jsonl") if judge else None)
    if samples:
        _write_samples(sets, samples)
    report = _report(request, sets, fresh)
    try:
        if judge:
            with Progress("verdicts", quiet, last=True) as bar:
                report.judge = _judge(sets, against, judge, judge_cache, bar)
    finally:  # a judge that fails takes nothing with it
        if html:
            _write_html(report, sets, html)
        _print(report, as_json)


def _check(
    engine: str,
    device: str,
    temperatures: tuple[float, ...],
    judge_url: str | None,
    judge_model: str,
    discriminator_values: str,
) -> None:
    from gadcli.errors import ConfigError

    if engine not in ("auto", "vllm", "hf"):
        raise ConfigError(f"--engine is {engine}", "auto, vllm or hf")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device is {device}", "auto, cpu or cuda")
    if discriminator_values not in ("last", "all"):
        raise ConfigError(
            f"--discriminator-values is {discriminator_values}", "last or all, as the run's critic.values"
        )
    if any(not 0.0 <= temperature <= 10.0 for temperature in temperatures):
        raise ConfigError("--temperature is outside 0 to 10", "0 is greedy")
    if judge_url and not judge_model:
        raise ConfigError("--judge-endpoint without --judge-model", "name the model that judges")


def _draw(request: AnswerRequest, against: str | None, progress: Progress) -> list[AnswerSet]:
    """The model's answer sets, then the second model's."""
    from dataclasses import replace

    from gadcli.evaluate.answers import draw_answers

    sets = draw_answers(request, progress)
    return sets + (draw_answers(replace(request, model=against), progress) if against else [])


def _report(request: AnswerRequest, sets: list[AnswerSet], fresh: bool) -> Report:
    from gadcli.evaluate.report import Report, differences, model_report

    report = Report(list(request.files), [model_report(found, fresh, request.seed) for found in sets])
    count = len(request.temperatures)
    for one, two in zip(sets[:count], sets[count:], strict=False):
        report.differences += differences(one, two, request.seed)
    return report


def _judge(
    sets: list[AnswerSet], against: str | None, endpoint: ChatEndpoint, cache: Path,
    progress: Progress,
) -> dict[str, float | str | None]:  # fmt: skip
    """The first temperature's answers against the second model's, or else the teacher's."""
    from gadcli.evaluate.judge import Pair, judge

    ours = sets[0].first_draws()
    others = sets[len(sets) // 2].first_draws() if against else ours
    pairs = [
        Pair(sample.prompt, sample.student, others[row].student if against else sample.teacher)
        for row, sample in sorted(ours.items())
    ]
    result = judge(pairs, endpoint, cache, progress=progress)
    return {**result.to_json(), "against": against or "the teacher"}


def _write_html(report: Report, sets: list[AnswerSet], path: Path) -> None:
    from gadcli.evaluate.html import html_report

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html_report(report, sets), encoding="utf-8")


def _write_samples(sets: list[AnswerSet], path: Path) -> None:
    """Every answer, one JSON object per line."""
    import json
    from dataclasses import asdict

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for found in sets:
            for row, sample in zip(found.row_ids, found.samples, strict=True):
                record = {"model": found.model, "temperature": found.temperature, "row": row, **asdict(sample)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _print(report: Report, as_json: bool) -> None:
    from gadcli.cli.common import print_json
    from gadcli.evaluate.report import render

    if as_json:
        print_json(report.to_json())
    else:
        print("\n".join(render(report)))
