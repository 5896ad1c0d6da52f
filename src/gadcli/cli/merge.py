"""`gad merge` and `gad cut`: model folders made from checkpoint shards (ours or verl's), and from a larger model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gadcli.cli.common import JsonOption, QuietOption

if TYPE_CHECKING:
    from gadcli.checkpoint.merge.to_huggingface import MergeOptions, MergeReport

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = {
    "fp32": "float32",
    "f32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}
EXIT_TERMINATED = 143
MOST_LAYERS = 10_000


def main(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="global_step_N/actor, global_step_N (both models), or a run's folder (its newest step)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Output folder; must not exist.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            "--hf-model-path",
            metavar="MODEL",
            help="Model to take config and tokenizer from if the checkpoint has none.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="float32, bfloat16, float16 or own (each tensor's). Default: the base's, else own."
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Maximum size of an output file.")
    ] = "5GB",
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip verification of shards, names and bytes.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also load the result with transformers and compare logits (small models).")
    ] = False,
    probe_vllm: Annotated[
        bool, typer.Option("--probe-vllm", help="Also load the result with vLLM and compare greedy text.")
    ] = False,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Write LoRA weights as a peft adapter instead of merging them.")
    ] = False,
    lora_alpha: Annotated[
        float | None,
        typer.Option("--lora-alpha", metavar="A", help="LoRA alpha, if the checkpoint does not record it."),
    ] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Accept DCP shards without gad's manifest.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be written and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
    backend: Annotated[str | None, typer.Option("--backend", help="As in verl's merger: only fsdp.")] = None,
    local_dir: Annotated[Path | None, typer.Option("--local-dir", help="As in verl's merger: CHECKPOINT.")] = None,
    target_dir: Annotated[Path | None, typer.Option("--target-dir", help="As in verl's merger: -o.")] = None,
) -> None:
    """Convert checkpoint shards to Hugging Face safetensors, and verify them.

    Works for gad's checkpoints at any world size and for verl's FSDP1 and FSDP2 rank files. Streams: memory does not
    grow with the model. Nothing appears at DIR unless all of it was written and read back.
    """
    from gadcli.errors import ConfigError

    if backend not in (None, "fsdp"):
        raise ConfigError(f"--backend {backend}: only fsdp checkpoints are read", "use verl's own merger for megatron")
    if checkpoint == Path("merge") and local_dir is not None:
        checkpoint = None  # `python -m verl.model_merger merge --backend fsdp …` with the program alone exchanged
    source, target = _one("CHECKPOINT", checkpoint, local_dir), _one("-o DIR", out, target_dir)
    _end_cleanly_on_sigterm()
    from gadcli.checkpoint.merge.to_huggingface import MergeOptions

    options = MergeOptions(
        base=_base_folder(base), base_name=base or "", dtype=_DTYPES.get(dtype or "", dtype),
        max_shard_bytes=parse_size(max_shard_size), verify=not no_verify, probe=probe, probe_vllm=probe_vllm,
        keep_adapter=keep_adapter,
        trust=trust_checkpoint, lora_alpha=lora_alpha,
    )  # fmt: skip
    started = time.monotonic()
    reports = _merge(source, target, options, dry_run, quiet)
    _print(reports, time.monotonic() - started, dry_run, as_json)


def _merge(source: Path, target: Path, options: MergeOptions, dry_run: bool, quiet: bool) -> list[MergeReport]:
    from gadcli.checkpoint.manifest import human_bytes
    from gadcli.checkpoint.merge.pick import models_in
    from gadcli.checkpoint.merge.to_huggingface import merge_models
    from gadcli.dashboard.progress import Progress

    with Progress("merge", quiet, amount=lambda size: human_bytes(int(size))) as bar:

        def progress(phase: str, done: int, total: int) -> None:
            bar(done, total, phase)

        return merge_models(models_in(source, _say), target, options, dry_run=dry_run, progress=progress)


def _one(what: str, new: Path | None, old: Path | None) -> Path:
    from gadcli.errors import ConfigError

    if (new is None) == (old is None):
        said = "missing" if new is None else "given twice"
        raise ConfigError(f"{what} is {said}", "gad merge runs/NAME/global_step_N/actor -o DIR")
    chosen = new if new is not None else old
    assert chosen is not None
    return chosen


def _base_folder(base: str | None) -> Path | None:
    """The folder of --base; a hub name is looked up (and fetched if need be)."""
    if base is None:
        return None
    from gadcli.checkpoint.resolve_model import resolve_model

    folder = Path(base).expanduser()
    return folder if (folder / "config.json").is_file() else resolve_model(base)


def parse_size(text: str) -> int:
    """'5GB', '500 MB', '2GiB' or a plain number as bytes. Raises ConfigError."""
    from gadcli.errors import ConfigError

    digits = text.strip().rstrip("BbKkMmGgTtIi ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        return int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise ConfigError(f"--max-shard-size {text!r}: not a size", "--max-shard-size 5GB") from error


def _end_cleanly_on_sigterm() -> None:
    """SIGTERM, and SIGHUP of a closed terminal, unwind like Ctrl-C does, so that the temporary folder goes."""
    import signal

    def leave(_signal: int, _frame: Any) -> None:
        raise SystemExit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, leave)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print(reports: list[MergeReport], seconds: float, dry_run: bool, as_json: bool) -> None:
    from gadcli.checkpoint.manifest import human_bytes

    for report in reports:
        for note in report.notes:
            _say(f"note: {report.out.name}: {note}")
    if as_json:
        import json

        rows = [
            {"out": str(r.out), "files": r.files, "tensors": r.tensors, "bytes": r.nbytes, "notes": r.notes,
             "verified": r.verified, "written": not dry_run}
            for r in reports
        ]  # fmt: skip
        print(json.dumps({"models": rows, "seconds": round(seconds, 3)}))
        return
    for report in reports:
        if dry_run:
            print(f"would write {report.out}/")
            for name, size in sorted(report.files.items()):
                print(f"  {human_bytes(size):>10}  {name}")
        else:
            checks = f"; verified: {', '.join(report.verified)}" if report.verified else "; not verified"
            print(f"{report.out}: {report.tensors} tensors, {human_bytes(report.nbytes)} in {seconds:.1f} s{checks}")


def cut(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub name, HF folder, .gguf, global_step_N/actor, or embedded.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Output folder; must not exist.")],
    layers: Annotated[
        int, typer.Option("--layers", "-n", metavar="N", min=0, help="Layers to keep; 0: a quarter of them.")
    ] = 0,
    keep: Annotated[
        str, typer.Option("--keep", metavar="LIST", help="Indices of the layers to keep instead: 0-5,28,29.")
    ] = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a smaller student: chosen layers of a model, as an ordinary model folder.

    Of N layers the first three quarters come from the bottom of the model and the rest from its top, so that the first
    and the last are kept. The student has to be trained (stage seqkd) before its answers make sense.
    """
    from dataclasses import asdict

    from gadcli.checkpoint.cut import cut_model
    from gadcli.checkpoint.resolve_model import resolve_model
    from gadcli.cli.common import print_json
    from gadcli.errors import ConfigError

    if keep and layers:
        raise ConfigError("--layers and --keep both say which layers to keep", "give one of them")
    report = cut_model(resolve_model(model), out, count=layers, keep=parse_layers(keep), name=model)
    if as_json:
        print_json(asdict(report) | {"out": str(out)})
    elif not quiet:
        kept = ", ".join(map(str, report.kept))
        print(
            f"{out}: layers {kept} of {report.layers}; {report.parameters:,} of {report.base_parameters:,} parameters"
        )


def parse_layers(text: str) -> list[int]:
    """`0-5,28,29` as numbers. Raises ConfigError."""
    from gadcli.errors import ConfigError

    found: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < MOST_LAYERS):
            raise ConfigError(f"--keep {text!r}: not layer numbers", "--keep 0-5,28,29")
        found += range(int(first), int(last) + 1)
    return found
