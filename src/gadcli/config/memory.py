"""Memory of a run from arithmetic: weights, gradients, optimiser, activations, logits, KV cache; host RAM and disk.

All sizes in bytes unless named `_gb` (GiB). What is counted follows the engine: float32 master weights sharded over
the processes, compute in bfloat16 on GPUs, rows of (prompt + its answers) split by `micro_batch_tokens`, logits one
chunk at a time, gradients freed after each update, one vLLM engine a process that stays while training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gadcli.config.modelinfo import ModelShape
from gadcli.config.schema import FsdpConfig, GadConfig, ModelConfig

GIB = 2**30
FP32 = 4
ADAM_BYTES = 8  # two float32 moments a trainable weight
GATHER_ONCE_BYTES = 2 * GIB  # of whole weights and gradients on every device, which `fsdp.gather=auto` spends on speed
LOGITS_CHUNK = {"cpu": 8 * 2**20, "cuda": 128 * 2**20}  # logits alive at once, as model.chunked_logprobs has them
LOGITS_COPIES = 4  # logits, log-softmax, probabilities and their gradient
KV_CPU_RANGE = (2**28, 2**30)  # what the sampler takes on CPU when rollout.kv_cache_gb is 0
RUNTIME = {"cpu": 0.55 * GIB, "cuda": 1.2 * GIB}  # torch, transformers, data; CUDA context, NCCL buffers
ENGINE_RUNTIME = {"cpu": 0.5 * GIB, "cuda": 1.0 * GIB}  # vLLM beside weights and KV cache
HOST_PER_GPU_PROCESS = 5 * GIB
HEAP_PIECES = 64 * 2**10  # bytes a layer and unit of width that glibc's heap holds free in pieces of no use (measured)


def gb(size: float) -> str:
    """Bytes in GiB, to one decimal."""
    return f"{size / GIB:.1f}"


@dataclass(frozen=True)
class Placement:
    """What the estimate depends on besides the config: the devices and the shapes of the models."""

    device: str  # cpu or cuda
    engine: str  # vllm or hf
    world_size: int
    student: ModelShape
    critic: ModelShape | None
    device_gb: float | None = None  # a GPU's memory, where known
    local_size: int = 0  # processes a machine; 0 shares the world out over trainer.nnodes


@dataclass(frozen=True)
class ModelMemory:
    """One trained (or frozen) model on one device."""

    parameters: int
    trainable: int
    weights: float
    gradients: float
    optimiser: float
    gathered: float
    activations: float
    logits: float
    micro_batches: int = 1
    stored: float = 0.0  # the whole model's weights, as a checkpoint has them
    pieces: float = 0.0  # on CPUs, of the C library's heap
    on_gpu: float = 0.0  # on GPUs, the whole of `updating` (`gpu_update_bytes`)

    @property
    def resident(self) -> float:
        return self.weights + self.optimiser

    @property
    def updating(self) -> float:
        """What an update takes on top of what is resident.

        Gradients fill up while activations are freed (measured: about half of these are left when all of those are
        there); from the second micro-batch on they are there beforehand.
        """
        if self.on_gpu:
            return self.on_gpu
        passing = self.activations + self.logits
        if self.micro_batches > 1:
            return self.gathered + self.pieces + self.gradients + passing
        return self.gathered + self.pieces + max(passing, self.gradients + passing / 2)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device (on CPU: in one process), on the host, and on disk."""

    actor: ModelMemory
    reference: ModelMemory | None
    critic: ModelMemory | None
    sampler_weights: float
    kv_cache: float
    runtime: float
    training_peak: float
    rollout_peak: float
    host_ram: float
    checkpoint: float
    checkpoints_kept: int

    @property
    def disk(self) -> float:
        return self.checkpoint * self.checkpoints_kept

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "disk": self.disk}


def compute_bytes(cfg: ModelConfig, device: str) -> int:
    """Bytes of a scalar in forward passes."""
    dtype = cfg.dtype if cfg.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
    return 2 if dtype == "bfloat16" else 4


