"""The plan of a stage: steps, tokens, memory, disk and what is unusual, before anything is loaded. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gadcli.config.checks import check
from gadcli.config.fit import CLUSTERS, LARGE, Holding, advice_text, holding_table, too_large, what_gpus_hold
from gadcli.config.memory import GIB, MemoryEstimate, ModelMemory, Placement, estimate, gb
from gadcli.config.modelinfo import ModelShape, model_shape
from gadcli.config.schema import GadConfig
from gadcli.config.tree import flatten
from gadcli.errors import DataError

LABEL_WIDTH = 10
WIDTH = 100
# The keys that make a stage what it is, by what uses them; the plan shows their values.
NUMBERS = {
    "data": ("train_batch_size", "max_prompt_length", "max_response_length", "truncation"),
    "trainer": ("total_epochs", "critic_warmup", "seed"),
    "actor": ("objective", "optim.lr", "ppo_epochs", "entropy_coeff"),
    "policy": (
        "actor.policy_loss.loss_mode", "actor.clip_ratio_low", "actor.clip_ratio_high", "algorithm.adv_estimator",
        "actor.use_kl_loss", "actor.kl_loss_coef", "algorithm.kl_ctrl.kl_coef",
    ),
    "critic": ("loss", "values", "optim.lr"),
    "rollout": ("n", "temperature", "max_model_len"),
}  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """How rows become steps. `left_over` rows of each epoch do not fill a batch and wait for another order."""

    per_epoch: int
    total: int
    left_over: int
    critic_only: int
    actor: int


def count_steps(cfg: GadConfig, rows: int) -> Steps:
    """floor(rows / batch) steps an epoch, the incomplete batch dropped; `trainer.total_steps` sets the total outright.

    Raises DataError when the rows do not fill one batch: a run of zero steps is never meant.
    """
    batch = cfg.data.train_batch_size
    if rows < batch:
        hint = f"data.train_batch_size={rows}, or more rows" if rows else "add rows"
        raise DataError(f"{rows} training rows do not fill one batch of {batch} (data.train_batch_size)", hint)
    per_epoch = rows // batch
    total = cfg.trainer.total_steps or per_epoch * cfg.trainer.total_epochs
    critic_only = min(max(cfg.trainer.critic_warmup, 0), total)
    return Steps(per_epoch, total, rows - per_epoch * batch, critic_only, total - critic_only)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do and take. `memory` is None where a model's config.json is not on this machine."""

    cfg: GadConfig
    rows: int | None
    answers: int | None
    dropped: int
    steps: Steps | None
    world_size: int
    device: str
    engine: str
    student: ModelShape | None
    critic: ModelShape | None
    memory: MemoryEstimate | None
    unusual: list[str]
    origins: Mapping[str, str] = field(default_factory=dict)
    free_gb: Mapping[str, float] = field(default_factory=dict)
    elsewhere: list[Holding] = field(default_factory=list)  # what GPUs would hold, where this machine has none

    def to_json(self) -> dict[str, Any]:
        """The plan as plan.json holds it; sizes in bytes."""
        cfg, steps = self.cfg, self.steps
        return {
            "stage": cfg.stage,
            "preset": cfg.preset,
            "rows": {
                "kept": self.rows,
                "answers": self.answers,
                "dropped": self.dropped,
                "left_over": steps.left_over if steps else None,
            },
            "steps": {
                "per_epoch": steps.per_epoch if steps else None,
                "total": steps.total if steps else None,
                "critic_only": steps.critic_only if steps else None,
                "actor": steps.actor if steps else None,
                "epochs": cfg.trainer.total_epochs,
            },
            "tokens_per_step": tokens_per_step(cfg),
            "world_size": self.world_size,
            "device": self.device,
            "engine": self.engine,
            "models": {
                "student": self.student.causal_params if self.student else None,
                "critic": self.critic.critic_params if self.critic else None,
            },
            "memory": self.memory.to_json() if self.memory else None,
            "disk_bytes": self.memory.disk if self.memory else None,
            "on_gpus": [holding.to_json() for holding in self.elsewhere],
            "settings": {key: value for key, value in flatten(cfg).items() if key in shown_keys(cfg)},
            "writes": self.writes(),
            "unusual": self.unusual,
        }

    def writes(self) -> list[str]:
        """The files and folders of the run."""
        run = f"{self.cfg.trainer.output_dir}/{self.cfg.trainer.exp_name or run_name(self.cfg)}"
        models = "actor,critic" if self.cfg.trainer.critic_warmup >= 0 else "actor"
        step = self.steps.total if self.steps else "N"
        names = ["config.yaml", "plan.json", "metrics.jsonl", "samples.jsonl", "logs/"]
        if "tensorboard" in self.cfg.trainer.logger:
            names.append("tensorboard/")
        return [f"{run}/{name}" for name in (*names, f"global_step_{step}/{{{models},trainer}}")]

    def render(self, width: int = WIDTH) -> list[str]:
        """The plan as plain lines of at most `width` columns where words allow it."""
        lines = [self._title()]
        for label, text in self._sections():
            lines += wrap(label, text, width)
        if self.memory:
            lines += memory_table(self.memory)
            lines += wrap("peak", self._peak(self.memory), width)
            lines += wrap("disk", self._disk(self.memory), width)
            lines += self._elsewhere(width)
        else:
            lines += wrap("memory", "unknown: the model's config.json is not on this machine", width)
        run, *names = self._writes_short()
        lines += wrap("writes", f"{run}: {', '.join(names)}", width)
        for index, warning in enumerate(self.unusual):
            lines += wrap("unusual" if index == 0 else "", f"- {warning}", width)
        return lines

    def _title(self) -> str:
        preset = f" · preset {self.cfg.preset}" if self.cfg.preset else ""
        many = "process" if self.world_size == 1 else "processes"
        return f"plan: {self.cfg.stage}{preset} · {self.world_size} {many} on {self.device} · sampler {self.engine}"

    def _sections(self) -> Iterator[tuple[str, str]]:
        cfg, steps = self.cfg, self.steps
        if self.rows is None or steps is None:
            yield "rows", "no training file given: steps are not known (data.train_files=…)"
        else:
            several = f" with {self.answers:,} answers" if self.answers not in (None, self.rows) else ""
            dropped = f", {self.dropped:,} dropped" if self.dropped else ""
            left = f"; {steps.left_over:,} left over each epoch" if steps.left_over else ""
            yield (
                "rows",
                f"{self.rows:,} kept{several}{dropped}; {steps.per_epoch:,} steps per epoch of {batch_text(cfg)}{left}",
            )
            yield "steps", self._steps_text(steps)
        tokens = tokens_per_step(cfg)
        uses = {"sampled": "sampled", "actor_forward": "through the student", "critic_forward": "through the critic"}
        yield "step", "at most " + ", ".join(f"{tokens[k]:,} tokens {use}" for k, use in uses.items() if tokens[k])
        if self.student:
            yield "models", self._models_text()
        values = flatten(cfg)
        for section, keys in shown_sections(cfg).items():
            yield section, "  ".join(f"{short}={_value(values[key])}{self._mark(key)}" for short, key in keys)

    def _steps_text(self, steps: Steps) -> str:
        cfg = self.cfg
        how = f"{cfg.trainer.total_epochs} epochs of {steps.per_epoch}" if not cfg.trainer.total_steps else "as set"
        critic = f"; critic alone in the first {steps.critic_only}" if steps.critic_only else ""
        saves = f"saves every {cfg.trainer.save_freq}" if cfg.trainer.save_freq else "saves at the end"
        tests = f"evaluates every {cfg.trainer.test_freq}" if cfg.trainer.test_freq else "evaluates at the end"
        if not (cfg.data.val_files or cfg.data.val_rows):
            tests = "never evaluates (no data.val_files, data.val_rows=0)"
        first = "; first samples one answer to every training prompt" if cfg.actor.objective == "soda" else ""
        return f"{steps.total:,} ({how}){critic}{first}; {saves}, {tests}"

    def _models_text(self) -> str:
        assert self.student is not None
        parts = [f"student {self.student.model_type} {billions(self.student.causal_params)}"]
        if self.memory and self.memory.actor.trainable != self.memory.actor.parameters:
            parts.append(f"{billions(self.memory.actor.trainable)} of it trained")
        if self.critic:
            parts.append(f"critic {self.critic.model_type} {billions(self.critic.critic_params)}")
        return ", ".join(parts)

    def _mark(self, key: str) -> str:
        """A star on what was not the preset's or the schema's word."""
        origin = self.origins.get(key, "default")
        return "" if origin == "default" or origin.startswith("presets/") else "*"

    def _peak(self, memory: MemoryEstimate) -> str:
        where = "per GPU" if self.device == "cuda" else "per process"
        text = f"training {gb(memory.training_peak)}, rollout {gb(memory.rollout_peak)} GiB {where}"
        if "device" in self.free_gb:
            text += f" (has {self.free_gb['device']:.0f})"
        text += f"; host {gb(memory.host_ram)} GiB"
        return text + (f" (has {self.free_gb['ram']:.0f} free)" if "ram" in self.free_gb else "")

    def _disk(self, memory: MemoryEstimate) -> str:
        text = f"{gb(memory.checkpoint)} GiB per checkpoint, {memory.checkpoints_kept} kept: {gb(memory.disk)} GiB"
        return text + (f" (has {self.free_gb['disk']:.0f} free)" if "disk" in self.free_gb else "")

    def _elsewhere(self, width: int) -> list[str]:
        """What GPUs would hold, and what makes the run fit them."""
        if not self.elsewhere:
            return []
        counts = " or ".join(", ".join(map(str, CLUSTERS)).rsplit(", ", 1))
        lines = wrap("on GPUs", f"this machine has none; each of {counts} GPUs of 80 GB would hold, in bfloat16", width)
        lines += holding_table(self.elsewhere, LABEL_WIDTH + 4)
        for holding in self.elsewhere:
            if holding.advice is not None:
                where = f"{holding.gpus} GPU{'s' if holding.gpus > 1 else ''}"
                lines += wrap("", f"- {advice_text(holding.advice, where)}", width)
        return lines

    def _writes_short(self) -> list[str]:
        run = f"{self.cfg.trainer.output_dir}/{self.cfg.trainer.exp_name or run_name(self.cfg)}/"
        return [run, *(name.removeprefix(run) for name in self.writes())]


