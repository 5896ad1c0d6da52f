"""verl's rank files, written by real FSDP1 and FSDP2 under gloo, merged and compared bit for bit with full_tensor().

Pinned here: uneven and empty shards (37 rows over 3 ranks; score.weight [1, 24] whole on rank 0), hybrid meshes read
from the first replica alone, W = 1, missing metadata, critics that call themselves CausalLM, LoRA, missing ranks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gadcli.checkpoint.merge.pick import models_in
from gadcli.checkpoint.merge.to_huggingface import MergeOptions, to_huggingface
from gadcli.checkpoint.merge.verl import read_verl
from gadcli.errors import CheckpointError
from merge.conftest import VERL_CASES
from merge.models import ALPHA, RANK, build

PLAIN = [name for name, case in VERL_CASES.items() if case[1] not in ("lora", "peft", "peft-critic")]


def folder_of(root: Path, case: str) -> Path:
    return root / case / "global_step_5" / "actor"


@pytest.mark.parametrize("case", PLAIN)
def test_the_merge_equals_full_tensor_bit_for_bit(verl_root: Path, tmp_path: Path, case: str) -> None:
    to_huggingface(folder_of(verl_root, case), tmp_path / "out")
    merged, whole = (
        load_file(tmp_path / "out/model.safetensors"),
        load_file(folder_of(verl_root, case) / "whole.safetensors"),
    )
    tied = VERL_CASES[case][1] == "tied"
    assert whole.keys() - merged.keys() == ({"lm_head.weight"} if tied else set())
    assert merged.keys() <= whole.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == whole[name].dtype
        assert torch.equal(tensor, whole[name]), name


def test_a_shard_really_is_empty_somewhere(verl_root: Path) -> None:
    """What the test above relies on: score.weight has one row, so the second rank's piece has none."""
    tensor = read_verl(folder_of(verl_root, "fsdp2-w2-critic")).tensors["score.weight"]
    assert [p.at.shape for p in tensor.parts] == [(1, 24), (0, 24)]


