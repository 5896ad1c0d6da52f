"""verl's names for our keys, so that its users' command lines work here, and what stands for those we have not."""

from __future__ import annotations

# Same meaning, other name; a name that ends with a dot stands for all keys below it. The first match wins.
RENAMED = {
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "rollout.tensor_parallel_size",
    "actor_rollout_ref.rollout.name": "rollout.engine",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "actor.model.gradient_checkpointing",
    "actor_rollout_ref.model.lora_rank": "actor.model.lora.rank",
    "actor_rollout_ref.model.lora_alpha": "actor.model.lora.alpha",
    "actor_rollout_ref.model.target_modules": "actor.model.lora.target_modules",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "actor.micro_batch_tokens",
    "critic.ppo_max_token_len_per_gpu": "critic.micro_batch_tokens",
    "critic.model.enable_gradient_checkpointing": "critic.model.gradient_checkpointing",
    "actor_rollout_ref.model.": "actor.model.",
    "actor_rollout_ref.actor.": "actor.",
    "actor_rollout_ref.rollout.": "rollout.",
    "data.apply_chat_template_kwargs": "data.template_kwargs",
    "trainer.experiment_name": "trainer.exp_name",
    "trainer.default_local_dir": "trainer.output_dir",
    "trainer.n_gpus_per_node": "trainer.nproc",
    "trainer.total_training_steps": "trainer.total_steps",
}
# No key of ours has this meaning: part of their key -> what does that work here. The first match wins.
INSTEAD = {
    "micro_batch_size": "micro-batches are counted in tokens: actor.micro_batch_tokens, critic.micro_batch_tokens",
    "actor_rollout_ref.ref.": "the reference follows the actor's settings; fsdp.offload_reference=true",
    "offload": "fsdp.offload_reference=true, fsdp.offload_critic=true",
    "use_remove_padding": "rows are always packed; leave it out",
    "use_dynamic_bsz": "micro-batches are always filled up to micro_batch_tokens; leave it out",
    "filter_overlong_prompts": "data.truncation=drop",
    "val_kwargs": "evaluations are greedy; leave it out",
    "reward_model.model.path": "--reward-model, or critic.model.path",
    "data.val_batch_size": "evaluations use all held-out rows; data.val_rows limits them",
}


def renamed(key: str) -> str:
    """A key in our spelling."""
    for theirs, ours in RENAMED.items():
        if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
            return ours + key[len(theirs) :]
    return key


def instead_of(key: str) -> str | None:
    """What to use in place of a key of verl's that has no counterpart here."""
    return next((hint for part, hint in INSTEAD.items() if part in key), None)
