"""The `gad` command: the table of commands, loaded when called, and the only error boundary.

How a command gets here (COMMANDS below): its name maps to `"module:attribute"` under `gadcli.cli`, where the
attribute is either a `typer.Typer` (a group, or a single command) or a plain function with typer annotations.
- The module is imported when the command runs, not for `gad -h`, so its help line stands in the table.
- A command whose module does not exist is not registered.
- At import time a command's module knows typer and the standard library; torch, transformers, vllm, omegaconf,
  pyarrow and rich are imported inside the functions.
- Functions return None or an exit code, print data on stdout and messages on stderr, and raise `GadError`
  (message, hint) for what the user can mend. Nobody below this file catches it to print it.
- Flags are spelled once, with hyphens (`--exp-name`); underscores are taken as hyphens by the parser.
- Shared options (`--preset`, `--dry-run`, KEY=VALUE words …) are in `common.py`.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gadcli.errors import ExitCode, GadError, ResourceError, is_full_disk

MAX_ERROR_LINES = 4
TYPER_COMPLETION = ("install_completion", "show_completion")  # options that a group's own Typer adds by default
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE


@dataclass(frozen=True)
class Entry:
    """One command: its section in `gad -h`, where it lives, and its help line."""

    section: str
    target: str
    help: str


COMMANDS: dict[str, Entry] = {
    "demo": Entry(
        "Start here", "demo:main", "Train all three stages on the embedded default; print a before/after table."
    ),
    "doctor": Entry("Start here", "doctor:main", "Check devices, engines, package versions, memory and disk."),
    "data": Entry("Prepare", "data:app", "Analyse, validate, collect and split training data."),
    "cut": Entry("Prepare", "merge:cut", "Make a smaller student from some layers of a model."),
    "preset": Entry("Prepare", "preset:app", "List, show and diff presets."),
    "train": Entry("Train", "train:app", "Run one stage: seqkd, warmup or gad."),
    "run": Entry("Train", "train:run", "Run all stages in order; each starts from the previous one's result."),
    "arena": Entry("Train", "demo:arena", "Compare training methods from one start on equal terms."),
    "monitor": Entry("Watch", "monitor:monitor", "Live dashboard of a running or finished run."),
    "why": Entry("Watch", "monitor:why", "Diagnose a run: symptoms, evidence, cause, and the override that fixes it."),
    "samples": Entry("Watch", "monitor:samples", "Show stored samples with their discriminator scores."),
    "compare": Entry("Watch", "monitor:compare", "Compare the settings and metrics of runs."),
    "merge": Entry("Use", "merge:main", "Convert checkpoint shards to Hugging Face safetensors, and verify them."),
    "eval": Entry("Use", "eval:main", "Evaluate a model on held-out rows."),
    "losslab": Entry("Use", "losslab:app", "Compare the discriminator losses on stored or synthetic scores."),
}


def exists(entry: Entry) -> bool:
    """Whether the command's module is there (found, not imported)."""
    return importlib.util.find_spec(f"gadcli.cli.{entry.target.partition(':')[0]}") is not None


def load(name: str) -> TyperCommand | TyperGroup:
    """Import a command's module and build the command."""
    entry = COMMANDS[name]
    module_name, _, attribute = entry.target.partition(":")
    target: typer.Typer | Callable[..., Any] = getattr(importlib.import_module(f"gadcli.cli.{module_name}"), attribute)
    if not isinstance(target, typer.Typer):
        single = new_typer()
        single.command(name)(target)
        target = single
    command: Any = typer.main.get_command(target)
    command.name = name
    force_plain(command)
    return command


def new_typer(**settings: Any) -> typer.Typer:
    """A Typer with the settings all of ours share: `-h`, plain help, no completion installer."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **settings)


def force_plain(command: Any) -> None:
    """Plain help for a whole subtree, however its Typer was made: rich's help costs 0.1 s and breaks in pipes."""
    command.rich_markup_mode = None
    if isinstance(command, TyperGroup) and not command.invoke_without_command:
        command.no_args_is_help = True
    command.params = [param for param in command.params if param.name not in TYPER_COMPLETION]
    for child in getattr(command, "commands", {}).values():
        force_plain(child)


class LazyGroup(TyperGroup):
    """The root: knows every command's name and help line, imports one only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name, entry in COMMANDS.items() if exists(entry)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        return load(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        self.commands = {name: TyperCommand(name) for name in self.list_commands(ctx)}  # what did-you-mean looks at
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands by section, from the table alone."""
        names = self.list_commands(ctx)
        width = max(map(len, names), default=0)
        for section in dict.fromkeys(COMMANDS[name].section for name in names):
            rows = [(name.ljust(width), COMMANDS[name].help) for name in names if COMMANDS[name].section == section]
            with formatter.section(section):
                formatter.write_dl(rows)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        return []  # completions/ holds generated scripts; nothing is asked of the program


