"""One family's way through gad: check, plan, train, merge, and others' readings of what comes out, as findings.

`python passage.py OUT WORK NAME…` does so for several families in one process, so that vLLM is imported once, and
writes {"NAME": {finding: value}} to OUT after each. A step that fails ends its family's findings with "failed".
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gadcli.train.build as building
from families.models import FAMILIES, write_family
from gadcli.checkpoint.merge.pick import models_in
from gadcli.checkpoint.merge.to_huggingface import MergeOptions, merge_models
from gadcli.config.resolve import load_resolved, resolve
from gadcli.distributed.world import World
from gadcli.errors import GadError
from gadcli.launch.stage import StageRequest, prepare
from gadcli.rollout.sampler import Sampler, Sampling
from gadcli.train.loop import finish
from gadcli.train.run import Run
from gadcli.train.stages import train_adversarial, train_seqkd
from tiny import write_tiny_data

TOKENS = 12  # of greedy text
SETTINGS = [
    "data.train_batch_size=4", "data.val_rows=2", "data.max_prompt_length=96", "data.max_response_length=32",
    "rollout.max_model_len=128", "rollout.max_num_seqs=16", "rollout.n=2", "rollout.kv_cache_gb=0.05",
    "trainer.total_steps=2", "trainer.critic_warmup=0", "trainer.device=cpu", "trainer.logger=[console]",
    "actor.optim.lr=1e-2", "critic.optim.lr=1e-3",
]  # fmt: skip
LORA = ["actor.model.lora.rank=4", "critic.model.lora.rank=4"]


def settings(stage: str, model: Path, data: Path, *more: str) -> list[str]:
    own = [f"actor.model.path={model}", f"data.train_files=[{data}]"]
    seqkd = ["trainer.critic_warmup=-1"] if stage == "seqkd" else []
    return [*SETTINGS, *own, *seqkd, *more]


def plan(stage: str, words: list[str], folder: Path) -> str:
    """What `--dry-run` answers: "" or the refusal."""
    try:
        prepare(StageRequest(stage=stage, overrides=(*words, f"trainer.output_dir={folder}"), dry_run=True))
    except GadError as error:
        return f"exit {int(error.exit_code)}: {error.message}"
    return ""


@contextmanager
def trained(
    stage: str, words: list[str], run_dir: Path, engine: Sampler | None = None, world: World | None = None
) -> Iterator[Run]:
    """The real worker's steps in this process, without its parent; the last weights are in the sampler. An `engine`
    that is there already, and the `world` that it was made in, stand for those that the run would make."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(
        resolve(stage, overrides=[*words, f"trainer.exp_name={run_dir.name}"]).to_yaml()
    )
    cfg = load_resolved(run_dir / "config.yaml")
    with ExitStack() as patched:
        if engine is not None:
            patched.enter_context(mock.patch.object(building, "build_sampler", return_value=engine))
            patched.enter_context(mock.patch.object(building, "init_world", return_value=world))
        run = building.build_run(cfg, run_dir, resume_from=None)
    (train_seqkd if stage == "seqkd" else train_adversarial)(run)
    finish(run)
    assert run.sampler is not None
    run.sampler.load(run.actor.model)
    yield run
    run.records.end(0, "done")


def merged(run_dir: Path, out: Path) -> Path:
    merge_models(models_in(run_dir / "global_step_2" / "actor", print), out, MergeOptions())
    return out


def greedy(sampler: Sampler, prompts: list[list[int]]) -> list[list[int]]:
    answers = sampler.generate(prompts, Sampling(1, 0.0, 1.0, -1, TOKENS), [0] * len(prompts))
    return [group[0].ids for group in answers]


@torch.no_grad()
def greedy_by_hand(model: Any, prompts: list[list[int]], ends: list[int]) -> list[list[int]]:
    """The argmax of a plain forward pass of transformers, a token at a time."""
    found = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + TOKENS and (len(ids) == len(prompt) or ids[-1] not in ends):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def by_transformers(folder: Path, prompts: list[list[int]], ends: list[int]) -> list[list[int]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return greedy_by_hand(model.eval(), prompts, ends)


def changed_tensors(before: Path, after: Path) -> int:
    """How many tensors of two folders with the same names differ."""
    old, new = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (before, after)
    )
    assert old.keys() == new.keys(), old.keys() ^ new.keys()
    return sum(not torch.equal(old[name], new[name]) for name in old)


