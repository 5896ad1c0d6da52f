"""`gad data`: analyse token lengths, check rows, collect teacher answers, split and look into files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gadcli.cli import data_collect
from gadcli.cli.common import JsonOption, QuietOption, SetOption, overridden, print_json

if TYPE_CHECKING:
    from gadcli.chat.tokenize import ChatTokenizer
    from gadcli.config.schema import GadConfig
    from gadcli.data.audit import CheckSpec
    from gadcli.data.read.findings import Summary
    from gadcli.data.tokens import Limits

app = typer.Typer(help="Analyse, validate, collect and split training data.")

FilesArgument = Annotated[
    list[str], typer.Argument(metavar="FILES...", help="Files (Parquet, Arrow, JSON, CSV), folders or globs.")
]
TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", "-t", metavar="MODEL", help="Model whose tokenizer is used [the preset's student]."),
]
PromptKeyOption = Annotated[
    str | None, typer.Option("--prompt-key", metavar="C", help="Column of the messages [content].")
]
ResponseKeyOption = Annotated[
    str | None, typer.Option("--response-key", metavar="C", help="Column of the teacher's answers [teacher_response].")
]
DataPresetOption = Annotated[
    str | None,
    typer.Option("--preset", "-p", metavar="NAME", help="Preset for student, limits and column names."),
]
StageOption = Annotated[str, typer.Option("--stage", metavar="S", help="Stage of the preset.")]
OutOption = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Output file.")]


def note(text: str, quiet: bool = False) -> None:
    """A message for people: stderr."""
    if not quiet:
        print(text, file=sys.stderr)


def open_tokenizer(model: str | None, cfg: GadConfig, needed_for: str) -> ChatTokenizer:
    """The tokenizer and template of a model folder, .gguf or checkpoint, or else of the configured student; a
    conversion alone imports torch. Raises ConfigError if neither is named."""
    from gadcli.chat.tokenize import ChatTokenizer
    from gadcli.errors import ConfigError

    model = model or cfg.actor.model.path
    if not model:
        raise ConfigError(f"{needed_for} need a tokenizer", "-t MODEL, or a preset that names its student")
    folder = Path(model).expanduser()
    if (folder / "tokenizer.json").is_file():
        return ChatTokenizer.from_folder(folder, cfg.data.template_kwargs)
    from gadcli.checkpoint.resolve_model import resolve_model

    return ChatTokenizer.from_folder(resolve_model(model), cfg.data.template_kwargs)


def pick_keys(cfg: GadConfig, prompt_key: str | None, response_key: str | None) -> tuple[str, str]:
    return prompt_key or cfg.data.prompt_key, response_key or cfg.data.response_key


@app.command("analyze-tokens")
def analyze_tokens(
    files: FilesArgument,
    tokenizer: TokenizerOption = None,
    preset: DataPresetOption = None,
    stage: StageOption = "gad",
    write: Annotated[
        str | None, typer.Option("--write", metavar="PRESET", help="Write the suggested limits to a preset file.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", min=1, help="Batch size used to compute steps per epoch.")
    ] = None,
    prompt_key: PromptKeyOption = None,
    response_key: ResponseKeyOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Token lengths of prompts and answers, suggested limits, and what each limit would cut."""
    from dataclasses import asdict

    from gadcli.dashboard.progress import Progress
    from gadcli.data.lengths import analyse, fit, steps, suggest
    from gadcli.data.report import analysis_lines
    from gadcli.errors import DataError

    cfg = overridden(stage, preset, settings or [])
    tokens = open_tokenizer(tokenizer, cfg, "token lengths")
    with Progress("analyse", quiet) as bar:
        found = analyse(files, pick_keys(cfg, prompt_key, response_key), tokens, bar)
    summary, fields = found.summary, found.fields
    for line in summary.lines():
        note(line, quiet)
    if fields["both"].rows == 0 or summary.file_errors:
        first = next(iter(summary.lines("error")), "no rows").strip()
        raise DataError(f"no lengths of these files: {first}", "gad data check FILES lists every fault")
    suggestion = suggest(fields)
    cost = steps(fields["both"].rows, batch_size or cfg.data.train_batch_size, fields["both"].tokens)
    limits = (cfg.data.max_prompt_length, cfg.data.max_response_length)
    verdicts = fit(fields, *limits, suggestion) if preset else []
    if as_json:
        print_json({
            "files": found.files, "fields": {n: f.to_json() for n, f in fields.items()},
            "tokens": fields["both"].tokens, "rows": {"total": summary.total, "dropped": summary.dropped},
            "findings": dict(summary.counts), "suggestion": asdict(suggestion), "steps": cost,
            "preset": {"name": preset, "stage": stage, "fit": verdicts} if preset else None,
        })  # fmt: skip
    else:
        current = dict(zip(("prompt", "teacher"), limits, strict=True)) if preset else {}
        wanted = {"prompt": suggestion.max_prompt_length, "teacher": suggestion.max_response_length}
        print("\n".join(analysis_lines(found, current, wanted)))
        print("\nsuggestion")
        print("  " + " ".join(f"{key}={value}" for key, value in suggestion.limits().items()))
        print("\n".join(f"  {reason}" for reason in suggestion.reasons))
        print(f"\nat batch {cost['batch_size']}: {cost['steps_per_epoch']:,} steps per epoch, "
              f"{cost['rows_left_over']} rows left over, {cost['tokens_per_step']:,} tokens per step")  # fmt: skip
        if not cost["steps_per_epoch"]:
            print("  ! fewer rows than one batch: training would fail")
        if preset:
            print(f"\npreset {preset}, stage {stage}\n" + "\n".join(f"  {line}" for line in verdicts))
    if write:
        from gadcli.config.write_preset import write_limits

        note(f"wrote the limits to {write_limits(write, suggestion.limits(), base=preset)}", quiet)


