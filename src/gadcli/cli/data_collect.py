"""`gad data collect`, `split` and `head`: making data files and looking into them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gadcli.cli.common import JsonOption, QuietOption, print_json

if TYPE_CHECKING:
    from gadcli.endpoint.ask import Tally
    from gadcli.endpoint.collect import CollectSpec

EXTRA_BODY_EXAMPLE = """--extra-body '{"chat_template_kwargs": {"enable_thinking": false}}'"""

# What decides a local model's answers where nothing else is said (an endpoint has its own defaults).
LOCAL_PARAMS = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 512, "seed": 1}

PromptsArgument = Annotated[
    list[str], typer.Argument(metavar="PROMPTS...", help="Parquet or JSONL files with messages or plain text.")
]
FilesArgument = Annotated[
    list[str], typer.Argument(metavar="FILES...", help="Parquet or JSONL files, folders or globs.")
]
PromptKeyOption = Annotated[str, typer.Option("--prompt-key", metavar="C", help="Column of the messages.")]
ResponseKeyOption = Annotated[str, typer.Option("--response-key", metavar="C", help="Column of the teacher's answers.")]


def collect(
    prompts: PromptsArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Output Parquet file; a resume log is kept next to it.")
    ],
    model: Annotated[
        str,
        typer.Option("--model", "-m", metavar="M", help="Model name at the endpoint, or without one a local model."),
    ],
    endpoint: Annotated[
        str, typer.Option("--endpoint", metavar="URL", help="Base URL, such as http://127.0.0.1:8000/v1.")
    ] = "",
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="System prompt for prompts without one.")
    ] = "",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Maximum tokens per answer.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="X", min=0, max=2, help="Sampling temperature.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="X", min=0, max=1, help="Top-p (nucleus) probability mass.")
    ] = None,
    extra_body: Annotated[
        str, typer.Option("--extra-body", metavar="JSON", help="Extra fields for every request, as a JSON object.")
    ] = "",
    n: Annotated[int, typer.Option("--n", min=1, metavar="N", help="Answers per prompt, one row each.")] = 1,
    concurrency: Annotated[
        int, typer.Option("--concurrency", metavar="N", min=1, max=1024, help="Parallel requests.")
    ] = 16,
    retries: Annotated[
        int, typer.Option("--retries", metavar="N", min=0, max=20, help="Retries per request, with backoff.")
    ] = 6,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="X", min=1, help="Timeout per answer, in seconds.")
    ] = 300.0,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=0, help="Only the first N prompts; 0: all.")] = 0,
    exclude: Annotated[
        str, typer.Option("--exclude", metavar="LIST", help="Statuses to leave out: refused,truncated or none.")
    ] = ("refused,truncated"),
    price_in: Annotated[
        float, typer.Option("--price-in", metavar="X", min=0, help="Price per million prompt tokens, to show the cost.")
    ] = 0.0,
    price_out: Annotated[
        float, typer.Option("--price-out", metavar="X", min=0, help="Price per million answer tokens.")
    ] = 0.0,
    budget: Annotated[
        float,
        typer.Option(
            "--budget", metavar="X", min=0, help="Stop before the answers in the file cost more; 0: no limit."
        ),
    ] = 0.0,
    key_env: Annotated[
        str, typer.Option("--key-env", metavar="VAR", help="Environment variable that holds the API key.")
    ] = "OPENAI_API_KEY",
    engine: Annotated[str, typer.Option("--engine", metavar="E", help="Local model: vllm, hf or auto.")] = "auto",
    device: Annotated[str, typer.Option("--device", metavar="D", help="Local model: cuda, cpu or auto.")] = "auto",
    prompt_key: PromptKeyOption = "content",
    response_key: ResponseKeyOption = "teacher_response",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Collect teacher answers from an OpenAI-compatible API, or from a local model (hub name, HF folder, .gguf, …).

    Rerun to resume: no answer is paid for, or sampled, twice.
    """
    from gadcli.dashboard.progress import Progress
    from gadcli.endpoint.ask import Price
    from gadcli.endpoint.client import ChatEndpoint
    from gadcli.endpoint.collect import CollectSpec
    from gadcli.endpoint.collect import collect as run_collect
    from gadcli.endpoint.reply import STATUSES
    from gadcli.errors import ConfigError
    from gadcli.evaluate.local_teacher import LocalTeacher

    left_out = tuple(s for s in exclude.replace(" ", "").split(",") if s and s != "none")
    if unknown := [s for s in left_out if s not in STATUSES[1:3]]:
        raise ConfigError(f"--exclude {unknown[0]!r}: takes refused, truncated or none", "--exclude refused")
    if budget and not (price_in or price_out):
        raise ConfigError("--budget needs prices", "--price-in and --price-out, per million tokens")
    if n > 1 and temperature == 0:
        raise ConfigError(f"--n {n} at temperature 0 would pay for {n} equal answers", "--temperature 1")
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    params = {k: v for k, v in given.items() if v is not None} | _extra_fields(extra_body)
    chat: ChatEndpoint | LocalTeacher
    if endpoint:
        chat = ChatEndpoint(
            endpoint, model, os.environ.get(key_env, ""), key_env, params, retries=retries, timeout_s=timeout
        )
    elif extra_body or budget or price_in or price_out:
        raise ConfigError("--extra-body, prices and --budget are an endpoint's", "give --endpoint, or leave them out")
    else:
        chat = LocalTeacher(model, {**LOCAL_PARAMS, **params}, engine, device)
    spec = CollectSpec(
        prompts, out, chat, prompt_key, response_key, system, samples=n, concurrency=concurrency, limit=limit,
        exclude=left_out, price=Price(price_in, price_out, budget),
    )  # fmt: skip
    try:
        with Progress("collect", quiet) as bar:
            tally = run_collect(spec, lambda tally: bar(tally.done, tally.total, text=tally.line(spec.price)))
    except KeyboardInterrupt:
        print(f"\n{spec.journal} keeps the answers so far; run the same command to resume", file=sys.stderr)
        raise
    if as_json:
        print_json(_result(tally, spec))
    elif not quiet:
        _print_result(tally, spec, exclude)