def run_name(cfg: GadConfig) -> str:
    """A run's folder where trainer.exp_name is empty: <preset>-<stage>."""
    preset = cfg.preset.rpartition("/")[2].removesuffix(".yaml").removesuffix(".yml")
    return f"{preset}-{cfg.stage}" if preset else cfg.stage


def batch_text(cfg: GadConfig) -> str:
    answers = f" x {cfg.rollout.n} answers" if cfg.actor.objective == "policy" or cfg.trainer.critic_warmup >= 0 else ""
    return f"{cfg.data.train_batch_size} prompts{answers}"


def tokens_per_step(cfg: GadConfig) -> dict[str, int]:
    """Upper bounds of one step's tokens, every text at its limit.

    A prompt is forwarded once for all its answers. The student's passes: one for old log-probs and `ppo_epochs` with
    gradients (sft: one); the critic's: one to score, one to learn.
    """
    data, n = cfg.data, cfg.rollout.n
    samples = cfg.actor.objective == "policy" or cfg.trainer.critic_warmup >= 0
    policy = cfg.actor.objective == "policy"
    trained_on = {"policy": n, "soda": 2}.get(cfg.actor.objective, 1)
    row = data.max_prompt_length + trained_on * data.max_response_length
    critic_row = data.max_prompt_length + (n + 1) * data.max_response_length
    return {
        "prompts": data.train_batch_size,
        "answers": data.train_batch_size * n if samples else 0,
        "sampled": data.train_batch_size * n * data.max_response_length if samples else 0,
        "actor_forward": data.train_batch_size * row * (1 + cfg.actor.ppo_epochs if policy else 1),
        "critic_forward": data.train_batch_size * critic_row * 2 if cfg.trainer.critic_warmup >= 0 else 0,
    }


