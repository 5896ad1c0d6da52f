"""Rules that no single key can state: what a stage needs, what divides what, what is set and does nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from gadcli.config.model_refusals import check_context, check_model_folder, vocabulary_of
from gadcli.config.modelinfo import local_model_dir, read_model_config
from gadcli.config.rewards import reward_specs
from gadcli.config.schema import GadConfig
from gadcli.errors import ConfigError

LOGGERS = ("console", "tensorboard", "wandb")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONG_RESPONSE = 256  # tokens above which a sum of values saturates the untempered ranking loss
UNTRAINED_CRITIC = "no --reward-model: gad starts from an untrained discriminator, scores are noise; run warmup first"
OBJECTIVES_OF = {"seqkd": ("sft", "soda"), "warmup": ("policy", "sft"), "gad": ("policy", "best_of_n")}  # usual first
OF_THE_CRITIC = ("val/d_acc", "val/probe_")  # it moves, so its figures of two steps do not compare
COLD = 0.3  # temperature below which a group's samples are nearly equal


class Checker:
    """One configuration being checked. `origins` (of `Resolved`) lets messages say where a value was written."""

    def __init__(self, cfg: GadConfig, world_size: int, origins: Mapping[str, str]) -> None:
        self.cfg, self.world_size, self.origins = cfg, world_size, origins

    def fail(self, key: str, message: str, hint: str) -> None:
        origin = self.origins.get(key, "default")
        raise ConfigError(message if origin == "default" else f"{origin}: {message}", hint)

    def stage(self) -> None:
        """What learns in each stage, and from whom (algorithm: the game)."""
        cfg = self.cfg
        has_critic = cfg.trainer.critic_warmup >= 0
        self.objective()
        if cfg.stage == "seqkd" and has_critic:
            message = f"trainer.critic_warmup is {cfg.trainer.critic_warmup}, but seqkd has no critic"
            self.fail("trainer.critic_warmup", message, "trainer.critic_warmup=-1")
        if cfg.stage != "seqkd" and not has_critic:
            hint = f"trainer.critic_warmup={10 if cfg.stage == 'warmup' else 0}"
            self.fail("trainer.critic_warmup", f"trainer.critic_warmup is -1, but {cfg.stage} needs a critic", hint)

    def objective(self) -> None:
        """What the student may learn from in each stage: soda needs no critic, best_of_n one that was trained."""
        cfg, key = self.cfg, "actor.objective"
        if cfg.actor.objective not in OBJECTIVES_OF[cfg.stage]:
            allowed = " or ".join(OBJECTIVES_OF[cfg.stage])
            elsewhere = [stage for stage, known in OBJECTIVES_OF.items() if cfg.actor.objective in known]
            hint = f"{key}={allowed.partition(' ')[0]}, or gad train {elsewhere[0]} {key}={cfg.actor.objective}"
            self.fail(key, f"{key} is {cfg.actor.objective}, but {cfg.stage} takes {allowed}", hint)
        if cfg.actor.objective != "best_of_n":
            return
        if cfg.trainer.critic_warmup > 0:
            message = f"trainer.critic_warmup is {cfg.trainer.critic_warmup}, but best_of_n does not train the critic"
            self.fail("trainer.critic_warmup", message, "trainer.critic_warmup=0")
        if not cfg.critic.model.path:
            message = "actor.objective=best_of_n ranks answers by a trained critic, and critic.model.path is empty"
            self.fail("critic.model.path", message, "--reward-model RUN/global_step_N/critic of a warmup stage")

    def groups(self) -> None:
        cfg = self.cfg
        if cfg.actor.objective in ("policy", "best_of_n") and cfg.rollout.n < 2:
            why = "group advantages need" if cfg.actor.objective == "policy" else "best_of_n needs"
            self.fail("rollout.n", f"rollout.n is {cfg.rollout.n}, but {why} 2 or more", "rollout.n=8")

    def division(self) -> None:
        """Batches split evenly over ranks and mini-batches."""
        cfg, world = self.cfg, self.world_size
        batch = cfg.data.train_batch_size
        if batch % world:
            message = f"data.train_batch_size is {batch}, which is not divisible by {world} processes"
            near = max(world, round(batch / world) * world)
            self.fail("data.train_batch_size", message, f"data.train_batch_size={near}")
        minis = {"actor.ppo_mini_batch_size": cfg.actor.ppo_mini_batch_size}
        if cfg.trainer.critic_warmup >= 0:
            minis["critic.ppo_mini_batch_size"] = cfg.critic.ppo_mini_batch_size
        for key, mini in minis.items():
            if not mini:
                continue
            if batch % mini:
                message = f"{key} is {mini}, which does not divide data.train_batch_size ({batch})"
                fits = [size for size in range(world, batch + 1, world) if batch % size == 0]
                self.fail(key, message, f"{key}={min(fits, key=lambda size: abs(size - mini))}")
            if mini % world:
                message = f"{key} is {mini}, which is not divisible by {world} processes"
                self.fail(key, message, f"{key}=0 takes the whole batch")
        copies = cfg.fsdp.replicate
        if world % copies:
            message = f"fsdp.replicate is {copies}, which does not divide the {world} processes"
            self.fail("fsdp.replicate", message, "fsdp.replicate=1")

    def lengths(self) -> None:
        cfg = self.cfg
        total = cfg.data.max_prompt_length + cfg.data.max_response_length
        if total > cfg.rollout.max_model_len:
            message = (
                f"data.max_prompt_length + data.max_response_length is {cfg.data.max_prompt_length} + "
                f"{cfg.data.max_response_length} = {total}, over rollout.max_model_len ({cfg.rollout.max_model_len})"
            )
            room = cfg.rollout.max_model_len - cfg.data.max_response_length
            hint = f"rollout.max_model_len={total}" + (f" or data.max_prompt_length={room}" if room > 0 else "")
            self.fail("rollout.max_model_len", message, hint)

    def turns(self) -> None:
        cfg = self.cfg
        if cfg.data.turns == "each" and cfg.stage == "seqkd":
            if cfg.actor.objective != "sft":
                message = f"data.turns is each, but actor.objective={cfg.actor.objective} learns from single answers"
                self.fail("data.turns", message, "data.turns=last")
            if cfg.data.truncation in ("left", "right"):
                message = f"data.truncation is {cfg.data.truncation}, but chats of several trained turns are not cut"
                self.fail("data.truncation", message, "data.truncation=drop")

    def trainer(self) -> None:
        trainer = self.cfg.trainer
        for name in trainer.logger:
            if name not in LOGGERS:
                message = f"trainer.logger holds {name!r}, but knows {', '.join(LOGGERS)}"
                self.fail("trainer.logger", message, "trainer.logger=[console,tensorboard]")
        if trainer.keep_best and not trainer.keep_best.startswith("val/"):
            message = f"trainer.keep_best is {trainer.keep_best!r}, but only val/… metrics are held out"
            self.fail("trainer.keep_best", message, "trainer.keep_best=val/rouge_l")
        if trainer.keep_best.startswith(OF_THE_CRITIC):
            message = f"trainer.keep_best is {trainer.keep_best}, which the discriminator in training measures"
            self.fail("trainer.keep_best", message, "trainer.keep_best=val/rouge_l or val/nll")
        if trainer.stop_after and not trainer.keep_best:
            message = "trainer.stop_after waits for a better trainer.keep_best, which is empty"
            self.fail("trainer.keep_best", message, "trainer.keep_best=val/nll")
        if trainer.keep_best and not trainer.test_freq:
            message = "trainer.keep_best needs evaluations while training, and trainer.test_freq is 0"
            self.fail("trainer.test_freq", message, "trainer.test_freq=20")

    def roles(self) -> None:
        """A student where a student belongs, a critic where a critic belongs."""
        cfg = self.cfg
        if _role(cfg.actor.model.path) == "critic":
            message = f"actor.model.path is {cfg.actor.model.path}, which is a discriminator"
            self.fail("actor.model.path", message, "give a causal language model as --model")
        if cfg.trainer.critic_warmup >= 0 and Path(cfg.critic.model.path).name == "actor":
            message = f"critic.model.path is {cfg.critic.model.path}, which is a student's checkpoint, not a critic's"
            hint = "give warmup's global_step_N/critic; in warmup, leave --reward-model out to start from the student"
            self.fail("critic.model.path", message, hint)

    def models(self) -> None:
        """Models that the worker would refuse for what their folders say. Where these are local."""
        paths = [self.cfg.actor.model.path]
        if self.cfg.trainer.critic_warmup >= 0 and self.cfg.critic.model.path:
            paths.append(self.cfg.critic.model.path)
        for path in paths:
            if folder := local_model_dir(path):
                check_model_folder(path, folder)
                check_context(path, folder, self.cfg.rollout.max_model_len)

    def layers(self) -> None:
        """A backbone can only be cut to layers it has. Where its config.json is local."""
        cfg = self.cfg
        models = {"actor.model": (cfg.actor.model.path, cfg.actor.model.num_layers)}
        if cfg.trainer.critic_warmup >= 0:
            models["critic.model"] = (cfg.critic.model.path or cfg.actor.model.path, cfg.critic.model.num_layers)
        for section, (path, wanted) in models.items():
            config = (read_model_config(path) if wanted else None) or {}
            has = (config.get("text_config") or config).get("num_hidden_layers")
            if has is not None and wanted > has:
                message = f"{section}.num_layers is {wanted}, but {path} has {has} layers"
                self.fail(f"{section}.num_layers", message, f"{section}.num_layers=0 keeps all")

    def vocabularies(self) -> None:
        """The critic reads the student's token ids: both must mean the same by them. Where files are local."""
        cfg = self.cfg
        if cfg.trainer.critic_warmup < 0 or not cfg.critic.model.path:
            return
        student, critic = local_model_dir(cfg.actor.model.path), local_model_dir(cfg.critic.model.path)
        if student is None or critic is None or student == critic:
            return
        difference = vocabulary_difference(student, critic)
        if difference:
            hint = "the discriminator must be of the student's family, with the same tokenizer"
            self.fail("critic.model.path", f"student and critic have different vocabularies: {difference}", hint)

    def tensor_parallel(self) -> None:
        """One engine spans ranks of one machine, and splits the student's heads evenly."""
        cfg, key = self.cfg, "rollout.tensor_parallel_size"
        size, here = cfg.rollout.tensor_parallel_size, self.world_size // cfg.trainer.nnodes
        if size == 1:
            return
        if cfg.rollout.engine == "hf":
            self.fail(key, f"{key} is {size}, but rollout.engine=hf samples on every process alone", f"{key}=1")
        if here % size:
            self.fail(key, f"{key} is {size}, which does not divide the {here} processes per machine", f"{key}=1")
        config = read_model_config(cfg.actor.model.path) or {}
        heads = (config.get("text_config") or config).get("num_attention_heads")
        if heads is not None and heads % size:
            fits = max(n for n in range(1, size) if heads % n == 0 and here % n == 0)
            self.fail(key, f"{key} is {size}, which does not divide the student's {heads} heads", f"{key}={fits}")

    def unsupported(self) -> None:
        """Settings that nothing would act on, or that would act wrongly: refused, not ignored."""
        cfg = self.cfg
        if cfg.rollout.sleep and (cfg.trainer.device == "cpu" or cfg.rollout.engine == "hf"):
            message = "rollout.sleep gives the GPU memory of vLLM back: it needs both"
            self.fail("rollout.sleep", message, "rollout.sleep=false")
        if cfg.actor.model.num_layers:
            message = "actor.model.num_layers cuts the student, but the sampler would run all of its layers"
            self.fail(
                "actor.model.num_layers",
                message,
                "gad cut MODEL -o DIR --layers N makes a smaller student; actor.model.num_layers=0",
            )
        if cfg.actor.model.lora.dropout and cfg.actor.objective in ("policy", "soda"):
            message = (
                "actor.model.lora.dropout makes log-probs that are compared differ by chance under "
                f"actor.objective={cfg.actor.objective}"
            )
            self.fail("actor.model.lora.dropout", message, "actor.model.lora.dropout=0")
        if cfg.critic.model.lora.dropout:
            message = "critic.model.lora.dropout makes equal texts score differently by chance"
            self.fail("critic.model.lora.dropout", message, "critic.model.lora.dropout=0")
        if cfg.critic.gradient_penalty and cfg.critic.model.gradient_checkpointing:
            message = "critic.gradient_penalty differentiates twice, which gradient checkpointing does not support"
            self.fail("critic.gradient_penalty", message, "critic.model.gradient_checkpointing=false")
        if cfg.trainer.critic_warmup_until and not cfg.trainer.test_freq:
            message = "trainer.critic_warmup_until looks at held-out d_acc, and trainer.test_freq is 0"
            self.fail("trainer.critic_warmup_until", message, "trainer.test_freq=5")

    def warnings(self) -> Iterator[str]:
        """What is legal and probably not meant."""
        cfg = self.cfg
        actor, critic, algorithm = cfg.actor, cfg.critic, cfg.algorithm
        if algorithm.kl_ctrl.kl_coef and not algorithm.use_kl_in_reward:
            yield (
                f"algorithm.kl_ctrl.kl_coef={algorithm.kl_ctrl.kl_coef:g} has no effect: it acts only with "
                "algorithm.use_kl_in_reward=true (the KL loss has its own actor.kl_loss_coef)"
            )
        if algorithm.use_kl_in_reward and not algorithm.kl_ctrl.kl_coef:
            yield "algorithm.use_kl_in_reward is on with algorithm.kl_ctrl.kl_coef=0: nothing is subtracted"
        if actor.use_kl_loss and not actor.kl_loss_coef:
            yield "actor.use_kl_loss is on with actor.kl_loss_coef=0: the reference is run for nothing"
        if actor.use_kl_loss and actor.objective != "policy":
            yield f"actor.use_kl_loss does nothing under actor.objective={actor.objective}"
        if actor.objective in ("policy", "best_of_n") and cfg.rollout.temperature < COLD:
            yield f"rollout.temperature={cfg.rollout.temperature:g}: a group's answers will hardly differ; .8 is usual"
        if cfg.trainer.critic_warmup >= 0:
            yield from self._critic_warnings()
        steps, alone = cfg.trainer.total_steps, cfg.trainer.critic_warmup
        if steps and alone * 2 >= steps and not (cfg.stage == "warmup" and alone >= steps):
            yield _long_warmup(alone, steps)
        if cfg.data.train_files and not (cfg.data.val_files or cfg.data.val_rows):
            yield from self._without_held_out_rows()
        if cfg.trainer.tensorboard.host not in LOOPBACK:
            yield f"trainer.tensorboard.host={cfg.trainer.tensorboard.host}: TensorBoard will be reachable from outside"
        yield from self._reward_warnings()
        if critic.loss == "original" and critic.values == "all" and cfg.data.max_response_length > LONG_RESPONSE:
            yield "critic.values=all with critic.loss=original saturates on long answers; critic.values=last"

    def _reward_warnings(self) -> Iterator[str]:
        cfg = self.cfg
        if cfg.algorithm.reward_clip and not cfg.rewards:
            yield "algorithm.reward_clip does nothing without a `rewards` list"
        if cfg.rewards and (cfg.stage == "seqkd" or cfg.actor.objective == "sft"):
            yield "rewards do nothing while the student learns by supervised training (actor.objective=sft)"
        elif cfg.rewards and not any(spec.kind == "discriminator" for spec in reward_specs(cfg.rewards)):
            yield "rewards lists no discriminator: it is trained, but the student does not learn from its score"

    def _without_held_out_rows(self) -> Iterator[str]:
        trainer = self.cfg.trainer
        wanted = {
            "trainer.test_freq": trainer.test_freq,
            "trainer.keep_best": trainer.keep_best,
            "trainer.val_before_train": trainer.val_before_train,
            "trainer.critic_warmup_until": trainer.critic_warmup_until,
        }
        if inert := [key for key, value in wanted.items() if value]:
            yield f"{', '.join(inert)}: no effect without held-out rows; set data.val_files or data.val_rows"

    def _critic_warnings(self) -> Iterator[str]:
        cfg = self.cfg
        if cfg.critic.loss == "v1":
            yield "critic.loss=v1 has no upper bound: scores were seen to run away; critic.loss=final"
        if cfg.stage == "gad" and not cfg.critic.model.path:
            yield UNTRAINED_CRITIC
        elif cfg.stage == "gad" and _role(cfg.critic.model.path) == "actor":
            yield f"--reward-model {cfg.critic.model.path} is a language model: its scalar head starts untrained"


