"""A model's answers to held-out prompts, sampled by the trainer's own sampler in separate processes.

`draw_answers` is the parent's side and knows no torch; as a program (`python -m gadcli.evaluate.answers --run-dir
DIR`) this file is one rank's worker: it reads DIR/request.json and writes DIR/answers_R.jsonl.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gadcli.chat.thinking import AnswerReader
from gadcli.evaluate.text import Sample
from gadcli.evaluate.worker import run_workers, worker_main
from gadcli.files import write_atomic
from gadcli.launch.environment import processes_here

REQUEST_FILE = "request.json"
PLAN_FILE = "rows.json"
MODULE = "gadcli.evaluate.answers"
PROGRESS_S = 1.0
CHUNK_PROMPTS = 64  # prompts between two progress lines: enough to keep the engine's batch full


@dataclass(frozen=True)
class AnswerRequest:
    """What to draw. `rows` = 0 takes all; a temperature of 0 is greedy and drawn once, whatever `n` is."""

    model: str
    files: tuple[str, ...]
    temperatures: tuple[float, ...] = (0.0,)
    n: int = 1
    rows: int = 0
    max_prompt_length: int = 1024
    max_response_length: int = 256
    prompt_key: str = "content"
    response_key: str = "teacher_response"
    engine: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_num_seqs: int = 64
    seed: int = 1
    discriminator: str = ""
    discriminator_values: str = "last"
    teacher: str = ""
    reads: str = "all"
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerSet:
    """Answers of one model at one temperature, by row and then draw; `row_ids` names each sample's row."""

    model: str
    temperature: float
    samples: list[Sample]
    row_ids: list[int]
    dropped: int
    seconds: float
    scores: list[tuple[float, float]] | None = None  # a given discriminator's, (student, teacher), by sample
    teacher_logps: list[float] | None = None  # a given teacher's mean log-prob per token, by sample

    def first_draws(self) -> dict[int, Sample]:
        """Each row's first answer."""
        found: dict[int, Sample] = {}
        for row, sample in zip(self.row_ids, self.samples, strict=True):
            found.setdefault(row, sample)
        return found


def draw_answers(request: AnswerRequest, progress: Callable[[int, int], None] | None = None) -> list[AnswerSet]:
    """All answers of one model, a set for each temperature. `progress(done, total)` counts answers.

    Blocks while workers run (one a GPU, or one on CPU); they end with this process. Raises the worker's own error.
    """
    folder = Path(tempfile.mkdtemp(prefix="gad-eval-"))
    (folder / REQUEST_FILE).write_text(json.dumps(asdict(request)))
    nproc = processes_here(0, request.device)
    started = time.monotonic()
    shown_at = started

    def watch() -> None:
        nonlocal shown_at
        if progress and time.monotonic() - shown_at > PROGRESS_S:
            shown_at = time.monotonic()
            progress(*_progress_of(folder, nproc))

    run_workers(folder, MODULE, nproc, watch)
    if progress:
        progress(*_progress_of(folder, nproc))
    sets = _collect(folder, request, nproc, time.monotonic() - started)
    shutil.rmtree(folder)
    return sets