def trainable_params(shape: ModelShape, cfg: ModelConfig, total: int, head: int) -> int:
    """Weights that get gradients, of `total`; `head` is what lies above the layers and always trains."""
    if cfg.lora.rank:
        return shape.lora_params(cfg.lora.rank)
    if cfg.train_layers and cfg.train_layers < shape.layers:
        return cfg.train_layers * shape.layer_params + shape.hidden + head
    return total


@dataclass(frozen=True)
class Passes:
    """How one device's share of an optimiser step is cut: `rows` of `row_tokens` at once, in `count` micro-batches."""

    row_tokens: int
    answer_tokens: int  # of one row
    rows: int
    count: int
    answers: int = 1  # behind each prompt

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


def activation_bytes(shape: ModelShape, cfg: ModelConfig, passes: Passes, itemsize: int, device: str) -> float:
    """What backward needs of the layers for one micro-batch (a test compares it with what autograd saves).

    With checkpointing only each layer's input stays, and one layer is held in full.
    """
    a_token = layer_bytes_per_token(shape, cfg, itemsize)
    one_layer = passes.tokens * a_token + passes.rows * attention_copies(shape, passes, itemsize, device)
    layers = min(cfg.train_layers, shape.layers) if cfg.train_layers and not cfg.lora.rank else shape.layers
    if cfg.gradient_checkpointing:
        return layers * passes.tokens * shape.hidden * itemsize + one_layer
    return layers * one_layer


def layer_bytes_per_token(shape: ModelShape, cfg: ModelConfig, itemsize: int) -> float:
    """What a layer saves of each token, attention's copies apart.

    Norms: the input and its scale; Gemma's, which `engine.pointwise` leaves alone, the input in float32, and the
    normalised input too where the norm's weight trains. What linear layers read: both norms' outputs, the attention's
    output in token order, the MLP's product, and between an adapter's two halves. Attention: queries, keys, values, its
    output and log-sum-exp. MLP: gate and up; its activation too where it is not SiLU.
    """
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    normed = shape.norms * h + (q + kv) * shape.qk_norm
    plain = not shape.model_type.startswith("gemma")
    norms = normed * (itemsize if plain else FP32 if cfg.lora.rank else 2 * FP32)
    norms += FP32 * (shape.norms + (shape.heads + shape.kv_heads) * shape.qk_norm)
    read = 2 * h + q + shape.intermediate + 7 * cfg.lora.rank
    attention = 2 * q + 2 * kv
    gated = (2 if shape.gated_silu else 3) * shape.intermediate
    return norms + itemsize * (read + attention + gated) + FP32 * shape.heads


def attention_copies(shape: ModelShape, passes: Passes, itemsize: int, device: str) -> float:
    """What a layer saves beside that for one prompt with several answers, where attention is a call for each of them.

    On CPUs: the prompt's keys and values before its own, and who sees whom as numbers of the queries' type. One answer
    alone is a single causal call; GPUs attend over the whole row at once.
    """
    if device != "cpu" or passes.answers < 2:
        return 0.0
    answer = passes.answer_tokens / passes.answers
    seen = passes.row_tokens - passes.answer_tokens + answer
    return passes.answers * itemsize * seen * (2 * shape.kv_heads * shape.head_dim + answer)


