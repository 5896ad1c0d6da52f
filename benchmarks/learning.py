"""Does the adversarial stage teach what more supervised training would not? Five arms, driven through `gad` itself.

    python benchmarks/learning.py --out learning --seeds 1 2 3

For each seed, on the same fixed, limited set of teacher rows:
  a  SeqKD until its held-out ROUGE-L stops improving; its best checkpoint
  b  warm-up and gad from (a), for a fixed time on the clock (or --gad-steps)
  c  SeqKD continued from (a) for as long as (b) trained: the control
  d  warm-up and gad from a deliberately early SeqKD checkpoint
  e  SeqKD continued from that checkpoint for as long as (d) trained: its control
Checkpoints are chosen on validation rows, alike in all arms; the table is about test rows that nothing else reads.
Finished arms are kept in OUT/results.jsonl and not run again; the table and the plot are drawn from that file
(`--report` draws them alone)."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import learning_nano
import learning_report
import learning_spread
from gadcli.checkpoint.embedded_model import ensure_demo_model
from gadcli.checkpoint.retention import best_checkpoint
from gadcli.demo.docstring_data import has_form, write_demo_data
from gadcli.evaluate.fresh_discriminator import fresh_discriminator
from gadcli.evaluate.text import Sample

CHOOSE_BY = "val/rouge_l"
NO_END = 1_000_000  # steps: the clock ends the run
ARMS = ("a", "b", "c", "d", "e")
NANO = {"ordering": learning_nano, "spread": learning_spread}  # tasks of words, with students of a few layers
TASKS = ("docstrings", *NANO)  # the demo's student and text first
NEEDS = {"a": (), "b": ("a",), "c": ("a", "b"), "d": (), "e": ("d",)}


@dataclass(frozen=True)
class Plan:
    """What to run; every number that a result depends on stands in its record."""

    task: str
    model: str
    preset: str
    teacher_rows: int
    val_rows: int
    budget_s: float
    gad_steps: int
    warmup_steps: int
    chunk: int
    patience: int
    looks_a_call: int
    min_gain: float
    max_seqkd_steps: int
    early_steps: int
    fresh_rows: int
    evals: int
    temperature: float
    max_prompt_length: int
    max_response_length: int
    overrides: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A finished stage: its folder, the checkpoint chosen on validation rows, and the seconds its steps took."""

    folder: Path
    best: Path
    steps: int
    seconds: float
    evals: dict[int, float]

    @property
    def seconds_a_step(self) -> float:
        return self.seconds / max(self.steps, 1)