def _progress_of(folder: Path, nproc: int) -> tuple[int, int]:
    """Answers done over all ranks, and in all (0 until the data is read)."""
    total = json.loads(text)["answers"] if (text := _text_of(folder / PLAN_FILE)) else 0
    return sum(_text_of(folder / f"answers_{rank}.jsonl").count("\n") for rank in range(nproc)), total


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _collect(folder: Path, request: AnswerRequest, nproc: int, seconds: float) -> list[AnswerSet]:
    plan = json.loads(_text_of(folder / PLAN_FILE))
    lines = [line for rank in range(nproc) for line in _text_of(folder / f"answers_{rank}.jsonl").splitlines()]
    records = sorted((json.loads(line) for line in lines), key=lambda r: (r["row"], r["draw"]))
    lines = [line for rank in range(nproc) for line in _text_of(folder / f"scores_{rank}.jsonl").splitlines()]
    scored = {(r["row"], r["draw"], r["temperature"]): (r["student"], r["teacher"]) for r in map(json.loads, lines)}
    lines = [line for rank in range(nproc) for line in _text_of(folder / f"teacher_{rank}.jsonl").splitlines()]
    likely = {(r["row"], r["draw"], r["temperature"]): r["logp"] for r in map(json.loads, lines)}
    sets = []
    for temperature in request.temperatures:
        own = [record for record in records if record["temperature"] == temperature]
        samples = [Sample(**record["sample"]) for record in own]
        row_ids = [record["row"] for record in own]
        scores = [scored[r["row"], r["draw"], temperature] for r in own] if request.discriminator else None
        logps = [likely[r["row"], r["draw"], temperature] for r in own] if request.teacher else None
        sets.append(AnswerSet(request.model, temperature, samples, row_ids, plan["dropped"], seconds, scores, logps))
    return sets


# ---- the worker ----


def work(folder: Path, rank: int) -> None:
    """One rank's share of the answers, written as they come."""
    from transformers import AutoConfig

    from gadcli.chat.tokenize import ChatTokenizer, load_tokenizer
    from gadcli.checkpoint.resolve_model import resolve_model
    from gadcli.config.schema import DataConfig, FsdpConfig, RolloutConfig
    from gadcli.data.batches import open_dataset
    from gadcli.data.tokens import Style
    from gadcli.distributed.world import init_world
    from gadcli.rollout.build import build_sampler

    raw = json.loads((folder / REQUEST_FILE).read_text())
    request = AnswerRequest(**{**raw, "files": tuple(raw["files"]), "temperatures": tuple(raw["temperatures"])})
    world = init_world(request.device, FsdpConfig())  # before the engine: the other way round ranks stand alone
    model_path = str(resolve_model(request.model))
    tokenizer = load_tokenizer(model_path)
    max_model_len = request.max_prompt_length + request.max_response_length
    data_cfg = DataConfig(
        val_files=list(request.files),
        val_rows=request.rows,
        prompt_key=request.prompt_key,
        response_key=request.response_key,
        max_prompt_length=request.max_prompt_length,
        max_response_length=request.max_response_length,
        truncation="drop",
    )
    chat = ChatTokenizer.of(tokenizer, model_path, request.template_kwargs)
    style = Style(hidden_thinking=True)  # nobody is trained on these answers
    data = open_dataset(list(request.files), chat, data_cfg, max_model_len, split="val", style=style)
    total = sum(len(data) * (request.n if temperature else 1) for temperature in request.temperatures)
    if rank == 0:
        write_atomic(folder / PLAN_FILE, json.dumps({"answers": total, "dropped": data.dropped}))
    rollout = RolloutConfig(
        engine=request.engine,
        max_model_len=max_model_len,
        max_num_seqs=request.max_num_seqs,
        gpu_memory_utilization=0.5 if request.discriminator or request.teacher else 0.85,
    )
    sampler = build_sampler(rollout, model_path, world, eos_ids=chat.end_ids, dtype=request.dtype, seed=request.seed)
    critic = None
    if request.discriminator:
        from gadcli.evaluate.given_discriminator import load_discriminator

        vocabulary = AutoConfig.from_pretrained(model_path, trust_remote_code=False).vocab_size
        critic = load_discriminator(
            request.discriminator, request.discriminator_values, vocabulary, request.dtype, world
        )
    read = AnswerReader(request.reads, chat.decode)
    drawn: list[Drawn] = []
    with (folder / f"answers_{rank}.jsonl").open("w", encoding="utf-8") as file:
        for one in _draw(request, data, sampler, range(rank, len(data), world.size)):
            drawn += [one] if critic is not None or request.teacher else []
            for record in _records(one, tokenizer, read):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    if critic is not None:
        _score(critic, drawn, read, folder / f"scores_{rank}.jsonl")
    if request.teacher:
        from gadcli.evaluate.teacher_logprob import Teacher

        _ask_teacher(Teacher(request.teacher, request.dtype, world), drawn, tokenizer, folder / f"teacher_{rank}.jsonl")
    sampler.close()