def test_a_hybrid_mesh_needs_only_the_first_replica(verl_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "actor"
    shutil.copytree(folder_of(verl_root, "fsdp2-hybrid-2x2-bf16"), folder)
    for rank in (2, 3):
        (folder / f"model_world_size_4_rank_{rank}.pt").unlink()
    to_huggingface(folder, tmp_path / "out")
    whole = load_file(folder / "whole.safetensors")
    assert all(torch.equal(t, whole[n]) for n, t in load_file(tmp_path / "out/model.safetensors").items())


def test_a_missing_rank_is_named(verl_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "actor"
    shutil.copytree(folder_of(verl_root, "fsdp2-w3-tied"), folder)
    (folder / "model_world_size_3_rank_1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"model_world_size_3_rank_1\.pt"):
        to_huggingface(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks_of_another_checkpoint_are_refused(verl_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "actor"
    shutil.copytree(folder_of(verl_root, "fsdp2-w2-critic"), folder)
    other = folder_of(verl_root, "fsdp1-w2") / "model_world_size_2_rank_1.pt"
    shutil.copy(other, folder / other.name)
    with pytest.raises(CheckpointError, match="different tensors"):
        to_huggingface(folder, tmp_path / "out")


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_a_flipped_byte_in_a_shard_is_found_by_its_crc(verl_root: Path, tmp_path: Path, place: float) -> None:
    folder = tmp_path / "actor"
    shutil.copytree(folder_of(verl_root, "fsdp2-w3-tied"), folder)
    shard = folder / "model_world_size_3_rank_2.pt"
    data = bytearray(shard.read_bytes())
    data[int(len(data) * place)] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="rank_2"):
        to_huggingface(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_critic_that_calls_itself_causal_loads_as_token_classification(verl_root: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    folder = folder_of(verl_root, "fsdp1-w2-critic")
    assert json.loads((folder / "huggingface/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    to_huggingface(folder, tmp_path / "out", MergeOptions(probe=True))
    model, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (info["missing_keys"], info["unexpected_keys"]) == (set(), set())
    assert type(model).__name__ == "LlamaForTokenClassification" and model.config.num_labels == 1
    assert torch.equal(model.score.weight, load_file(folder / "whole.safetensors")["score.weight"])


@pytest.mark.parametrize("case", ["fsdp2-w2-lora", "fsdp1-w2-peft-no-metadata"])
def test_lora_is_fused_into_its_base(verl_root: Path, tmp_path: Path, case: str) -> None:
    """W + alpha/r * B @ A, in float32: two orders of the same few products differ by a few ulp of |W| < 1."""
    folder = folder_of(verl_root, case)
    options = MergeOptions() if VERL_CASES[case][4] == "yes" else MergeOptions(lora_alpha=ALPHA)
    to_huggingface(folder, tmp_path / "out", options)
    merged = load_file(tmp_path / "out/model.safetensors")
    whole = {n.removeprefix("base_model.model."): t for n, t in load_file(folder / "whole.safetensors").items()}
    assert not [n for n in merged if "lora" in n or "base_layer" in n]
    fused = 0
    for name, tensor in merged.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.base_layer.weight" not in whole:
            assert torch.equal(tensor, whole[name])
            continue
        b, a = whole[f"{layer}.lora_B.default.weight"], whole[f"{layer}.lora_A.default.weight"]
        want = whole[f"{layer}.base_layer.weight"] + (ALPHA / RANK) * (b @ a)
        torch.testing.assert_close(tensor, want, rtol=0, atol=1e-6)
        fused += 1
    assert fused == 4  # q_proj and down_proj of two layers


def test_a_critics_adapter_keeps_its_head_fused_or_apart(verl_root: Path, tmp_path: Path) -> None:
    """peft loads base + adapter + head to the scores that the fused critic gives."""
    from peft import PeftModel
    from transformers import LlamaForTokenClassification

    folder = folder_of(verl_root, "fsdp2-w2-peft-critic")
    base, _ = build("critic")  # the same seed: what the adapter was put on
    base.save_pretrained(tmp_path / "base")
    options = MergeOptions(keep_adapter=True, base=tmp_path / "base", base_name=str(tmp_path / "base"))
    to_huggingface(folder, tmp_path / "adapter", options)
    to_huggingface(folder, tmp_path / "fused", MergeOptions(probe=True))
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (said["task_type"], said["modules_to_save"]) == ("TOKEN_CLS", ["score"])
    whole = load_file(folder / "whole.safetensors")
    trained = whole["base_model.model.score.modules_to_save.default.weight"]
    assert torch.equal(load_file(tmp_path / "fused/model.safetensors")["score.weight"], trained)
    ids = torch.arange(20).view(1, 20)
    plain = LlamaForTokenClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        before = plain(ids).logits
        fused = LlamaForTokenClassification.from_pretrained(tmp_path / "fused")(ids).logits
        apart = PeftModel.from_pretrained(plain, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(apart, fused, rtol=0, atol=1e-5)
    assert (before - fused).abs().max() > 1e-2  # without the adapter and its head the scores are others


def test_a_verl_run_without_its_marker_is_asked_for_a_step(verl_root: Path) -> None:
    with pytest.raises(CheckpointError, match="latest_checkpointed_iteration") as caught:
        models_in(verl_root / "fsdp1-w2", lambda _: None)
    assert str(verl_root / "fsdp1-w2/global_step_5") in (caught.value.hint or "")


def test_lora_without_its_alpha_is_an_error_that_says_how(verl_root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="alpha is not recorded") as caught:
        to_huggingface(folder_of(verl_root, "fsdp1-w2-peft-no-metadata"), tmp_path / "out")
    assert "--lora-alpha" in (caught.value.hint or "")


def test_an_adapter_saved_alone_takes_its_base_from_base(verl_root: Path, tmp_path: Path) -> None:
    """verl's save_lora_only: rank files with lora tensors and nothing else."""
    source = folder_of(verl_root, "fsdp2-w2-lora")
    whole = load_file(source / "whole.safetensors")
    folder = tmp_path / "actor"
    shutil.copytree(source, folder)
    torch.save({n: t for n, t in whole.items() if "lora_" in n}, folder / "model_world_size_1_rank_0.pt")
    (folder / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 1}')
    base = tmp_path / "base"
    base.mkdir()
    from safetensors.torch import save_file

    plain = {n.replace(".base_layer.", "."): t for n, t in whole.items() if "lora_" not in n}
    save_file(plain, base / "model.safetensors")
    shutil.copy(source / "huggingface/config.json", base)
    with pytest.raises(CheckpointError, match="no base weight"):
        to_huggingface(folder, tmp_path / "no")
    to_huggingface(folder, tmp_path / "out", MergeOptions(base=base))
    to_huggingface(source, tmp_path / "direct")
    a, b = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "direct/model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_plain_and_0d_tensors_come_from_rank_0(verl_root: Path, tmp_path: Path) -> None:
    """A buffer that every rank holds whole, and a scalar, beside DTensors."""
    folder = tmp_path / "actor"
    shutil.copytree(folder_of(verl_root, "fsdp2-w2-critic"), folder)
    from torch.distributed.tensor import DTensor  # noqa: F401  the classes inside the file

    for rank in (0, 1):
        path = folder / f"model_world_size_2_rank_{rank}.pt"
        state = torch.load(path, weights_only=False)
        state["scale"], state["table"] = torch.tensor(2.5), torch.arange(6.0).view(2, 3)
        torch.save(state, path)
    tensors = read_verl(folder).tensors
    assert tensors["scale"].shape == () and tensors["table"].shape == (2, 3)
    assert tensors["score.weight"].shape == (1, 24)
    to_huggingface(folder, tmp_path / "out", MergeOptions(verify=False))
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged["scale"].item() == 2.5 and torch.equal(merged["table"], torch.arange(6.0).view(2, 3))


def test_other_placements_and_meshes_are_clear_errors(verl_root: Path, tmp_path: Path) -> None:
    folder = folder_of(verl_root, "fsdp2-w3-tied")
    path = folder / "model_world_size_3_rank_0.pt"
    from gadcli.checkpoint.merge.verl import _spec
    from gadcli.checkpoint.safe_unpickle import TorchZip

    with open(path, "rb") as stream:
        value = TorchZip(path, stream).obj["model.norm.weight"]
    assert _spec(folder, "x", value)[0] == ["Shard(0)"]
    placement = value.state["_spec"].state["placements"][0]
    placement.state["dim"] = 1
    with pytest.raises(CheckpointError, match=r"placements \(Shard\(1\)\)"):
        _spec(folder, "x", value)
    placement.state["dim"] = 0
    value.state["_spec"].get("mesh").state["_mesh_dim_names"] = ("dp", "tp")
    with pytest.raises(CheckpointError, match="mesh"):
        _spec(folder, "x", value)
    type(placement).__name__ = "Partial"
    value.state["_spec"].get("mesh").state["_mesh_dim_names"] = ("fsdp",)
    with pytest.raises(CheckpointError, match="Partial"):
        _spec(folder, "x", value)