def cut_passes(row_tokens: int, answer_tokens: int, budget: int, rows: int, answers: int) -> Passes:
    """As many rows at once as fit the budget of tokens, at least one, at most what there is."""
    at_once = max(1, min(rows, budget // row_tokens))
    return Passes(row_tokens, answer_tokens, at_once, -(-rows // at_once), answers)


def reshards(reshard_after_forward: bool, world_size: int) -> bool:
    """Whether gathered weights are freed between a forward pass and its backward pass.

    After a pass without gradients they are freed in any case (`engine.gathering.free_gathered`).
    """
    return reshard_after_forward and world_size > 1


def is_sharded(world_size: int, itemsize: int, offloads: bool = False) -> bool:
    """Whether a model is given to FSDP2: one process that computes in its float32 masters would only copy them."""
    return world_size > 1 or itemsize != FP32 or offloads


def gathers_once(gather: str, world_size: int, total: int, trainable: int, itemsize: int) -> bool:
    """Whether weights are gathered and gradients (float32) reduced once an optimiser step: `fsdp.gather` and sizes.

    A world of one that is sharded at all (in bf16) gains by it at no memory: FSDP2 copies gradients even there.
    """
    if gather == "micro_batch":
        return False
    return world_size < 2 or gather == "step" or total * itemsize + trainable * FP32 <= GATHER_ONCE_BYTES


def estimate_model(
    shape: ModelShape, cfg: ModelConfig, placement: Placement, fsdp: FsdpConfig, passes: Passes, *, causal: bool
) -> ModelMemory:
    """A model that trains: the student (`causal`, with a vocabulary head) or the discriminator."""
    itemsize = compute_bytes(cfg, placement.device)
    shards = max(1, placement.world_size // fsdp.replicate)
    total = shape.causal_params if causal else shape.critic_params
    head = (0 if shape.tied else shape.embedding_params) if causal else shape.hidden + 1
    trainable = trainable_params(shape, cfg, total, head)
    adapters = trainable if cfg.lora.rank else 0
    once = gathers_once(fsdp.gather, placement.world_size, total, trainable, itemsize)
    # Resharding: the root unit (embedding, head) stays gathered, layers come one after another, the next prefetched.
    # Without: all units stay gathered from forward to backward.
    few = total - shape.layers * shape.layer_params + 2 * shape.layer_params
    gathered = few if reshards(fsdp.reshard_after_forward, placement.world_size) and not once else total
    if placement.world_size < 2:  # frozen weights are used where they lie
        gathered = trainable
    offloads = not causal and fsdp.offload_critic and placement.device == "cuda"
    if not is_sharded(placement.world_size, itemsize, offloads):
        gathered = 0
    # Whole gradients add up over micro-batches; each unit's turn into a shard when the last one's backward passes it.
    whole_gradients = once and passes.count > 1
    logits = 0.0
    if causal:
        frozen_head = bool(cfg.lora.rank) or (shape.tied and bool(cfg.train_layers))
        alive = chunk_tokens(passes, shape, placement.device) * shape.vocab
        logits = LOGITS_COPIES * alive * FP32 + (0 if frozen_head else shape.embedding_params * FP32)
    activations = activation_bytes(shape, cfg, passes, itemsize, placement.device)
    largest_pieces = HEAP_PIECES * shape.layers * shape.hidden if placement.device == "cpu" else 0.0
    gradients = trainable * FP32 / (1 if whole_gradients else shards)
    on_gpu = 0.0
    if placement.device == "cuda":
        layer = trainable / shape.layers if cfg.lora.rank or cfg.train_layers else shape.layer_params
        root = 0 if cfg.lora.rank or cfg.train_layers else total - shape.layers * shape.layer_params
        kept = gathered - (2 * shape.layer_params if gathered == few else 0)  # what lies gathered between two layers
        on_gpu = gpu_update_bytes(
            at_head=kept * itemsize + head_activation_bytes(shape, cfg, passes, activations, itemsize) + logits,
            at_layer=gathered * itemsize + activations + (layer * (itemsize + FP32) if placement.world_size > 1 else 0),
            at_end=root * (itemsize + FP32) if placement.world_size > 1 else 0.0,
            gradients=gradients,
            micro_batches=passes.count,
        )
    return ModelMemory(
        parameters=total,
        trainable=trainable,
        weights=stored_bytes(total + adapters, trainable, itemsize) / shards,
        stored=stored_bytes(total + adapters, trainable, itemsize),
        gradients=gradients,
        optimiser=trainable * ADAM_BYTES / shards,
        gathered=gathered * itemsize,
        activations=activations,
        logits=logits,
        micro_batches=passes.count,
        pieces=min(largest_pieces, 2 * (activations + logits)),
        on_gpu=on_gpu,
    )


def chunk_tokens(passes: Passes, shape: ModelShape, device: str) -> int:
    """Tokens whose logits are alive at once: the head cuts a micro-batch's into equal chunks."""
    tokens = passes.rows * passes.answer_tokens
    largest = max(1, LOGITS_CHUNK[device] // shape.vocab)
    return -(-tokens // max(1, -(-tokens // largest)))


def head_activation_bytes(
    shape: ModelShape, cfg: ModelConfig, passes: Passes, activations: float, itemsize: int
) -> float:
    """What the layers keep while the head works: with checkpointing their inputs alone."""
    if not cfg.gradient_checkpointing:
        return activations
    return shape.layers * passes.tokens * shape.hidden * itemsize


def gpu_update_bytes(at_head: float, at_layer: float, at_end: float, gradients: float, micro_batches: int) -> float:
    """The largest of three moments of an update on a GPU (each was found by emulation, `tests/gpu_path`).

    The head's passes; a layer's backward pass, whose gradients lie there twice, as they are and in float32 for the
    reduction; the end, when embedding and head are reduced at once and all other gradients are there. In the first two
    those of earlier micro-batches are.
    """
    before = gradients if micro_batches > 1 else 0.0
    return max(before + at_head, before + at_layer, gradients + at_end)


def stored_bytes(total: int, trainable: int, itemsize: int) -> int:
    """Weights in memory and in checkpoints: float32 masters of what trains, the rest in the compute type."""
    return trainable * FP32 + (total - trainable) * itemsize


def estimate_reference(shape: ModelShape, shards: int, itemsize: int) -> ModelMemory:
    """The frozen starting student, for the KL loss and the KL in the reward."""
    total = shape.causal_params
    return ModelMemory(total, 0, total * itemsize / shards, 0.0, 0.0, 0.0, 0.0, 0.0)


def kv_cache_bytes(cfg: GadConfig, placement: Placement, weights: float) -> float:
    """KV cache of one engine: `rollout.kv_cache_gb`, else the engine's own rule."""
    rollout, shape = cfg.rollout, placement.student
    itemsize = compute_bytes(cfg.actor.model, placement.device)
    token_bytes = shape.kv_bytes_per_token(itemsize) / rollout.tensor_parallel_size
    if placement.engine == "hf":
        sequences = cfg.data.train_batch_size * rollout.n / placement.world_size
        return min(sequences, rollout.max_num_seqs) * rollout.max_model_len * token_bytes
    if rollout.kv_cache_gb:
        return rollout.kv_cache_gb * GIB
    if placement.device == "cuda" and placement.device_gb:
        return max(0.0, rollout.gpu_memory_utilization * placement.device_gb * GIB - weights - ENGINE_RUNTIME["cuda"])
    wanted = token_bytes * rollout.max_model_len * rollout.max_num_seqs
    if placement.device == "cuda":
        return wanted
    return max(token_bytes * (rollout.max_model_len + 256), min(max(wanted, KV_CPU_RANGE[0]), KV_CPU_RANGE[1]))


def passes_of(cfg: GadConfig, placement: Placement, mini_batch: int, budget: int, answers: int) -> Passes:
    """The passes of one optimiser step on one device, every row (a prompt, its answers behind it) at its limit."""
    rows = max(1, (mini_batch or cfg.data.train_batch_size) // placement.world_size)
    answer_tokens = answers * cfg.data.max_response_length
    return cut_passes(cfg.data.max_prompt_length + answer_tokens, answer_tokens, budget, rows, answers)


def needs_reference(cfg: GadConfig) -> bool:
    """Whether a KL with a coefficient above 0 asks for the frozen start."""
    in_loss = cfg.actor.use_kl_loss and cfg.actor.kl_loss_coef > 0
    in_reward = cfg.algorithm.use_kl_in_reward and cfg.algorithm.kl_ctrl.kl_coef > 0
    return cfg.actor.objective == "policy" and (in_loss or in_reward)


def estimate(cfg: GadConfig, placement: Placement) -> MemoryEstimate:
    """The whole estimate; an upper bound in lengths (every row at its limit), typical in the rest."""
    answers = {"policy": cfg.rollout.n, "soda": 2}.get(cfg.actor.objective, 1)
    passes = passes_of(cfg, placement, cfg.actor.ppo_mini_batch_size, cfg.actor.micro_batch_tokens, answers)
    actor = estimate_model(placement.student, cfg.actor.model, placement, cfg.fsdp, passes, causal=True)
    critic = None
    if placement.critic is not None and cfg.trainer.critic_warmup >= 0:
        answers = cfg.rollout.n + 1  # the teacher's answer goes with the student's
        passes = passes_of(cfg, placement, cfg.critic.ppo_mini_batch_size, cfg.critic.micro_batch_tokens, answers)
        critic = estimate_model(placement.critic, cfg.critic.model, placement, cfg.fsdp, passes, causal=False)
    shards = max(1, placement.world_size // cfg.fsdp.replicate)
    own = needs_reference(cfg) and not cfg.actor.model.lora.rank  # with LoRA it is the student, its adapters off
    reference = (
        estimate_reference(placement.student, shards, compute_bytes(cfg.actor.model, placement.device)) if own else None
    )
    return _peaks(cfg, placement, actor, reference, critic)


@dataclass(frozen=True)
class SamplerMemory:
    """The sampler's own copy of the weights, its KV cache, and what only a rollout takes."""

    weights: float = 0.0
    kv_cache: float = 0.0
    rollout_only: float = 0.0
    runtime: float = 0.0


def estimate_sampler(cfg: GadConfig, placement: Placement) -> SamplerMemory:
    """vLLM keeps its KV cache; transformers makes one in each rollout, beside every token's logits (twice)."""
    if cfg.actor.objective == "sft" and cfg.stage == "seqkd" and not (cfg.data.val_files or cfg.data.val_rows):
        return SamplerMemory()  # nothing is sampled
    itemsize = compute_bytes(cfg.actor.model, placement.device)
    weights = placement.student.causal_params * itemsize / cfg.rollout.tensor_parallel_size
    kv = kv_cache_bytes(cfg, placement, weights)
    if placement.engine == "vllm":
        return SamplerMemory(weights, kv, 0.0, ENGINE_RUNTIME[placement.device])
    sequences = min(cfg.data.train_batch_size * cfg.rollout.n / placement.world_size, cfg.rollout.max_num_seqs)
    logits = 2 * sequences * cfg.data.max_response_length * placement.student.vocab * FP32
    return SamplerMemory(weights, 0.0, kv + logits)


def _peaks(
    cfg: GadConfig, placement: Placement, actor: ModelMemory, reference: ModelMemory | None, critic: ModelMemory | None
) -> MemoryEstimate:
    on_gpu = placement.device == "cuda"
    sampler = estimate_sampler(cfg, placement)
    runtime = RUNTIME[placement.device] + sampler.runtime
    host = 0.0
    resident = actor.resident + runtime
    for model, offloaded in ((reference, cfg.fsdp.offload_reference), (critic, cfg.fsdp.offload_critic)):
        if model is None:
            continue
        if offloaded and on_gpu:
            host += model.resident + model.gradients
        else:
            resident += model.resident
    if cfg.trainer.async_save == "always" or (cfg.trainer.async_save == "auto" and on_gpu):
        copied = sum(model.resident for model in (actor, critic) if model is not None)
        if on_gpu:
            host += copied
        else:
            resident += copied
    updates = [actor.updating]
    if critic is not None:
        updates.append(critic.updating - (critic.gradients if cfg.fsdp.offload_critic and on_gpu else 0))
    sleeps = cfg.rollout.sleep and on_gpu
    host += sampler.weights if sleeps else 0
    largest_tensor = placement.student.embedding_params * FP32
    training_peak = resident + max(updates) + (0 if sleeps else sampler.weights + sampler.kv_cache)
    rollout_peak = resident + largest_tensor + sampler.weights + sampler.kv_cache + sampler.rollout_only
    local = placement.local_size or max(1, placement.world_size // cfg.trainer.nnodes)
    if on_gpu:  # every process reads the whole model into host memory before it keeps its shard
        host_ram = local * (HOST_PER_GPU_PROCESS + host + actor.parameters * FP32)
    else:
        host_ram = local * max(training_peak, rollout_peak)
    trained = [model for model in (actor, critic) if model is not None]
    checkpoint = sum(model.stored + model.trainable * ADAM_BYTES for model in trained)
    kept = cfg.trainer.keep_last + bool(cfg.trainer.keep_best) + 1  # one more while the next is written
    return MemoryEstimate(
        actor, reference, critic, sampler.weights, sampler.kv_cache, runtime, training_peak, rollout_peak, host_ram,
        checkpoint, kept,
    )  # fmt: skip
