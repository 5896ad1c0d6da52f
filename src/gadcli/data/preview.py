"""The plan's look at a run's first rows as the worker will see them: template, tokenizer, limits (torch-free).

As a program (`python -m gadcli.data.preview CONFIG.yaml FOLDER`) it prints what `preview` returns, or the error that it
raises, as JSON: for tokenizers that only transformers can read, whose import a parent process does without.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from gadcli.chat.tokenize import ChatTokenizer
from gadcli.config.resolve import dump_yaml, load_resolved
from gadcli.config.schema import GadConfig
from gadcli.data.check import account, failure, open_files, scan_rows
from gadcli.data.read.findings import REASONS, Summary
from gadcli.data.template_check import template_findings
from gadcli.data.tokens import Limits, Style, limit, tokenise
from gadcli.errors import ConfigError, DataError, GadError

ROWS = 256  # of each file
TIMEOUT_S = 300  # of the child, most of which imports
ERRORS: dict[str, type[GadError]] = {kind.__name__: kind for kind in (ConfigError, DataError)}


def preview(cfg: GadConfig, tokens: ChatTokenizer) -> list[str]:
    """What the first rows of each training file show, one line each. Raises what the worker would raise for them."""
    limits = Limits(
        cfg.data.max_prompt_length, cfg.data.max_response_length, cfg.rollout.max_model_len, cfg.data.truncation
    )
    summary = Summary()
    summary.add(template_findings(tokens))
    for info in open_files(cfg.data.train_files, (cfg.data.prompt_key, cfg.data.response_key), summary):
        for batch in islice(scan_rows([info], summary, most_rows=ROWS), 1):
            limit(tokenise(tokens, batch, Style.of(cfg)), limits)
            account(batch, summary)
    error = failure(summary, on_bad_row=cfg.data.on_bad_row, truncation=cfg.data.truncation, strict=cfg.data.strict)
    if error is not None and summary.total:
        raise error
    said = [(reason, found[0]) for reason, found in summary.examples.items() if reason != "read_as"]
    return [f"{f.where()}: {f.message} ({reason}); {REASONS[reason].hint}" for reason, f in said]


def preview_in_a_child(cfg: GadConfig, folder: Path, *, wait: bool) -> list[str]:
    """`preview`, in a process of its own where the tokenizer needs transformers; [] there unless told to `wait` for it,
    since the worker will look soon enough."""
    tokens = ChatTokenizer.without_transformers(folder, cfg.data.template_kwargs)
    if tokens is not None:
        return preview(cfg, tokens)
    if not wait:
        return []
    with tempfile.TemporaryDirectory(prefix="gad-plan-") as name:
        config = Path(name) / "config.yaml"
        config.write_text(dump_yaml(cfg, {}), encoding="utf-8")
        command = [sys.executable, "-m", "gadcli.data.preview", str(config), str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
            found = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            return [f"the first rows were not looked at: no answer within {TIMEOUT_S} s"]
        except (ValueError, IndexError):
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return [f"the first rows could not be looked at: {last[:160]}"]
    if "error" in found:
        raise ERRORS[found["error"]](found["message"], found["hint"])
    return list(found["notes"])


def main() -> None:
    """The child's side."""
    try:
        cfg = load_resolved(Path(sys.argv[1]))
        tokens = ChatTokenizer.from_folder(sys.argv[2], cfg.data.template_kwargs)
        print(json.dumps({"notes": preview(cfg, tokens)}))
    except (ConfigError, DataError) as error:
        print(json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}))


if __name__ == "__main__":
    main()