def passage(name: str, work: Path, *, vllm: bool) -> dict[str, Any]:
    """What happens to a family; see the tests for what must."""
    found: dict[str, Any] = {}
    base, data = write_family(work / "base", name), write_tiny_data(work / "rows.parquet", 16)
    try:
        for stage in ("seqkd", "gad"):
            found[f"plan of {stage}"] = plan(stage, settings(stage, base, data), work / "planned")
        if found["plan of seqkd"]:
            return found
        for stage, more in (("seqkd", []), ("gad", LORA)):
            _with_transformers(stage, more, base, data, work, found)
        if vllm:
            _with_vllm(base, data, work, found)
    except Exception as error:  # noqa: BLE001  a finding like others: the next family must be tried
        found["failed"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    return found


def _with_transformers(stage: str, more: list[str], base: Path, data: Path, work: Path, found: dict[str, Any]) -> None:
    label = f"{stage}{' with adapters' if more else ''}, hf"
    words = settings(stage, base, data, "rollout.engine=hf", *more)
    with trained(stage, words, work / f"{stage}-hf") as run:
        prompts = [run.train_data[i].prompt_ids for i in range(3)]
        text = greedy(run.sampler, prompts)
        run.actor.model.eval()
        out = merged(run.run_dir, work / f"{stage}-hf-merged")
        found[label] = {
            "note": run.actor.model.gad_note,
            "tokens": sum(map(len, text)),
            "equal to the trained model": text == greedy_by_hand(run.actor.model, prompts, run.eos_ids),
            "equal to transformers": text == by_transformers(out, prompts, run.eos_ids),
            "changed": changed_tensors(base, out),
        }
        (work / f"{stage}-hf-merged" / "greedy.json").write_text(json.dumps([prompts, run.eos_ids, text]))
    if dist.is_initialized():
        dist.destroy_process_group()


def _with_vllm(base: Path, data: Path, work: Path, found: dict[str, Any]) -> None:
    """One engine, started on what was merged; it is then given the weights of two more runs."""
    from gadcli.config.schema import FsdpConfig, RolloutConfig
    from gadcli.distributed.world import init_world
    from gadcli.rollout.vllm_sampler import VllmSampler

    merged_folder = work / "seqkd-hf-merged"
    prompts, ends, text = json.loads((merged_folder / "greedy.json").read_text())
    world = init_world("cpu", FsdpConfig())
    cfg = RolloutConfig(max_num_seqs=16, max_model_len=128, kv_cache_gb=0.05)
    engine = VllmSampler(cfg, str(merged_folder), world, ends, torch.float32, seed=1)
    found["vllm"] = {
        "architecture": engine.llm.apply_model(lambda model: type(model).__name__)[0],
        "equal to the trained model": greedy(engine, prompts) == text,
    }
    for stage, more in (("gad", []), ("seqkd", LORA)):
        words = settings(stage, base, data, "rollout.engine=vllm", *more)
        with trained(stage, words, work / f"{stage}-vllm", engine, world) as run:
            text = greedy(engine, prompts)
            out = merged(run.run_dir, work / f"{stage}-vllm-merged")
            found[f"{stage}{' with adapters' if more else ''}, vllm"] = {
                "equal to transformers": text == by_transformers(out, prompts, run.eos_ids),
            }
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    out, work, *names = sys.argv[1:]
    torch.set_num_threads(1)
    vllm = "--no-vllm" not in names
    found = {}
    for name in [n for n in names if n in FAMILIES]:
        found[name] = passage(name, Path(work) / name, vllm=vllm)
        Path(out).write_text(json.dumps(found, indent=1))
    sys.stdout.flush()
    os._exit(0)  # native libraries sometimes abort in their own teardown


if __name__ == "__main__":
    main()
