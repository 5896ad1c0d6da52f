"""gad's unmodified updates on a fake GPU: `python updates.py CASES.json OUT.json`, LD_PRELOAD=libfakecuda.so.

A case is a dict: `shape` (a config.json), `model` "actor" | "critic" | "reference", `world`, `replicate`, `lora`,
`checkpointing`, `offload`, `prompts` of `prompt` tokens with `answers` of `answer` tokens each, `budget` of a
micro-batch, and `fault` (one of FAULTS; none by default). Written for each: what the second update did (the first makes
the optimiser's state), a pass without gradients, and what the plan says.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from gpu_path.fake_gpu import Watch, fake_gpu  # isort: skip  before anything asks torch for a device
import torch
import torch.nn.attention.flex_attention as flex
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from gadcli.config import memory
from gadcli.config.modelinfo import model_shape
from gadcli.config.schema import ActorConfig, CriticConfig, FsdpConfig, LoraConfig, ModelConfig
from gadcli.data.batches import TokenizedRow
from gadcli.distributed.fsdp import shard
from gadcli.distributed.world import World
from gadcli.model import actor as actor_module
from gadcli.model import attention, chunked_logprobs, critic, loading, micro_batches, packing
from gadcli.model.optim import Optimizer
from gadcli.model.rollout_batch import Answer, Rollout, teacher_groups

MASKS: list[Any] = []  # the window of every block mask made
LAYOUTS: list[int] = []  # tokens of every micro-batch that was laid out
VARIANTS: set[tuple[Any, ...]] = set()  # of the compiled attention that a GPU would have


def one_rank_speaks_for_all(world: int) -> None:
    """Sums over ranks as if every rank had what this one has."""
    for module in (actor_module, critic, micro_batches):
        for name, stand_in in (("sum_over_ranks", lambda xs: [x * world for x in xs]), ("max_over_ranks", float)):
            if hasattr(module, name):
                setattr(module, name, stand_in)


def watch_attention() -> None:
    """flex attention as an operator, which has a fake implementation; what would be compiled is noted."""
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True

    def compiled() -> Any:
        def call(query: Any, key: Any, value: Any, **more: Any) -> Any:
            shape = (query.shape[1], key.shape[1], query.shape[3])
            VARIANTS.add((shape, query.dtype, MASKS[-1], torch.is_grad_enabled()))
            return flex.flex_attention(query, key, value, **more)

        return call

    plain = attention.flex_mask

    def mask(layout: Any, window: Any, *more: Any) -> Any:
        MASKS.append(window)
        return plain(layout, window, *more)

    move = packing.Layout.to

    def to(self: Any, device: Any) -> Any:
        LAYOUTS.append(self.ids_RL.shape[1])
        return move(self, device)

    packing.Layout.to = to  # type: ignore[method-assign]
    attention._compiled_flex = compiled  # type: ignore[assignment]
    attention.flex_mask = mask


# ---- faults that the checks must find ----


def index_on_host() -> None:
    plain = packing.Layout.to

    def to(self: Any, device: Any) -> Any:
        moved = plain(self, device)
        object.__setattr__(moved, "predictor_N", self.predictor_N)
        object.__setattr__(moved, "target_N", self.target_N)
        return moved

    packing.Layout.to = to  # type: ignore[method-assign]


def float32_operand() -> None:
    plain = loading.head_logprobs
    loading.head_logprobs = lambda hidden, *more: plain(hidden.float(), *more)


def mask_per_layer() -> None:
    plain = attention._flex

    def forgetful(q: Any, k: Any, v: Any, layout: Any, *more: Any) -> Any:
        layout.kept.clear()
        return plain(q, k, v, layout, *more)

    attention._flex = forgetful


def forgotten_free() -> None:
    kept: list[Any] = []
    plain = chunked_logprobs._log_softmax

    def keep(*args: Any) -> Any:
        kept.append(out := plain(*args))
        return out

    chunked_logprobs._log_softmax = keep


def wait_per_micro_batch() -> None:
    plain = actor_module.sft_loss

    def look(*args: Any) -> Any:
        out = plain(*args)
        assert float(out[0].detach()) >= 0
        return out

    actor_module.sft_loss = look


FAULTS = {f.__name__: f for f in (index_on_host, float32_operand, mask_per_layer, forgotten_free, wait_per_micro_batch)}


# ---- a case ----


def build(case: dict[str, Any], cfg: ModelConfig, world: World, *, causal: bool, trainable: bool = True) -> Any:
    """As `load_actor` and `load_critic` do, from a config alone and on the device at once."""
    fields = dict(case["shape"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.num_labels, config.classifier_dropout = 1, 0.0
    auto = AutoModelForCausalLM if causal else AutoModelForTokenClassification
    with torch.device("cuda"):
        model = auto.from_config(config, dtype=torch.float32, attn_implementation=attention.SHARED)
        loading._prepare(model, cfg, 1, trainable)
    attach = loading.attach_actor if causal else loading.attach_critic
    attach(model)
    model.gad_shares, model.gad_note = True, ""
    offload = bool(case.get("offload"))
    return shard(model, world, FsdpConfig(replicate=case.get("replicate", 1)), "auto", offload=offload)


def some_rollout(case: dict[str, Any]) -> Rollout:
    rows = [TokenizedRow(i, [1] * case["prompt"], [2] * case["answer"], [], "") for i in range(case["prompts"])]
    # Two words each: no two answers of a group are equal, so every one is scored by itself.
    answers = [[Answer([3 + g] * case["answer"], [-1.0] * case["answer"], True) for g in range(case["answers"])]] * len(
        rows
    )
    return Rollout(rows, answers)


def record(watch: Watch) -> dict[str, Any]:
    """What happened since the last record."""
    found = {
        "peak": watch.peak,
        "peak_at": watch.peak_at,
        "left": watch.now,
        "waits": dict(watch.waits),
        "mixed": dict(watch.mixed),
        "moved": dict(watch.moved),
        "masks": len(MASKS),
        "micro_batches": len(LAYOUTS),
    }
    MASKS.clear()
    LAYOUTS.clear()
    watch.restart()
    return found


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    one_rank_speaks_for_all(case["world"])
    with fake_gpu(case["world"], case.get("replicate", 1)) as (watch, mesh):
        world = World(0, case["world"], torch.device("cuda", 0), mesh)
        cfg = ModelConfig(gradient_checkpointing=case.get("checkpointing", False), lora=LoraConfig(case.get("lora", 0)))
        rollout = some_rollout(case)
        if case["model"] == "critic":
            settings = CriticConfig(model=cfg, micro_batch_tokens=case["budget"])
            model = build(case, cfg, world, causal=False)
            learner = critic.Critic(model, Optimizer(model, settings.optim, 1.0, 10), settings, world)
            passes = {
                "update": lambda: learner.score_and_update(rollout),
                "score": lambda: learner.score(rollout.pair_groups()),
            }
        else:
            actor_settings = ActorConfig(model=cfg, micro_batch_tokens=case["budget"])
            frozen = case["model"] == "reference"
            model = build(case, cfg, world, causal=True, trainable=not frozen)
            optimizer: Any = None if frozen else Optimizer(model, actor_settings.optim, 1.0, 10)
            student = actor_module.Actor(model, optimizer, actor_settings, world, 0.8, 64)
            advantages = torch.zeros(case["prompts"], case["answers"])
            groups, width = rollout.student_groups(), rollout.width
            passes = {"logprobs": lambda: student.logprobs(groups, width)}
            if not frozen:
                passes = {
                    "update": lambda: student.update(rollout, advantages, None, None),
                    **passes,
                    "sft": lambda: student.sft_update(teacher_groups(rollout.rows)),
                }
        record(watch)
        for name, run in passes.items():
            if name == "update":
                run()
                record(watch)
            run()
            found[name] = record(watch)
    return found | {"plan": planned(case, cfg), "variants": len(VARIANTS)}


def planned(case: dict[str, Any], cfg: ModelConfig) -> float:
    """Bytes that the plan counts on one device while the model is updated (a reference: while it lies there)."""
    shape = model_shape(case["shape"])
    placement = memory.Placement("cuda", "vllm", case["world"], shape, None)
    fsdp = FsdpConfig(replicate=case.get("replicate", 1), offload_critic=bool(case.get("offload")))
    answers = case["answers"] + (case["model"] == "critic")
    row = case["prompt"] + answers * case["answer"]
    cut = memory.cut_passes(row, answers * case["answer"], case["budget"], case["prompts"], answers)
    if case["model"] == "reference":
        shards = case["world"] // case.get("replicate", 1)
        return memory.estimate_reference(shape, shards, 2).resident
    model = memory.estimate_model(shape, cfg, placement, fsdp, cut, causal=case["model"] == "actor")
    return model.updating if case.get("offload") else model.resident + model.updating


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    watch_attention()
    found = []
    for case in cases:
        with contextlib.ExitStack() as stack:
            if fault := case.get("fault"):
                for module in (attention, loading, chunked_logprobs, actor_module):
                    stack.callback(vars(module).update, dict(vars(module)))
                stack.callback(setattr, packing.Layout, "to", packing.Layout.to)
                FAULTS[fault]()
            try:
                found.append(run_case(case))
            except Exception as error:  # noqa: BLE001  what a card would refuse is a finding
                found.append({"refused": f"{type(error).__name__}: {error}"[:400]})
        Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