class Bench:
    """One seed's data, folders and finished arms."""

    def __init__(self, plan: Plan, out: Path, seed: int) -> None:
        self.plan, self.out, self.seed = plan, out, seed
        self.runs = out / f"seed_{seed}"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.finished = self.runs / "finished_stages.txt"
        self.cache = self.runs / "cache"  # converted checkpoints: half a gigabyte each, and nobody else's
        write = NANO[plan.task].write_data if plan.task in NANO else write_demo_data
        files = write(self.runs / "data", seed)
        self.val, self.test = files.val, files.test
        self.train = self.runs / "data" / f"train_{plan.teacher_rows}.parquet"
        pq.write_table(pq.read_table(files.train).slice(0, plan.teacher_rows), self.train)

    # -- the arms --

    def arm_a(self) -> Trained:
        """SeqKD in chunks until `patience` evaluations in a row have gained less than `min_gain`."""
        plan, steps = self.plan, 0
        while True:
            steps += plan.chunk * plan.looks_a_call
            trained = self.stage("seqkd", "a", plan.model, steps=steps, test_freq=plan.chunk)
            if steps >= plan.max_seqkd_steps or stopped_improving(trained.evals, plan.patience, plan.min_gain):
                return trained

    def early(self) -> Trained:
        return self.stage("seqkd", "early", self.plan.model, steps=self.plan.early_steps, test_freq=0)

    def adversarial(self, name: str, start: Path) -> tuple[Trained, float]:
        """Warm-up and gad from a SeqKD checkpoint within the budget; returns gad's end and both stages' seconds."""
        plan = self.plan
        extent: dict[str, Any] = {"steps": plan.gad_steps, "test_freq": max(1, plan.gad_steps // plan.evals)}
        warmup = self.stage("warmup", f"{name}-warmup", str(start / "actor"), steps=plan.warmup_steps, test_freq=0)
        left = max(1.0, plan.budget_s - warmup.seconds)
        last = warmup.best
        if not plan.gad_steps:
            test_freq = max(1, int(left / plan.evals / max(warmup.seconds_a_step, 1e-3)))
            extent = {"limit_s": left, "steps": NO_END, "test_freq": test_freq}
        trained = self.stage("gad", name, str(last / "actor"), reward=str(last / "critic"), **extent)
        return trained, warmup.seconds + trained.seconds

    def continued(self, name: str, start: Path, seconds: float, seconds_a_step: float) -> Trained:
        """The control: SeqKD from the same checkpoint for the same seconds, looked at as often."""
        test_freq = max(1, int(seconds / self.plan.evals / max(seconds_a_step, 1e-3)))
        extent: dict[str, Any] = (
            {"steps": max(1, int(seconds / seconds_a_step))} if self.plan.gad_steps else {"limit_s": seconds}
        )
        return self.stage("seqkd", name, str(start / "actor"), test_freq=test_freq, **extent)

    # -- the commands --

    def stage(
        self, stage: str, name: str, model: str, *, reward: str = "", steps: int = NO_END, limit_s: float = 0.0,
        test_freq: int,
    ) -> Trained:  # fmt: skip
        """`gad train STAGE`, continued where an earlier call or an interruption left it."""
        folder = self.runs / name
        words = ["train", stage, "--preset", self.plan.preset, "--model", model, "--exp-name", name, "--quiet"]
        words += ["--output-dir", str(self.runs), *(["--reward-model", reward] if reward else [])]
        words += [*(["--resume"] if any(folder.glob("global_step_*")) else ["--force"])]
        words += [f"data.train_files=[{self.train}]", f"data.val_files=[{self.val}]"]
        words += [f"data.val_rows={self.plan.val_rows}", f"trainer.seed={self.seed}", f"trainer.total_steps={steps}"]
        words += [f"trainer.max_time_s={limit_s:g}", f"trainer.test_freq={test_freq}", f"trainer.save_freq={test_freq}"]
        words += [f"trainer.keep_best={CHOOSE_BY if test_freq else ''}", f"rollout.temperature={self.plan.temperature}"]
        prompt, response = self.plan.max_prompt_length, self.plan.max_response_length
        words += [f"data.max_prompt_length={prompt}", f"data.max_response_length={response}"]
        words += [f"rollout.max_model_len={prompt + response}", *self.plan.overrides.get(stage, [])]
        self.once(name, words)
        found = read_run(folder)
        best = best_checkpoint(folder, CHOOSE_BY)
        if best is None:
            raise SystemExit(f"{folder}: no checkpoint has a {CHOOSE_BY}")
        return Trained(folder, best, *found)

    def once(self, name: str, words: list[str]) -> None:
        """A stage that has ended is not started again: a resumed one would train a step more."""
        asked = " ".join(word for word in words if word not in ("--resume", "--force"))
        done = self.finished.read_text().splitlines() if self.finished.exists() else []
        if asked not in done:
            self.gad(name, words)
            with self.finished.open("a") as file:
                file.write(asked + "\n")

    def drop_checkpoints(self) -> None:
        """Free the disk (about 30 GB a seed); what was trained would have to be trained again."""
        self.finished.unlink(missing_ok=True)
        for path in [*self.runs.glob("*/global_step_*"), self.cache / "models"]:
            shutil.rmtree(path, ignore_errors=True)

    def gad(self, name: str, words: list[str]) -> str:
        """Run one `gad` command, its messages into OUT/seed_N/NAME.log; returns its standard output."""
        log = self.runs / f"{name}.log"
        with log.open("a") as file:
            file.write(f"$ gad {' '.join(words)}\n")
            file.flush()
            command = [sys.executable, "-m", "gadcli.cli.app", *words]
            env = {**os.environ, "GAD_CACHE": str(self.cache)}
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=file, text=True)
        if done.returncode:
            raise SystemExit(f"gad {words[0]} {words[1]} ended with {done.returncode}; see {log}")
        return done.stdout

    def test_figures(self, name: str, model: Path | str) -> dict[str, Any]:
        """`gad eval` on the test rows, greedy and at the sampling temperature, with the share of exact forms."""
        samples = self.runs / f"{name}.samples.jsonl"
        words = ["eval", str(model), "--data", str(self.test), "-t", "0", "-t", str(self.plan.temperature), "--json"]
        words += ["--max-prompt-length", str(self.plan.max_prompt_length), "--seed", str(self.seed), "--quiet"]
        words += ["--max-response-length", str(self.plan.max_response_length), *self.plan.overrides.get("eval", [])]
        words += ["--no-fresh"] if self.plan.fresh_rows else []
        report = json.loads(self.gad(name, [*words, "--samples", str(samples)]))
        answers = [json.loads(line) for line in samples.read_text().splitlines()]
        figures: dict[str, Any] = {"prompts": report["models"][0]["prompts"]}
        for kind, found in zip(("greedy", "sampled"), report["models"], strict=True):
            own = [answer for answer in answers if answer["temperature"] == found["temperature"]]
            form = sum(in_form(self.plan.task, answer) for answer in own) / len(own)
            figures[kind] = {**found["metrics"], "val/form": form}
            if self.plan.fresh_rows:
                figures[kind]["val/fresh_accuracy"] = fresh_accuracy(own[: self.plan.fresh_rows], self.seed)
        return figures


def fresh_accuracy(answers: list[dict[str, Any]], seed: int) -> float:
    """`gad eval`'s fresh discriminator on some of its answers: on all of them it takes longer than the sampling."""
    keys = ("student", "teacher", "student_length", "teacher_length", "finished", "prompt")
    return fresh_discriminator([Sample(**{key: answer[key] for key in keys}) for answer in answers], seed).accuracy


def in_form(task: str, answer: dict[str, Any]) -> bool:
    return NANO[task].has_form(answer) if task in NANO else has_form(answer["student"])


def stopped_improving(evals: dict[int, float], patience: int, min_gain: float) -> bool:
    """Whether the best of the last `patience` evaluations is no better than the best before them."""
    values = [evals[step] for step in sorted(evals)]
    return len(values) > patience and max(values[-patience:]) < max(values[:-patience]) + min_gain


def read_run(folder: Path) -> tuple[int, float, dict[int, float]]:
    """Steps, their seconds, and the evaluations of a run; what a resume repeated counts once.

    The seconds are steps times the median step: a machine stopped or busy for a while gives no arm more time.
    """
    seconds: dict[int, float] = {}
    evals: dict[int, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["type"] == "step":
            seconds[record["step"]] = record["metrics"]["timing_s/step"]
        elif record["type"] == "eval":
            evals[record["step"]] = record["metrics"][CHOOSE_BY]
    typical = statistics.median(seconds.values()) if seconds else 0.0
    return len(seconds), len(seconds) * typical, evals


def run_seed(plan: Plan, out: Path, seed: int, arms: list[str], keep: bool, base: bool) -> None:
    """All wanted arms of one seed, each recorded as it ends."""
    wanted = [arm for arm in ARMS if arm in arms or any(arm in NEEDS[other] for other in arms)]
    done = {record["arm"]: record for record in read_results(out) if record["seed"] == seed}
    if any(found["plan"] != asdict(plan) for found in done.values()):
        raise SystemExit(f"{out}: holds results of other settings; give another --out")
    first = ["base"] if base else []
    if all(arm in done for arm in [*first, *wanted]):
        return
    bench = Bench(plan, out, seed)
    if base and "base" not in done:
        record(out, plan, seed, "base", bench.test_figures("base", plan.model), None, 0.0)
    trained: dict[str, Trained] = {}
    spent: dict[str, float] = {}
    for arm in wanted:
        trained[arm], spent[arm] = run_arm(bench, arm, trained, spent)
        if arm not in done:
            figures = bench.test_figures(arm, trained[arm].best / "actor")
            record(out, plan, seed, arm, figures, trained[arm], spent[arm])
    if not keep:
        bench.drop_checkpoints()


def run_arm(bench: Bench, arm: str, trained: dict[str, Trained], spent: dict[str, float]) -> tuple[Trained, float]:
    """One arm and the seconds it trained beyond its start. Stages that are already there take no time."""
    if arm == "a":
        result = bench.arm_a()
        return result, result.seconds
    if arm in ("b", "d"):
        start = trained["a"] if arm == "b" else bench.early()
        return bench.adversarial(arm, start.best)
    start = trained["a"] if arm == "c" else bench.early()
    seconds = spent["b" if arm == "c" else "d"]
    return (result := bench.continued(arm, start.best, seconds, start.seconds_a_step)), result.seconds


def record(
    out: Path, plan: Plan, seed: int, arm: str, figures: dict[str, Any], trained: Trained | None, seconds: float
) -> None:
    """Append one finished arm to OUT/results.jsonl."""
    entry = {"time": time.time(), "arm": arm, "seed": seed, "seconds": seconds, "test": figures, "plan": asdict(plan)}
    if trained is not None:
        chosen = int(trained.best.name.rpartition("_")[2])
        entry |= {"steps": trained.steps, "chosen_step": chosen, "val": trained.evals}
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    print(f"seed {seed} arm {arm}: {seconds:.0f} s, test ROUGE-L sampled {figures['sampled']['val/rouge_l']:.3f}")


def read_results(out: Path) -> Iterator[dict[str, Any]]:
    """Finished arms; of an arm that was run again the last counts (the report's rule too)."""
    path = out / "results.jsonl"
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


STAGES = ("seqkd", "warmup", "gad", "eval")


def arguments() -> argparse.Namespace:
    """The command line; option names are Plan's field names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("learning"))
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--task", choices=TASKS, default=TASKS[0], help="ordering, spread: nano students, minutes a seed")
    add("--model", default="", help="default: the task's own")
    add("--preset", default="demo")
    add("--teacher-rows", type=int, default=128)
    add("--val-rows", type=int, default=96)
    add("--budget-s", type=float, default=600.0, help="training seconds of (b) and (d), and so of their controls")
    add("--gad-steps", type=int, default=0, help="end (b) and (d) by steps, their controls by those steps' seconds")
    add("--warmup-steps", type=int, default=14)
    add("--chunk", type=int, default=8, help="SeqKD steps between looks at the validation rows")
    add("--patience", type=int, default=3, help="looks without a gain that end (a)")
    add("--looks-a-call", type=int, default=1, help="looks between which `gad` is not started anew")
    add("--min-gain", type=float, default=0.002)
    add("--max-seqkd-steps", type=int, default=160)
    add("--early-steps", type=int, default=8, help="SeqKD steps before (d) and (e)")
    add("--fresh-rows", type=int, default=0, help="test rows for the fresh discriminator; 0: all")
    add("--evals", type=int, default=6, help="looks at the validation rows in each of b, c, d, e")
    add("--temperature", type=float, default=1.0)
    add("--max-prompt-length", type=int, default=0, help="default: the task's own")
    add("--max-response-length", type=int, default=0, help="default: the task's own")
    for stage in STAGES[:-1]:
        add(f"--{stage}", action="append", default=[], metavar="KEY=VALUE", help=f"override for {stage}")
    add("--eval", action="append", default=[], metavar="WORD", help="a word for gad eval, as --eval=--engine=hf")
    add("--keep-checkpoints", action="store_true", help="about 30 GB a seed")
    add("--no-base", action="store_true", help="leave the base model's own figures out")
    add("--report", action="store_true", help="draw table and plot from what is there")
    return parser.parse_args()


def own_model(task: str, out: Path) -> Path:
    return NANO[task].write_student(out / "nano") if task in NANO else ensure_demo_model()


def main() -> None:
    options = arguments()
    if not options.report:
        options.model = options.model or str(own_model(options.task, options.out.resolve()))
        nano = NANO.get(options.task)
        own = nano.settings(options.out.resolve()) if nano else {}
        options.overrides = {stage: [*own.get(stage, []), *getattr(options, stage)] for stage in STAGES}
        prompt, response = nano.LIMITS if nano else (192, 48)
        options.max_prompt_length = options.max_prompt_length or prompt
        options.max_response_length = options.max_response_length or response
        plan = Plan(**{field.name: getattr(options, field.name) for field in fields(Plan)})
        options.out.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            run_seed(plan, options.out.resolve(), seed, options.arms, options.keep_checkpoints, not options.no_base)
    print(learning_report.write(options.out, list(read_results(options.out))))


if __name__ == "__main__":
    main()
