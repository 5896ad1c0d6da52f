"""A local model as the teacher of `gad data collect`: its answers go into the same journal as an endpoint's.

`LocalTeacher.ask` is the parent's side and knows no torch; as a program this file is one rank's worker: it reads
DIR/request.json and DIR/prompts.jsonl and writes DIR/answers_R.jsonl, a line per answer as it comes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gadcli.config.modelinfo import read_model_config
from gadcli.endpoint.ask import Messages, Tally
from gadcli.endpoint.journal import Journal
from gadcli.endpoint.reply import Reply, is_refusal, oddities
from gadcli.evaluate.worker import run_workers, worker_main
from gadcli.launch.environment import processes_here

MODULE = "gadcli.evaluate.local_teacher"
CHUNK_PROMPTS = 64  # answers between two looks: enough to keep the engine's batch full


@dataclass(frozen=True)
class LocalTeacher:
    """A causal model on this machine. `params` are what decides its answers, besides model and messages: temperature,
    top_p, max_tokens, seed."""

    model: str
    params: dict[str, Any] = field(default_factory=dict)
    engine: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_num_seqs: int = 64

    def ask(
        self, jobs: Iterable[tuple[str, Messages]], journal: Journal, tally: Tally, show: Callable[[Tally], None]
    ) -> None:
        """Answer each (key, messages), each into the journal as it comes. Raises the worker's own error."""
        folder = Path(tempfile.mkdtemp(prefix="gad-teacher-"))
        (folder / "request.json").write_text(json.dumps(asdict(self)))
        with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps([key, messages]) + "\n" for key, messages in jobs)
        nproc = processes_here(0, self.device)
        seen = [0] * nproc

        def take() -> None:
            for rank in range(nproc):
                for line in new_lines(folder / f"answers_{rank}.jsonl", seen, rank):
                    key, reply = json.loads(line)
                    record(key, reply, journal, tally)
                    show(tally)

        run_workers(folder, MODULE, nproc, take)
        shutil.rmtree(folder)


def new_lines(path: Path, seen: list[int], rank: int) -> list[bytes]:
    """Whole lines of `path` from byte seen[rank] on, which moves behind them."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(seen[rank])
        whole, newline, _ = file.read().rpartition(b"\n")
    seen[rank] += len(whole) + len(newline)
    return whole.splitlines()


def record(key: str, reply: dict[str, Any], journal: Journal, tally: Tally) -> None:
    """One answer into the journal and the count."""
    journal.add(key, reply)
    tally.requests += 1
    tally.counts[reply["status"]] += 1
    if reply["status"] != "rejected":
        tally.oddities.update(oddities(Reply(**reply)))
        tally.tokens_in += reply["prompt_tokens"]
        tally.tokens_out += reply["completion_tokens"]


# ---- the worker ----


def work(folder: Path, rank: int) -> None:
    """One rank's share of the prompts."""
    from gadcli.chat.template import TemplateRefusal
    from gadcli.chat.tokenize import ChatTokenizer
    from gadcli.checkpoint.resolve_model import resolve_model
    from gadcli.config.schema import FsdpConfig, RolloutConfig
    from gadcli.distributed.world import init_world
    from gadcli.rollout.build import build_sampler
    from gadcli.rollout.sampler import Sampling, request_seed

    teacher = LocalTeacher(**json.loads((folder / "request.json").read_text()))
    world = init_world(teacher.device, FsdpConfig())  # before the engine: the other way round ranks stand alone
    model_path = str(resolve_model(teacher.model))
    chat = ChatTokenizer.from_folder(model_path)
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    jobs: list[tuple[str, list[int], str]] = []
    for key, messages in map(json.loads, lines[rank :: world.size]):
        try:
            jobs.append((key, chat.encode([chat.prompt_text(messages)])[0], ""))
        except TemplateRefusal as refusal:
            jobs.append((key, [], str(refusal)))
    most = room_of(model_path)
    max_tokens = int(teacher.params["max_tokens"])
    longest = max((len(ids) for _, ids, _ in jobs), default=0)
    rollout = RolloutConfig(
        engine=teacher.engine, max_model_len=max(2, min(most, longest + max_tokens)), max_num_seqs=teacher.max_num_seqs,
        top_p=teacher.params["top_p"], gpu_memory_utilization=0.85,
    )  # fmt: skip
    seed = int(teacher.params["seed"])
    sampler = build_sampler(rollout, model_path, world, eos_ids=chat.end_ids, dtype=teacher.dtype, seed=seed)
    sampling = Sampling(1, teacher.params["temperature"], teacher.params["top_p"], -1, max_tokens)
    with (folder / f"answers_{rank}.jsonl").open("w", encoding="utf-8") as file:
        for first in range(0, len(jobs), CHUNK_PROMPTS):
            part = jobs[first : first + CHUNK_PROMPTS]
            fits = [job for job in part if job[1] and len(job[1]) + max_tokens <= rollout.max_model_len]
            seeds = [request_seed(seed, 0, seed_of(key)) for key, _, _ in fits]
            drawn = sampler.generate([ids for _, ids, _ in fits], sampling, seeds) if fits else []
            answers = {key: group[0] for (key, _, _), group in zip(fits, drawn, strict=True)}
            for key, ids, why in part:
                if key in answers:
                    reply = asdict(reply_of(answers[key], len(ids), chat, teacher.model))
                else:
                    room = rollout.max_model_len
                    reason = why or f"{len(ids)} prompt tokens and {max_tokens} to answer, over the model's {room}"
                    reply = {"status": "rejected", "text": "", "finish_reason": "", "reason": reason}
                file.write(json.dumps([key, reply], ensure_ascii=False) + "\n")
            file.flush()
    sampler.close()


def room_of(model_path: str) -> int:
    """Tokens of prompt and answer that the model was made for."""
    config = read_model_config(model_path) or {}
    return int((config.get("text_config") or config).get("max_position_embeddings") or 4096)


def seed_of(key: str) -> int:
    """A request's own seed, from its key: which others are asked beside it, and when, changes no answer."""
    digest, _, sample = key.partition("-")
    return int(digest[:12], 16) + int(sample or 1) - 1


def reply_of(answer: Any, prompt_tokens: int, chat: Any, model: str) -> Reply:
    """A sampled answer as an endpoint would send it."""
    ids = [token for token in answer.ids if token not in chat.end_ids]
    text = chat.backend.decode(ids, skip_special_tokens=True)
    status = "refused" if is_refusal(text) else "ok" if text.strip() else "empty"
    return Reply(
        status if answer.finished else "truncated", text, "", "stop" if answer.finished else "length", model,
        prompt_tokens, len(answer.ids),
    )  # fmt: skip


if __name__ == "__main__":
    worker_main(MODULE, work)