def shown_sections(cfg: GadConfig) -> dict[str, list[tuple[str, str]]]:
    """(short name, key) of the settings the plan shows for this stage, by section."""
    sections = dict(NUMBERS)
    if cfg.actor.objective != "policy":
        del sections["policy"]
    if cfg.trainer.critic_warmup < 0:
        del sections["critic"]
    shown = {}
    for section, names in sections.items():
        dotted = section == "policy"
        shown[section] = [(n.rpartition(".")[2], n) if dotted else (n, f"{section}.{n}") for n in names]
    return shown


def shown_keys(cfg: GadConfig) -> set[str]:
    return {key for pairs in shown_sections(cfg).values() for _, key in pairs}


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def wrap(label: str, text: str, width: int) -> list[str]:
    """`label` in a column, `text` beside it, broken at spaces."""
    room = max(20, width - LABEL_WIDTH - 2)
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > room:
            lines.append(line.rstrip())
            line = "  " + word if text.startswith("- ") else word.lstrip()
        else:
            line = f"{line} {word}" if line else word
    lines.append(line)
    head = f"  {label:<{LABEL_WIDTH}}"
    return [(head if index == 0 else " " * len(head)) + line for index, line in enumerate(lines)]


def memory_table(memory: MemoryEstimate) -> list[str]:
    """Per device, in GiB: a row a part, a column a model."""
    models: dict[str, ModelMemory | None] = {
        "student": memory.actor, "reference": memory.reference, "critic": memory.critic,
    }  # fmt: skip
    present = {name: model for name, model in models.items() if model is not None}
    columns = [*present, "sampler"]
    lines = [f"  {'GiB':<{LABEL_WIDTH + 4}}" + "".join(f"{name:>11}" for name in columns)]
    parts = ("weights", "gradients", "optimiser", "gathered", "activations", "logits")
    for part in parts:
        cells = [gb(value) if (value := getattr(model, part)) else "-" for model in present.values()]
        cells.append(gb(memory.sampler_weights) if part == "weights" and memory.sampler_weights else "-")
        lines.append(f"  {part:<{LABEL_WIDTH + 4}}" + "".join(f"{cell:>11}" for cell in cells))
    cells = ["-"] * len(present) + [gb(memory.kv_cache)]
    lines.append(f"  {'KV cache':<{LABEL_WIDTH + 4}}" + "".join(f"{cell:>11}" for cell in cells))
    return lines