@dataclass(frozen=True)
class Drawn:
    """One prompt's answers at one temperature: the data's row and the engine's answers."""

    row: Any
    answers: list[Any]
    temperature: float


def _draw(request: AnswerRequest, data: Any, sampler: Any, rows: range) -> Iterator[Drawn]:
    from gadcli.rollout.sampler import Sampling, request_seed

    for temperature in request.temperatures:
        n = request.n if temperature else 1
        sampling = Sampling(n=n, temperature=temperature, top_p=1.0, top_k=-1, max_tokens=request.max_response_length)
        for start in range(0, len(rows), CHUNK_PROMPTS):
            part = [data[i] for i in rows[start : start + CHUNK_PROMPTS]]
            seeds = [request_seed(request.seed, 0, row.row_id) for row in part]  # step 0: as during training
            drawn = sampler.generate([row.prompt_ids for row in part], sampling, seeds)
            yield from (Drawn(row, answers, temperature) for row, answers in zip(part, drawn, strict=True))


def _records(one: Drawn, tokenizer: Any, read: AnswerReader) -> Iterator[dict[str, Any]]:
    """A prompt's answers as JSON objects."""
    for draw, answer in enumerate(one.answers):
        sample = Sample(
            student=tokenizer.decode(answer.ids, skip_special_tokens=True),
            teacher=one.row.teacher,
            student_length=len(read(one.row.prompt_ids, answer.ids)),
            teacher_length=len(read(one.row.prompt_ids, one.row.teacher_ids)),
            finished=answer.finished,
            prompt=prompt_text(one.row.messages),
        )
        yield {"row": one.row.row_id, "draw": draw, "temperature": one.temperature, "sample": asdict(sample)}


def _score(critic: Any, drawn: list[Drawn], read: AnswerReader, path: Path) -> None:
    """All answers through a given discriminator, the teacher's beside each prompt's. One collective call."""
    from gadcli.evaluate.given_discriminator import score
    from gadcli.model.packing import Group

    groups = []
    for one in drawn:
        texts = [*(answer.ids for answer in one.answers), one.row.teacher_ids]
        groups.append(Group(one.row.prompt_ids, [read(one.row.prompt_ids, ids) for ids in texts], one.row.row_id))
    lines = []
    for one, (*students, teacher) in zip(drawn, score(critic, groups), strict=True):
        for draw, student in enumerate(students):
            place = {"row": one.row.row_id, "draw": draw, "temperature": one.temperature}
            lines.append(json.dumps({**place, "student": student, "teacher": teacher}))
    path.write_text("\n".join(lines))


def _ask_teacher(teacher: Any, drawn: list[Drawn], tokenizer: Any, path: Path) -> None:
    """All answers through a given teacher. Collective."""
    places, answers = [], []
    for one in drawn:
        for draw, answer in enumerate(one.answers):
            places.append({"row": one.row.row_id, "draw": draw, "temperature": one.temperature})
            answers.append((one.row.messages, tokenizer.decode(answer.ids, skip_special_tokens=True), answer.finished))
    lines = [json.dumps({**at, "logp": logp}) for at, logp in zip(places, teacher.logprobs(answers), strict=True)]
    path.write_text("\n".join(lines))


def prompt_text(messages: list[dict[str, str]]) -> str:
    """A conversation as one text; a single user message stands alone."""
    turns = [message for message in messages if message["role"] != "system"]
    if len(messages) == 1 or len(turns) == 1:
        return turns[0]["content"] if turns else messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


if __name__ == "__main__":
    worker_main(MODULE, work)