app = new_typer(
    cls=LazyGroup,
    no_args_is_help=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda flag: flag.replace("_", "-"),
    },
)


def print_version(value: bool) -> None:
    if value:
        import gadcli

        print(f"gad {gadcli.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=print_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks; may stand anywhere on the line."),
) -> None:
    """Generative adversarial distillation: train a student on a teacher's text alone."""


def error_lines(message: str, hint: str | None) -> list[str]:
    """`error: …` and `hint: …` in at most four lines; what is longer is cut, and says so."""
    hint_lines = f"hint: {hint}".splitlines()[: MAX_ERROR_LINES - 1] if hint else []
    lines = f"error: {message}".splitlines()
    room = MAX_ERROR_LINES - len(hint_lines)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"{lines[room - 1]} …"]
    return lines + hint_lines


def save_traceback(error: BaseException) -> str:
    """Write a traceback to a private file; returns its path."""
    handle, path = tempfile.mkstemp(prefix="gad-traceback-", suffix=".txt")
    with os.fdopen(handle, "w") as file:
        traceback.print_exception(error, file=file)
    return path


def report(error: GadError, debug: bool) -> int:
    """Print an error the user can mend; returns its exit code."""
    if debug:
        traceback.print_exception(error)
    print("\n".join(error_lines(error.message, error.hint)), file=sys.stderr)
    return int(error.exit_code)


def report_bug(error: Exception, debug: bool) -> int:
    """Print an error of ours: one line, and where its traceback is."""
    if debug:
        traceback.print_exception(error)
    summary = " ".join(f"{type(error).__name__}: {error}".split())
    hint = f"this is a bug of gad; the traceback is in {save_traceback(error)} (--debug shows it)"
    print("\n".join(error_lines(summary, hint)), file=sys.stderr)
    return int(ExitCode.BUG)


def report_usage(error: typer.TyperException) -> int:
    """Print a wrong command line; `gad` or `gad data` alone gets its help."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
    else:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} -h" if context is not None else "gad -h"
        print("\n".join(error_lines(message, hint)), file=sys.stderr)
    return int(ExitCode.USAGE)


def split_debug(args: Sequence[str]) -> tuple[list[str], bool]:
    """The words without `--debug`, which may stand anywhere before `--`, and whether it was there (or $GAD_DEBUG)."""
    end = args.index("--") if "--" in args else len(args)
    words = [word for index, word in enumerate(args) if word != "--debug" or index > end]
    return words, len(words) < len(args) or os.environ.get("GAD_DEBUG", "") not in ("", "0")


def dispatch(words: list[str], debug: bool) -> int:
    """Run the command; GadErrors and wrong command lines are told on stderr, our bugs with where the traceback is."""
    try:
        code = typer.main.get_command(app).main(words, prog_name="gad", standalone_mode=False)
        return int(code) if isinstance(code, int) else int(ExitCode.OK)
    except GadError as error:
        return report(error, debug)
    except typer.TyperException as error:
        return report_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except SystemExit as error:  # typer's own answer to a broken pipe in a command is sys.exit(1)
        if isinstance(error.__context__, BrokenPipeError):
            raise error.__context__ from None
        raise
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001  the boundary
        if not is_full_disk(error):
            return report_bug(error, debug)
        drop_output()
        return report(full_disk(error), debug)


def drop_output() -> None:
    """Point stdout at nothing, so that the flush at exit is quiet too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def full_disk(error: BaseException) -> ResourceError:
    """What a command says that could not write, its own output included."""
    where = getattr(error, "filename", None) or "the output"
    return ResourceError(f"{where}: {os.strerror(getattr(error, 'errno', None) or errno.ENOSPC)}", "free some space")


def run(args: Sequence[str]) -> int:
    """Run one command line; returns the exit code. The only place that catches errors."""
    try:
        code = dispatch(*split_debug(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        drop_output()  # the reader (`| head`) left
        return EXIT_BROKEN_PIPE
    except OSError as error:  # the last flush
        if not is_full_disk(error):
            raise
        drop_output()
        return report(full_disk(error), debug=False)


def main() -> None:
    """Entry point of the console script."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        # In an ASCII-only locale no file called é can be opened nor text printed: go on in Python's UTF-8 mode.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what cannot be written is escaped: half a surrogate pair, or all
            stream.reconfigure(errors="backslashreplace")  # but ASCII under PYTHONIOENCODING
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
