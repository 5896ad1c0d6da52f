"""Run by a Python that has verl 0.9.1: verl's own FSDPCheckpointManager writes checkpoints, on gloo ranks.

    python verl_manager.py OUT_ROOT '[["name", world, "kind", fsdp_version, fsdp_size, "model folder"], ...]'

The model is sharded with verl's own mesh, wrap policy and FSDP2 helper, as its engine does; `whole.safetensors` beside
the rank files holds what `full_tensor()` gives. kind: actor, bf16, critic, valuehead, lora, lora-bf16, lora-only or
lora-critic. Imports once and forks the ranks: importing verl takes far longer than a job.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.fsdp_utils import apply_fsdp2, get_fsdp_wrap_policy
from verl.workers.engine.fsdp import utils as verl_engine

verl_engine.get_device_name = lambda: "cpu"  # verl has no CPU platform: it takes "cuda" where it finds nothing

LORA_KINDS = ("lora", "lora-bf16", "lora-only", "lora-critic")


def build(folder: str, kind: str) -> torch.nn.Module:
    """As verl's engine builds it, with LoRA B moved off its zeros (a fused adapter would change nothing)."""
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    config = AutoConfig.from_pretrained(folder)
    if kind in ("critic", "valuehead", "lora-critic"):
        config.num_labels, config.classifier_dropout = 1, 0.0
    if kind in ("critic", "lora-critic"):
        model = AutoModelForTokenClassification.from_pretrained(folder, config=config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    if kind == "valuehead":
        from trl.experimental.ppo import AutoModelForCausalLMWithValueHead
        from verl.utils.model import patch_valuehead_model

        model = AutoModelForCausalLMWithValueHead.from_pretrained(model)
        patch_valuehead_model(model)
    if kind in LORA_KINDS:
        from peft import LoraConfig, TaskType, get_peft_model

        model.enable_input_require_grads()
        # verl says CAUSAL_LM for critics too, which peft 0.21 refuses for a model that cannot generate
        targets: Any = ["q_proj", "down_proj"] if kind == "lora-critic" else "all-linear"
        task = TaskType.TOKEN_CLS if kind == "lora-critic" else TaskType.CAUSAL_LM
        lora = LoraConfig(task_type=task, r=4, lora_alpha=6, target_modules=targets, bias="none")
        model = get_peft_model(model, lora)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.3)
                p.data = p.data.to(dtype)
    return model.to(dtype)


def shard(model: torch.nn.Module, kind: str, version: int, fsdp_size: int) -> torch.nn.Module:
    """As verl's engine shards it."""
    mesh = verl_engine.create_device_mesh(world_size=dist.get_world_size(), fsdp_size=fsdp_size or -1)
    lora = kind in LORA_KINDS
    if version == 2:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=True)
        options = {"mesh": mesh, "mp_policy": policy, "offload_policy": None, "reshard_after_forward": True}
        apply_fsdp2(model, options, {})  # every rank starts from the same weights: nothing to broadcast
        return model
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
    policy1: Any = get_fsdp_wrap_policy(module=model, config={}, is_lora=lora)
    strategy = verl_engine.get_sharding_strategy(mesh, zero3_enable=True)
    return FSDP(model, auto_wrap_policy=policy1, device_id=torch.device("cpu"), sharding_strategy=strategy,
                mixed_precision=precision, device_mesh=mesh,
                use_orig_params=not lora)  # fmt: skip


def save(rank: int, world: int, store: str, out: Path, kind: str, version: int, fsdp_size: int, folder: str) -> None:
    """What one rank does."""
    torch.set_num_threads(1)
    torch.manual_seed(11)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    model = shard(build(folder, kind), kind, version, fsdp_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    contents: dict[str, Any] = {"save_contents": ["model", "optimizer", "extra"]}
    if kind == "lora-only":
        contents["save_lora_only"] = True
    tokenizer = AutoTokenizer.from_pretrained(folder)
    manager = FSDPCheckpointManager(model, optimizer, scheduler, tokenizer, contents)
    manager.save_checkpoint(str(out), global_step=5)
    state = torch.load(out / f"model_world_size_{world}_rank_{rank}.pt", weights_only=False)
    gathered = {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone().contiguous() for k, v in state.items()}
    if rank == 0:
        save_file(gathered, out / "whole.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Every job in turn; exits with 1 if any rank of any failed."""
    root, failed = Path(sys.argv[1]), []
    for name, world, kind, version, fsdp_size, folder in json.loads(sys.argv[2]):
        out = root / name / "global_step_5" / "actor"
        out.mkdir(parents=True)
        children = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                code = 1  # what a rank that raises ends with
                try:
                    save(rank, world, str(root / f"store-{name}"), out, kind, version, fsdp_size, folder)
                    code = 0
                except Exception:
                    traceback.print_exc()
                    raise
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(pid)
        if any(os.waitpid(pid, 0)[1] for pid in children):
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