def _long_warmup(critic_warmup: int, steps: int) -> str:
    return (
        f"trainer.critic_warmup={critic_warmup} of {steps} steps: the student learns in half of them or fewer; "
        "lower it, or train longer"
    )


def _role(path: str) -> str:
    """`actor`, `critic` or unknown (empty), by a checkpoint folder's name or a config.json's architectures."""
    if Path(path).name in ("actor", "critic"):
        return Path(path).name
    architectures = str((read_model_config(path) or {}).get("architectures") or "")
    if "ForTokenClassification" in architectures or "ForSequenceClassification" in architectures:
        return "critic"
    return "actor" if "ForCausalLM" in architectures else ""


def vocabulary_difference(one: Path, other: Path) -> str:
    """How two model folders' vocabularies differ (empty if they agree): tokens by id, else the sizes in config.json."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if all(file.is_file() for file in files):
        texts = [file.read_bytes() for file in files]
        if texts[0] == texts[1]:
            return ""
        ours, theirs = (vocabulary_of(json.loads(text)) for text in texts)
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        if differing:
            example = differing[0]
            ids = f"{ours.get(example)} and {theirs.get(example)}"
            return f"{len(differing)} tokens have other ids, e.g. {example!r}: {ids}"
        return ""
    sizes = [_vocab_size(folder) for folder in (one, other)]
    return f"{sizes[0]} and {sizes[1]} tokens" if None not in sizes and sizes[0] != sizes[1] else ""


def _vocab_size(folder: Path) -> int | None:
    config = read_model_config(str(folder)) or {}
    size = (config.get("text_config") or config).get("vocab_size")
    return int(size) if size is not None else None


def check(cfg: GadConfig, world_size: int = 1, origins: Mapping[str, str] | None = None) -> list[str]:
    """Judge a configuration for `world_size` processes.

    Returns warnings (one line each). Raises ConfigError with the cure as an override. Reads config.json and
    tokenizer.json of local models; loads nothing.
    """
    checker = Checker(cfg, world_size, origins or {})
    checker.stage()
    checker.groups()
    checker.division()
    checker.lengths()
    checker.turns()
    checker.trainer()
    checker.tensor_parallel()
    checker.unsupported()
    checker.roles()
    checker.models()
    checker.layers()
    checker.vocabularies()
    return list(checker.warnings())


def check_inputs(cfg: GadConfig) -> None:
    """What a real run (not a dry one) needs besides: a student and training files. Raises ConfigError."""
    if not cfg.actor.model.path:
        raise ConfigError("no student: actor.model.path is empty", "--model MODEL")
    if not cfg.data.train_files:
        raise ConfigError("no training data: data.train_files is empty", "data.train_files=train.parquet")