def _extra_fields(text: str) -> dict[str, Any]:
    """The object of --extra-body. Raises ConfigError for anything else, and for fields that have other options."""
    from gadcli.errors import ConfigError

    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}", EXTRA_BODY_EXAMPLE) from None
    if not isinstance(fields, dict):
        raise ConfigError("--extra-body is not a JSON object", EXTRA_BODY_EXAMPLE)
    if taken := [name for name in ("model", "messages", "n") if name in fields]:
        raise ConfigError(f"--extra-body sets {taken[0]}, which gad sets itself", f"see --{taken[0]} or PROMPTS")
    return fields


def _result(tally: Tally, spec: CollectSpec) -> dict[str, Any]:
    """The shape of --json."""
    from dataclasses import asdict

    result = asdict(tally)
    for name in ("started", "last_failure", "failed_in_a_row", "stopped"):
        del result[name]
    cost = spec.price.of(tally.tokens_in, tally.tokens_out)
    return {**result, "counts": dict(tally.counts), "oddities": dict(tally.oddities), "out": str(spec.out),
            "cost": cost}  # fmt: skip


def _print_result(tally: Tally, spec: CollectSpec, exclude: str) -> None:
    print(f"{spec.out}: {tally.total:,} prompts, {tally.reused:,} answered before; now {tally.line(spec.price)}")
    if tally.over_budget:
        print(f"stopped at the budget of {spec.price.budget:g}: {tally.total - tally.done:,} not asked, "
              f"{tally.spent:.4f} spent on this file; a larger --budget continues")  # fmt: skip
    if excluded := sum(tally.counts[s] for s in spec.exclude):
        print(f"{excluded:,} of the new answers left out ({exclude})")
    for status, meaning in (("empty", "without any text"), ("tool_call", "that call a tool"), ("rejected", "rejected")):
        if tally.counts[status]:
            print(f"{tally.counts[status]:,} {meaning}, left out")
    for what, count in tally.oddities.items():
        print(f"note: {count:,} answers {what}")
    if tally.repeated or tally.bad_prompts:
        print(f"{tally.repeated:,} repeated prompts asked once, {tally.bad_prompts:,} rows without a usable prompt")


def split(
    files: FilesArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Output folder for train.parquet, val.parquet …")
    ],
    val: Annotated[
        float, typer.Option("--val", metavar="X", min=0, help="Validation share (0.02) or number of prompts (200).")
    ] = 0.02,
    test: Annotated[float, typer.Option("--test", metavar="X", min=0, help="Test share or number of prompts.")] = 0.0,
    prompt_key: PromptKeyOption = "content",
    response_key: ResponseKeyOption = "teacher_response",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Split by prompt hash: deterministic, and equal prompts stay in one part."""
    from gadcli.dashboard.progress import Progress
    from gadcli.data.split import split as run_split
    from gadcli.errors import ConfigError

    shares = {name: share for name, share in (("val", val), ("test", test)) if share > 0}
    if not shares or sum(s for s in shares.values() if s < 1) >= 1:
        raise ConfigError("the held-out parts must leave something to train on", "--val 0.02")
    with Progress("split", quiet) as bar:
        counts, left_out = run_split(files, (prompt_key, response_key), shares, out, bar)
    if left_out:
        print(f"columns not carried over: {', '.join(left_out)}", file=sys.stderr)
    if as_json:
        print_json({name: {"rows": rows, "file": str(out / f"{name}.parquet")} for name, rows in counts.items()})
    elif not quiet:
        print("\n".join(f"{rows:>10,}  {out / name}.parquet" for name, rows in counts.items()))


def head(
    files: FilesArgument,
    n: Annotated[int, typer.Option("--rows", "-n", metavar="N", min=1, help="Number of rows.")] = 5,
    prompt_key: PromptKeyOption = "content",
    response_key: ResponseKeyOption = "teacher_response",
    as_json: JsonOption = False,
) -> None:
    """Print the first rows as training reads them, whatever their encoding."""
    from gadcli.data.check import open_files, scan_rows
    from gadcli.data.read.findings import Summary
    from gadcli.errors import DataError

    keys, summary, shown = (prompt_key, response_key), Summary(), 0
    infos = open_files(files, keys, summary)
    for batch in scan_rows(infos, summary, most_rows=max(n, 16)):
        rows = dict(enumerate(batch.rows))
        faults = {(f.row or 0) - batch.first_row: f.message for f in batch.findings}
        for i in range(min(len(batch), n - shown)):
            row = rows.get(i)
            if as_json:
                entry = {"file": batch.file, "row": batch.first_row + i, "fault": faults.get(i)}
                if row is not None:
                    entry |= {"messages": row.messages, "teacher": row.teacher}

                print(json.dumps(entry, ensure_ascii=False))
                continue
            print(f"-- {batch.file} row {batch.first_row + i}" + ("" if row else f": BAD, {faults.get(i)}"))
            for message in row.messages if row else []:
                print(f"{message['role']}: {message['content']}")
            if row:
                print(f"teacher: {row.teacher}")
        shown += min(len(batch), n - shown)
        if shown >= n:
            break
    if summary.file_errors:
        raise DataError(summary.lines("error")[0].strip(), "gad data check FILES lists every fault")
