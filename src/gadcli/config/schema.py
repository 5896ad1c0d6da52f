"""The typed configuration: every key, its default, unit and bounds. Defaults live here and nowhere else.

Each field's metadata holds `doc` (one line, with the unit), and where they apply `min`, `max`, `choices`.
`resolve.py` fills the tree, `checks.py` judges combinations of keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LOSS_NAMES = ("original", "v1", "v2", "v2_raw", "final")
POLICY_LOSSES = ("gspo", "gspo_token", "grpo", "ppo", "dapo")
LOSS_AGG_MODES = ("auto", "seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
ADV_ESTIMATORS = ("grpo", "dr_grpo", "grpo_floor")
STAGES = ("seqkd", "warmup", "gad")
OBJECTIVES = ("sft", "policy", "soda", "best_of_n")
# What a stage implies where no preset, file or override says otherwise.
STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "seqkd": {"actor.objective": "sft", "trainer.critic_warmup": -1},
    "warmup": {"trainer.critic_warmup": 10},
    "gad": {},
}


def opt(
    default: Any,
    doc: str,
    *,
    min: float | None = None,
    max: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A config field with its documentation and bounds (inclusive)."""
    metadata = {"doc": doc, "min": min, "max": max, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def sub(cls: type, **overrides: Any) -> Any:
    """A nested section, optionally with other defaults than its class has."""
    return field(default_factory=lambda: cls(**overrides))


@dataclass
class LoraConfig:
    rank: int = opt(0, "LoRA rank; 0 trains all weights", min=0, max=1024)
    alpha: float = opt(16.0, "LoRA scaling: the update is alpha/rank * B @ A", min=0)
    dropout: float = opt(0.0, "dropout on the adapter's input", min=0, max=0.9)
    target_modules: str = opt("all-linear", "module names (comma-separated) or all-linear")


@dataclass
class ModelConfig:
    path: str = opt(
        "", "hub name, local Hugging Face folder, .gguf file, a run's global_step_N/actor|critic, or embedded"
    )
    dtype: str = opt(
        "auto", "compute dtype; auto is bfloat16 on GPUs and float32 on CPU", choices=("auto", "float32", "bfloat16")
    )
    num_layers: int = opt(0, "number of backbone layers to keep, counted from the first; 0 keeps all", min=0)
    train_layers: int = opt(
        0, "number of layers to train, counted from the last (the head included); 0 trains all", min=0
    )
    gradient_checkpointing: bool = opt(
        False, "recompute activations in the backward pass: less memory, about 30 % slower"
    )
    lora: LoraConfig = sub(LoraConfig)


@dataclass
class OptimConfig:
    lr: float = opt(1e-6, "peak learning rate of AdamW", min=0, max=1)
    weight_decay: float = opt(0.01, "decoupled weight decay", min=0, max=1)
    beta1: float = opt(0.9, "decay rate of Adam's first moment", min=0, max=0.9999)
    beta2: float = opt(0.999, "decay rate of Adam's second moment", min=0, max=0.999999)
    eps: float = opt(1e-8, "epsilon in Adam's denominator", min=0)
    lr_scheduler: str = opt("constant", "schedule after the warm-up", choices=("constant", "linear", "cosine"))
    lr_warmup_steps: int = opt(0, "steps of linear warm-up from 0", min=0)
    min_lr_ratio: float = opt(
        0.0, "final learning rate of linear and cosine schedules, as a fraction of lr", min=0, max=1
    )


@dataclass
class PolicyLossConfig:
    loss_mode: str = opt("gspo", "policy loss", choices=POLICY_LOSSES)


@dataclass
class SodaConfig:
    beta: float = opt(
        0.1, "beta of the preference loss: larger keeps the student closer to its start", min=1e-4, max=100
    )


@dataclass
class ActorConfig:
    model: ModelConfig = sub(ModelConfig)
    objective: str = opt(
        "policy",
        "what the actor learns from: teacher text (sft), its own samples by their advantages (policy), the sample that "
        "a fixed critic ranks first (best_of_n), or preferring the teacher's answer to its own first one (soda)",
        choices=OBJECTIVES,
    )
    soda: SodaConfig = sub(SodaConfig)
    optim: OptimConfig = sub(OptimConfig)
    grad_clip: float = opt(1.0, "maximum gradient norm; 0 disables clipping", min=0)
    ppo_epochs: int = opt(1, "passes over the samples of a step", min=1, max=100)
    ppo_mini_batch_size: int = opt(0, "prompts per optimizer step; 0 takes the whole batch", min=0)
    micro_batch_tokens: int = opt(
        16384, "tokens per micro-batch and device (gradients accumulate over micro-batches)", min=1
    )
    policy_loss: PolicyLossConfig = sub(PolicyLossConfig)
    loss_agg_mode: str = opt(
        "auto",
        "how token losses are averaged; auto: token-mean for ppo and dapo, else seq-mean-token-mean",
        choices=LOSS_AGG_MODES,
    )
    clip_ratio_low: float = opt(0.2, "lower clip: ratio >= 1 - low", min=0, max=1)
    clip_ratio_high: float = opt(0.2, "upper clip: ratio <= 1 + high", min=0, max=10)
    clip_ratio_c: float = opt(3.0, "dual clip for negative advantages (grpo, ppo, dapo)", min=1)
    use_kl_loss: bool = opt(False, "add kl_loss_coef * KL(actor || reference) to the loss")
    kl_loss_coef: float = opt(0.001, "weight of the KL loss", min=0)
    kl_loss_type: str = opt("low_var_kl", "estimator of the KL", choices=("low_var_kl", "kl", "mse"))
    entropy_coeff: float = opt(0.0, "weight of the entropy bonus", min=0)
    importance_correction: str = opt(
        "none", "correction for log-prob differences between sampler and trainer", choices=("none", "tis")
    )
    tis_cap: float = opt(2.0, "maximum weight of truncated importance sampling", min=1)


@dataclass
class V1LossConfig:
    margin: float = opt(1.0, "lower hinge: minimum gap", min=0)
    ranking_weight: float = opt(0.5, "weight of the ranking term", min=0)
    temperature: float = opt(2.0, "divides the gap in the ranking term", min=1e-6)
    clamp: float = opt(10.0, "bound on the gap divided by the temperature, in both directions", min=0)


@dataclass
class V2LossConfig(V1LossConfig):
    max_margin: float = opt(5.0, "upper hinge: maximum gap", min=0)


@dataclass
class V2RawLossConfig(V2LossConfig):
    score_reg: float = opt(0.005, "weight of mean(t_raw^2 + s_raw^2)", min=0)


@dataclass
class FinalLossConfig:
    ranking_weight: float = opt(1.5, "weight of the ranking term", min=0)
    temperature: float = opt(2.0, "divides the gap in the ranking term", min=1e-6)
    clamp: float = opt(10.0, "bound on the gap divided by the temperature, in both directions", min=0)
    score_reg: float = opt(0.005, "weight of mean t_raw^2 + mean s_raw^2", min=0)
    penalty_threshold: float = opt(1.5, "gap above which the square penalty acts", min=0)
    penalty_weight: float = opt(0.5, "weight of the square penalty", min=0)


@dataclass
class CriticConfig:
    model: ModelConfig = sub(ModelConfig)
    optim: OptimConfig = sub(OptimConfig)
    grad_clip: float = opt(1.0, "maximum gradient norm; 0 disables clipping", min=0)
    ppo_mini_batch_size: int = opt(0, "prompts per optimizer step; 0 takes the whole batch", min=0)
    micro_batch_tokens: int = opt(16384, "tokens per micro-batch and device", min=1)
    loss: str = opt("original", "discriminator loss", choices=LOSS_NAMES)
    values: str = opt("last", "response tokens that carry a value: the last one, or all", choices=("last", "all"))
    reads: str = opt(
        "all",
        "what the discriminator reads of an answer: all of it, or what stands outside <think>…</think> (answer); norm "
        "and all length metrics count the same",
        choices=("all", "answer"),
    )
    v1: V1LossConfig = sub(V1LossConfig)
    v2: V2LossConfig = sub(V2LossConfig)
    v2_raw: V2RawLossConfig = sub(V2RawLossConfig)
    final: FinalLossConfig = sub(FinalLossConfig)
    label_smoothing: float = opt(
        0.0, "label smoothing in the ranking term: fraction of pairs treated as swapped", min=0, max=0.5
    )
    centring: float = opt(0.0, "weight of mean (t_raw + s_raw)^2", min=0)
    gradient_penalty: float = opt(0.0, "weight of R1 on the teacher's input embeddings", min=0)


@dataclass
class KlCtrlConfig:
    kl_coef: float = opt(
        0.0, "weight of the KL in the reward; has no effect unless algorithm.use_kl_in_reward=true", min=0
    )


@dataclass
class AlgorithmConfig:
    adv_estimator: str = opt("grpo", "group advantage estimator", choices=ADV_ESTIMATORS)
    sigma_min: float = opt(0.1, "minimum standard deviation of a group (grpo_floor)", min=1e-8)
    reward_clip: float = opt(0.0, "clamp the sum of `rewards` to [-x, x]; 0 does not", min=0)
    use_kl_in_reward: bool = opt(False, "subtract kl_coef * KL from the reward")
    kl_ctrl: KlCtrlConfig = sub(KlCtrlConfig)


@dataclass
class DataConfig:
    train_files: list[str] = opt([], "parquet, Arrow, JSON or CSV files, folders or globs")
    val_files: list[str] = opt([], "held-out files; empty splits val_rows off the training file by content hash")
    prompt_key: str = opt("content", "column of chat messages")
    response_key: str = opt("teacher_response", "column of the teacher's answer")
    template_kwargs: dict[str, Any] = opt(
        {},
        "variables for the student's chat template, e.g. {enable_thinking: false}; later settings add to earlier ones",
    )
    turns: str = opt(
        "last",
        "assistant turns that seqkd trains on: the teacher's answer alone (last), or those of the prompt too (each)",
        choices=("last", "each"),
    )
    train_batch_size: int = opt(128, "prompts per step, over all devices", min=1)
    max_prompt_length: int = opt(1024, "maximum prompt length in tokens, chat template included", min=1)
    max_response_length: int = opt(256, "maximum answer length in tokens, end token included", min=1)
    truncation: str = opt(
        "error",
        "what to do with a teacher answer (or prompt) over its limit",
        choices=("error", "left", "right", "drop"),
    )
    on_bad_row: str = opt("error", "what to do with an invalid row", choices=("error", "drop"))
    strict: bool = opt(False, "fail on what is otherwise a warning (duplicates, special-token text)")
    shuffle: bool = opt(True, "shuffle every epoch, from seed and epoch")
    val_rows: int = opt(0, "held-out rows per evaluation; 0 uses all of val_files", min=0)


@dataclass
class RolloutConfig:
    engine: str = opt("auto", "sampler; auto takes vllm where it is installed", choices=("auto", "vllm", "hf"))
    n: int = opt(8, "answers per prompt", min=1, max=1024)
    temperature: float = opt(1.0, "sampling temperature", min=0.01, max=10)
    top_p: float = opt(1.0, "top-p probability mass", min=0.01, max=1)
    top_k: int = opt(-1, "sample from the k most likely tokens; -1 disables", min=-1)
    max_model_len: int = opt(2048, "maximum tokens of prompt and answer together", min=2)
    max_num_seqs: int = opt(128, "maximum sequences decoded concurrently", min=1)
    kv_cache_gb: float = opt(
        0.0, "KV cache in GiB; 0 sizes it from max_num_seqs (CPU) or gpu_memory_utilization", min=0
    )
    gpu_memory_utilization: float = opt(0.4, "fraction of a GPU's memory for the sampler", min=0.05, max=0.95)
    enforce_eager: bool = opt(False, "no CUDA graphs: faster start, slower decoding (no effect on CPUs)")
    tensor_parallel_size: int = opt(1, "tensor-parallel size per vLLM engine, within a machine", min=1)
    sleep: bool = opt(False, "free the sampler's GPU memory while training: vLLM's weights move to host memory")
    sync_tolerance: float = opt(
        0.0,
        "largest probe difference in log-prob after a sync; 0 is 1e-3 in float32, and a mean of 0.5 in bfloat16",
        min=0,
    )


@dataclass
class TensorBoardConfig:
    auto_start: str = opt("gad", "stages that start TensorBoard", choices=("never", "gad", "always"))
    host: str = opt("127.0.0.1", "address to listen on; anything else is reachable from outside")
    port: int = opt(6006, "first port to try", min=1, max=65535)
    keep: bool = opt(False, "leave TensorBoard running after the run")


@dataclass
class TrainerConfig:
    exp_name: str = opt("", "name of the run's folder; empty is <preset>-<stage>")
    output_dir: str = opt("runs", "folder for runs")
    total_epochs: int = opt(1, "passes over the training rows", min=1)
    total_steps: int = opt(0, "stop after this many steps; 0 follows total_epochs", min=0)
    max_time_s: float = opt(0.0, "save and stop after this many seconds of training; 0 is no limit", min=0)
    critic_warmup: int = opt(0, "steps that train the critic alone before the actor learns; -1: no critic", min=-1)
    critic_warmup_until: float = opt(
        0.0, "end the critic-only phase early at this held-out d_acc; 0 goes by steps", min=0, max=1
    )
    save_freq: int = opt(0, "steps between checkpoints; 0 saves at the end only", min=0)
    async_save: str = opt(
        "auto",
        "write checkpoints in the background from a copy in host memory; auto: on GPUs",
        choices=("auto", "always", "never"),
    )
    keep_last: int = opt(2, "checkpoints to keep", min=2)
    keep_best: str = opt(
        "", "save and keep the best evaluation's weights by this val metric, e.g. val/rouge_l or val/nll"
    )
    stop_after: int = opt(
        0, "end the run after this many evaluations in a row without a better trainer.keep_best; 0 never does", min=0
    )
    test_freq: int = opt(0, "steps between evaluations on the held-out rows; 0 evaluates at the end only", min=0)
    val_before_train: bool = opt(False, "also evaluate before the first step")
    seed: int = opt(1, "seed of weights, order and sampling", min=0)
    device: str = opt("auto", "auto takes CUDA where it is", choices=("auto", "cpu", "cuda"))
    nproc: int = opt(0, "processes on this machine; 0: one per GPU, or one on CPU", min=0)
    nnodes: int = opt(1, "machines", min=1)
    logger: list[str] = opt(["console", "tensorboard"], "where metrics go: console, tensorboard, wandb")
    tensorboard: TensorBoardConfig = sub(TensorBoardConfig)


@dataclass
class FsdpConfig:
    reshard_after_forward: bool = opt(True, "free gathered weights after the forward pass: less memory, more traffic")
    gather: str = opt(
        "auto",
        "gather weights and reduce gradients in each micro_batch, or once an optimiser step: less traffic, but both "
        "stay whole in memory; auto: step where they take 2 GiB at most",
        choices=("auto", "micro_batch", "step"),
    )
    replicate: int = opt(1, "HSDP: copies of the sharded model (1 shards over all devices)", min=1)
    offload_reference: bool = opt(False, "keep the reference's weights in host memory between uses")
    offload_critic: bool = opt(False, "keep the critic's weights and optimiser in host memory between uses")
    timeout_s: float = opt(600.0, "seconds without a sign of life before a peer counts as lost", min=1)


@dataclass
class HealthConfig:
    on_bad: str = opt(
        "warn", "what to do when a run collapses: warn, or save and exit with code 5", choices=("warn", "stop")
    )


@dataclass
class GadConfig:
    """One stage's configuration, fully resolved."""

    stage: str = opt("gad", "which stage", choices=STAGES)
    preset: str = opt("", "preset this came from")
    data: DataConfig = sub(DataConfig)
    actor: ActorConfig = sub(ActorConfig)
    critic: CriticConfig = sub(CriticConfig)
    algorithm: AlgorithmConfig = sub(AlgorithmConfig)
    rollout: RolloutConfig = sub(RolloutConfig)
    trainer: TrainerConfig = sub(TrainerConfig)
    fsdp: FsdpConfig = sub(FsdpConfig)
    health: HealthConfig = sub(HealthConfig)
    rewards: list[Any] = opt(
        [],
        "what the student is rewarded for, a list of {kind, name, weight, …} (docs/rewards.md); empty is the "
        "discriminator alone",
    )