@app.command("check")
def check(
    files: FilesArgument,
    tokenizer: TokenizerOption = None,
    preset: DataPresetOption = None,
    stage: StageOption = "gad",
    max_prompt_length: Annotated[
        int | None, typer.Option("--max-prompt-length", metavar="N", min=1, help="Maximum tokens per prompt.")
    ] = None,
    max_response_length: Annotated[
        int | None,
        typer.Option("--max-response-length", metavar="N", min=1, help="Maximum tokens per answer, EOS included."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", metavar="N", min=2, help="Maximum tokens of prompt and answer together."),
    ] = None,
    truncation: Annotated[
        str, typer.Option("--truncation", metavar="HOW", help="Rows over a limit: error, left, right or drop.")
    ] = "error",
    on_bad_row: Annotated[
        str, typer.Option("--on-bad-row", metavar="HOW", help="Invalid rows: error or drop.")
    ] = "error",
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
    val: Annotated[
        list[str] | None, typer.Option("--val", metavar="FILE", help="Held-out files to check for overlap.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Fail if there are fewer valid rows than this.")
    ] = 1,
    findings: Annotated[
        Path | None, typer.Option("--findings", metavar="JSONL", help="Write every finding to this JSONL file.")
    ] = None,
    fix: Annotated[str | None, typer.Option("--fix", metavar="drop|trim", help="Write a cleaned copy to -o.")] = None,
    out: OutOption = None,
    show_mask: Annotated[
        int, typer.Option("--show-mask", metavar="N", min=0, help="Print N rows with their trained tokens marked.")
    ] = 0,
    prompt_key: PromptKeyOption = None,
    response_key: ResponseKeyOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Validate every row; exit code 3 if any is invalid."""
    from dataclasses import replace

    from gadcli.data.audit import CheckSpec, verdict
    from gadcli.data.tokens import Style
    from gadcli.errors import ConfigError

    one_of("--truncation", truncation, ("error", "left", "right", "drop"))
    one_of("--on-bad-row", on_bad_row, ("error", "drop"))
    one_of("--fix", fix, (None, "drop", "trim"))
    given = (max_prompt_length, max_response_length, max_model_len)
    if fix is not None and out is None:
        raise ConfigError("--fix writes a clean copy to a file that -o names", "-o clean.parquet")
    cfg = overridden(stage, preset, settings or [])
    tokens = None
    if tokenizer or cfg.actor.model.path or any(given) or preset or show_mask or fix == "trim":
        tokens = open_tokenizer(tokenizer, cfg, "token limits, --show-mask and --fix trim")
    spec = CheckSpec(
        keys=pick_keys(cfg, prompt_key, response_key),
        tokenizer=tokens,
        style=replace(Style.of(cfg), turns=cfg.data.turns), reads=cfg.critic.reads,
        limits=limits_of(cfg if preset else None, given, truncation),
        strict=strict, on_bad_row=on_bad_row, batch_size=batch_size, fix=fix or "", out=out, val=val or [],
    )  # fmt: skip
    summary = run_check(files, spec, findings, as_json, quiet)
    if show_mask:
        print_masks(files, spec, show_mask)
    if fixed(summary, spec, quiet):
        return
    if error := verdict(summary, spec):
        raise error


def limits_of(cfg: GadConfig | None, given: tuple[int | None, ...], truncation: str) -> Limits | None:
    """The limits given, over a preset's if there is one; what neither names has no limit. None if nothing does."""
    from gadcli.data.tokens import Limits

    if cfg is None and not any(given):
        return None
    preset = (cfg.data.max_prompt_length, cfg.data.max_response_length, cfg.rollout.max_model_len) if cfg else None
    numbers = [g or d for g, d in zip(given, preset or (1 << 62,) * 3, strict=True)]
    return Limits(numbers[0], numbers[1], numbers[2], truncation)


def run_check(files: list[str], spec: CheckSpec, findings: Path | None, as_json: bool, quiet: bool) -> Summary:
    """The pass, with its progress bar, findings file and summary."""
    from contextlib import ExitStack

    from gadcli.dashboard.progress import Progress
    from gadcli.data.audit import audit, summary_json
    from gadcli.data.report import check_lines

    with ExitStack() as stack:
        sink = stack.enter_context(open_findings(findings)) if findings else None
        bar = stack.enter_context(Progress("check", quiet))
        summary = audit(files, spec, sink, bar)
    if as_json:
        print_json(summary_json(summary))
    elif not quiet:
        print("\n".join(check_lines(summary)))
    return summary


def fixed(summary: Summary, spec: CheckSpec, quiet: bool) -> bool:
    """Say what a cleaned copy holds; False if none was written, or if some file could not be read at all."""
    from gadcli.data.writing import dropped_path

    if not spec.fix or spec.out is None or not spec.out.exists():
        return False
    note(f"wrote {spec.out} ({summary.kept + summary.truncated:,} rows, {summary.truncated:,} of them trimmed) and "
         f"{dropped_path(spec.out)} ({summary.dropped - summary.truncated:,} dropped)", quiet)  # fmt: skip
    if summary.left_out:
        note(f"columns not carried over: {', '.join(summary.left_out)}")
    return summary.file_errors == 0


def one_of(flag: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    from gadcli.errors import ConfigError

    if value not in allowed:
        names = [a for a in allowed if a]
        raise ConfigError(f"{flag} is {value!r}; it is one of {', '.join(names)}", f"{flag} {names[0]}")


def open_findings(path: Path) -> Any:
    from gadcli.errors import ConfigError

    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}", "choose another --findings") from None


def print_masks(files: list[str], spec: CheckSpec, n: int) -> None:
    """Rows as the student sees them: given tokens plain, trained ones coloured and parted, EOS visible; what the
    discriminator does not read in double parentheses."""
    import os
    from itertools import groupby

    from gadcli.data.audit import masks

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    green = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    around = {"prompt": ("", ""), "other": ("", ""), "trained": green, "unread": ("((", "))")}
    for mask in masks(files, spec, n):
        print("-" * 40)
        for kind, group in groupby(mask.pieces, key=lambda piece: piece[0]):
            pieces = [text for _, text in group]
            given = kind in ("prompt", "other")
            text = "".join(pieces) if given else "|".join(piece.replace("\n", "\\n") for piece in pieces)
            print(around[kind][0] + text + around[kind][1], end="")
        count = mask.tokens
        print(f"\n-- {count['prompt'] + count['other']} prompt tokens, not trained; "
              f"{count['trained'] + count['unread']} trained, EOS included")  # fmt: skip
        if count["unread"]:
            print(f"-- {count['unread']} of them not read by the discriminator: ((…)), critic.reads=answer")
        for remark in mask.remarks:
            print(f"-- {remark}")


for _function in (data_collect.collect, data_collect.split, data_collect.head):
    app.command(_function.__name__)(_function)