def make_plan(
    cfg: GadConfig,
    rows: int | None,
    model_config: Mapping[str, Any] | None,
    critic_config: Mapping[str, Any] | None,
    world_size: int,
    *,
    dropped: int = 0,
    device: str = "cpu",
    engine: str = "vllm",
    warnings: Sequence[str] | None = None,
    origins: Mapping[str, str] | None = None,
    free_gb: Mapping[str, float] | None = None,
    answers: int | None = None,
) -> Plan:
    """Plan a stage; arithmetic only.

    `rows` kept by the data checks (None: no file yet) and `dropped` by them, `answers` the teacher's in these (one per
    row when None); `model_config` and `critic_config` are
    parsed config.json files (None: not on this machine; a critic without its own is the student's backbone).
    `device` is cpu or cuda, `engine` vllm or hf; `free_gb` may hold `device` (one GPU's memory), `ram` and `disk`.
    `warnings` are `check`'s (made here when None). Raises ConfigError, DataError.
    """
    found = list(check(cfg, world_size, origins) if warnings is None else warnings)
    has_critic = cfg.trainer.critic_warmup >= 0
    student = model_shape(model_config).cut(cfg.actor.model.num_layers) if model_config else None
    base = critic_config or (model_config if not cfg.critic.model.path else None)
    critic = model_shape(base).cut(cfg.critic.model.num_layers) if has_critic and base else None
    free = dict(free_gb or {})
    answers = rows if answers is None else answers
    each = cfg.stage == "seqkd" and cfg.actor.objective == "sft"  # trains on every answer
    items = answers if each else rows
    steps = count_steps(cfg, items) if items is not None else None
    found += unusual(cfg, steps)
    memory = None
    elsewhere: list[Holding] = []
    if student and (critic or not has_critic):
        placement = Placement(device, engine, world_size, student, critic, free.get("device"))
        memory = estimate(cfg, placement)
        found += too_large(cfg, placement, memory, free)
        if "disk" in free and memory.disk / GIB > free["disk"]:
            found.append(f"checkpoints need {memory.disk / GIB:.1f} GiB of disk, {free['disk']:.1f} are free")
        here = memory.host_ram / GIB <= free.get("ram", memory.host_ram / GIB)
        if device == "cpu" and cfg.trainer.device == "auto" and (student.causal_params >= LARGE or not here):
            elsewhere = what_gpus_hold(cfg, placement)
    return Plan(
        cfg=cfg,
        rows=rows,
        answers=answers,
        dropped=dropped,
        steps=steps,
        world_size=world_size,
        device=device,
        engine=engine,
        student=student,
        critic=critic,
        memory=memory,
        unusual=found,
        origins=origins or {},
        free_gb=free,
        elsewhere=elsewhere,
    )


def unusual(cfg: GadConfig, steps: Steps | None) -> Iterator[str]:
    """What the arithmetic of steps shows and the reader may not expect."""
    if steps is None:
        return
    warmup = cfg.trainer.critic_warmup
    if warmup > 0 and warmup * 2 >= steps.total and not cfg.trainer.total_steps:
        yield (
            f"trainer.critic_warmup={warmup} of {steps.total} steps: the student learns in {steps.actor} of them; "
            "lower it, or train longer"
        )
    rows = steps.per_epoch * cfg.data.train_batch_size + steps.left_over
    if steps.left_over * 5 > rows:
        yield (
            f"{steps.left_over} of {rows} rows are left over in each epoch; "
            f"a smaller data.train_batch_size uses more of them"
        )
