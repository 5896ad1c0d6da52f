"""The deepest check of a merge: transformers loads it, and its logits equal those of the shards' own tensors."""

from __future__ import annotations

from pathlib import Path

from gadcli.checkpoint.merge.plan import MergePlan, produce
from gadcli.checkpoint.merge.source import Source
from gadcli.checkpoint.merge.tensors import Files
from gadcli.errors import CheckpointError

PROBE_TOKENS = 16


def probe(source: Source, plan: MergePlan, folder: Path, files: Files) -> str:
    """Loads `folder` and a second model filled straight from the shards; CheckpointError unless they agree.

    0 missing and unexpected keys, logits on a fixed prompt finite and equal bit for bit. Needs both in memory.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    auto = AutoModelForTokenClassification if plan.critic else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(folder, output_loading_info=True, dtype="auto")
    wrong = {k: sorted(info[k])[:3] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    if wrong:
        raise CheckpointError(f"{source.folder}: transformers loads the result with {wrong}", "is --base right?")
    # made in the loaded dtype, not cast to it: rotary frequencies stay float32 in both
    direct = auto.from_config(loaded.config, dtype=loaded.dtype)
    state = {}
    for tensor in plan.weights:
        data = bytearray(b"".join(bytes(piece) for piece in produce(files, tensor)))
        dtype = getattr(torch, tensor.dtype)
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        state[tensor.name] = flat.view(tensor.shape)
    left = direct.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if loaded.config.tie_word_embeddings else set()
    if set(left.missing_keys) - tied or left.unexpected_keys:
        raise CheckpointError(f"{source.folder}: keys {left} do not fit the config", "is --base right?")
    direct.tie_weights()
    ids = torch.arange(PROBE_TOKENS).remainder(loaded.config.vocab_size).unsqueeze(0)
    with torch.no_grad():
        a, b = loaded.eval()(ids).logits, direct.eval()(ids).logits
    if not bool(torch.isfinite(a).all()):
        raise CheckpointError(f"{source.folder}: the merged model's logits are not finite", "the run diverged")
    if not torch.equal(a, b):
        raise CheckpointError(f"{source.folder}: logits differ by {(a - b).abs().max():.3g}", "report this: a bug")
    return "logits equal"
