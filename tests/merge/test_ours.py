"""gad's own checkpoints to Hugging Face folders: bit-exact, loadable, verified, all or nothing.

Pinned here: world sizes 1-3, tied heads written once, critics, LoRA fused and as a peft adapter, dtype, shards with an
index, model card and lineage, logits, dry run, row 37 (target exists, disk too small), kills.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.saving import snapshot
from gadcli.checkpoint.manifest import human_bytes
from gadcli.checkpoint.merge.pick import models_in
from gadcli.checkpoint.merge.to_huggingface import MergeOptions, merge_models, to_huggingface
from gadcli.dashboard.progress import Progress
from gadcli.errors import CheckpointError, ConfigError, ResourceError
from merge.conftest import GAD_CASES
from merge.models import ALPHA, RANK

ROOT = Path(__file__).resolve().parents[2]


def folder_of(root: Path, case: str) -> Path:
    return root / case / "global_step_3" / ("critic" if "critic" in case else "actor")


@pytest.mark.parametrize("case", [c for c in GAD_CASES if "lora" not in c])
def test_the_merge_equals_full_tensor_and_transformers_agrees(gad_root: Path, tmp_path: Path, case: str) -> None:
    report = to_huggingface(folder_of(gad_root, case), tmp_path / "out", MergeOptions(probe=True))
    assert report.verified == ["names and shapes", "every tensor read back", "shards undamaged", "logits equal"]
    merged, whole = load_file(tmp_path / "out/model.safetensors"), load_file(gad_root / case / "whole.safetensors")
    assert whole.keys() - merged.keys() == ({"lm_head.weight"} if case.startswith("tied") else set())
    assert all(torch.equal(t, whole[n]) and t.dtype == whole[n].dtype for n, t in merged.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("dtype", "float32") == ("bfloat16" if "bf16" in case else "float32")
    assert config["tie_word_embeddings"] == case.startswith("tied")


def test_a_critic_reloads_as_what_it_is(gad_root: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    to_huggingface(folder_of(gad_root, "critic-w2"), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == "llama"
    assert config.architectures == ["LlamaForTokenClassification"] and config.num_labels == 1
    assert not (tmp_path / "out/generation_config.json").exists()


def test_lora_fused_equals_peft_with_the_kept_adapter(gad_root: Path, tmp_path: Path) -> None:
    """Both ways out of one checkpoint give the same logits: fused, and base + adapter loaded by peft itself."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from merge.models import build, llama_config

    folder = folder_of(gad_root, "lora-w2")
    to_huggingface(folder, tmp_path / "fused")
    base, _ = build("untied")  # the same seed: what the adapter was put on
    base.save_pretrained(tmp_path / "base")
    options = MergeOptions(keep_adapter=True, base=tmp_path / "base", base_name=str(tmp_path / "base"))
    to_huggingface(folder, tmp_path / "adapter", options)
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (RANK, ALPHA, ["down_proj", "q_proj"])
    assert len(load_file(tmp_path / "adapter/adapter_model.safetensors")) == 8
    ids = torch.arange(20).view(1, 20)
    fused = LlamaForCausalLM.from_pretrained(tmp_path / "fused")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.no_grad():
        a, b = fused(ids).logits, adapted(ids).logits
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        with adapted.disable_adapter():  # the mutant: without the adapter the logits are others
            assert (adapted(ids).logits - a).abs().max() > 1e-2
    assert llama_config().vocab_size == 37


def test_lora_alpha_can_be_given_and_matters(gad_root: Path, tmp_path: Path) -> None:
    folder = folder_of(gad_root, "lora-w2")
    to_huggingface(folder, tmp_path / "six")
    to_huggingface(folder, tmp_path / "also_six", MergeOptions(lora_alpha=ALPHA))
    to_huggingface(folder, tmp_path / "twelve", MergeOptions(lora_alpha=2 * ALPHA))
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("six", "also_six", "twelve")]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_converts_as_torch_does(gad_root: Path, tmp_path: Path, dtype: str) -> None:
    to_huggingface(folder_of(gad_root, "untied-w3"), tmp_path / "out", MergeOptions(dtype=dtype))
    whole = load_file(gad_root / "untied-w3/whole.safetensors")
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, whole[name].to(getattr(torch, dtype))), name


def test_shards_stay_under_the_limit_and_the_index_fits(gad_root: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    report = to_huggingface(folder_of(gad_root, "untied-w3"), tmp_path / "out", MergeOptions(max_shard_bytes=10_000))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and {p.name for p in shards} == set(index["weight_map"].values())
    assert all(sum(t.nbytes for t in load_file(p).values()) <= 10_000 for p in shards)
    whole = load_file(gad_root / "untied-w3/whole.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert report.files[shards[0].name] == shards[0].stat().st_size
    state = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(state[n], t) for n, t in whole.items())


def test_the_card_and_the_lineage_say_where_it_came_from(gad_root: Path, tmp_path: Path) -> None:
    to_huggingface(folder_of(gad_root, "tied-w2"), tmp_path / "out")
    lineage = json.loads((tmp_path / "out/gad_lineage.json").read_text())
    assert (lineage["run"], lineage["step"], lineage["stage"], lineage["world_size"]) == ("tied-w2", 3, "gad", 2)
    card = (tmp_path / "out/README.md").read_text()
    assert "| step | 3 |" in card and "| val/rouge_l | 0.5 |" in card and str(tmp_path) not in card


def test_a_dry_run_lists_and_writes_nothing(gad_root: Path, tmp_path: Path) -> None:
    folder = folder_of(gad_root, "untied-w3")
    planned = to_huggingface(folder, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    to_huggingface(folder, tmp_path / "out")
    assert {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()} == planned.files


def test_an_existing_target_is_left_as_it_is(gad_root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="exists"):
        to_huggingface(folder_of(gad_root, "untied-w3"), tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_too_little_disk_is_said_first(gad_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(ResourceError, match=r"need .*, have 1\.0 MB"):
        to_huggingface(folder_of(gad_root, "untied-w3"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["flip", "missing", "cut"])
def test_a_damaged_checkpoint_gives_no_folder(gad_root: Path, tmp_path: Path, what: str) -> None:
    step = tmp_path / "run/global_step_3"
    shutil.copytree(gad_root / "untied-w3/global_step_3", step)
    shard = step / "actor/__1_0.distcp"
    data = bytearray(shard.read_bytes())
    if what == "flip":
        data[len(data) // 2] ^= 16
        shard.write_bytes(data)
    elif what == "cut":
        shard.write_bytes(data[:-100])
    else:
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp"):
        to_huggingface(step / "actor", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_config_of_another_model_is_found_by_the_names(gad_root: Path, tmp_path: Path) -> None:
    step = tmp_path / "run/global_step_3"
    shutil.copytree(gad_root / "untied-w3/global_step_3", step)
    config = step / "actor/huggingface/config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match="actor/huggingface/config"):  # the manifest knows the file
        to_huggingface(step / "actor", tmp_path / "out")
    from checkpoint.saving import rewrite_manifest

    rewrite_manifest(step)
    with pytest.raises(CheckpointError, match="9 missing"):  # a Llama layer has 9 tensors
        to_huggingface(step / "actor", tmp_path / "out")


def test_without_our_manifest_only_on_trust(gad_root: Path, tmp_path: Path) -> None:
    step = tmp_path / "run/global_step_3"
    shutil.copytree(gad_root / "untied-w3/global_step_3", step)
    (step / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json") as caught:
        to_huggingface(step / "actor", tmp_path / "out")
    assert "--trust-checkpoint" in (caught.value.hint or "")
    to_huggingface(step / "actor", tmp_path / "out", MergeOptions(trust=True))
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_run_a_step_and_a_model_can_all_be_named(gad_root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run = gad_root / "untied-w3"
    assert models_in(run / "global_step_3/actor", said.append) == {"": run / "global_step_3/actor"}
    assert models_in(run / "global_step_3", said.append) == {"actor": run / "global_step_3/actor"}
    assert models_in(run, said.append) == {"actor": run / "global_step_3/actor"}
    merge_models(models_in(run, said.append), tmp_path / "out")
    assert (tmp_path / "out/actor/config.json").is_file()
    with pytest.raises(ConfigError, match="no such folder"):
        models_in(run / "nowhere", said.append)


def test_a_second_model_that_fails_leaves_nothing_of_the_first(gad_root: Path, tmp_path: Path) -> None:
    folders = {"actor": folder_of(gad_root, "untied-w3"), "critic": tmp_path / "nowhere"}
    with pytest.raises(ConfigError):
        merge_models(folders, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def gad(*words: object) -> list[str]:
    return [sys.executable, "-m", "gadcli.cli.app", *map(str, words)]


ENV = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def test_the_command_and_verls_old_flags_do_the_same(gad_root: Path, tmp_path: Path) -> None:
    folder = folder_of(gad_root, "untied-w3")
    new = subprocess.run(gad("merge", folder, "-o", tmp_path / "new"), env=ENV, capture_output=True, text=True)
    assert new.returncode == 0 and "verified: names and shapes" in new.stdout, new.stderr
    assert new.stderr == ""
    old = gad("merge", "--backend", "fsdp", "--local_dir", folder, "--target_dir", tmp_path / "old",
              "--hf_model_path", folder / "huggingface", "--json")  # fmt: skip
    done = subprocess.run(old, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"][0]["tensors"] == 21
    # `python -m verl.model_merger merge …` with only the program's name exchanged
    words = gad("merge", "merge", "--backend", "fsdp", "--local_dir", folder, "--target_dir", tmp_path / "older")
    assert subprocess.run(words, env=ENV, capture_output=True, check=False).returncode == 0
    assert snapshot(tmp_path / "older") == snapshot(tmp_path / "new")
    one, two = snapshot(tmp_path / "new"), snapshot(tmp_path / "old")
    assert {n: b for n, b in one.items() if n.endswith(".safetensors")} == {
        n: b for n, b in two.items() if n.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--backend", "megatron"], 2),
        (["--max-shard-size", "many"], 2),
        (["--dtype", "int8"], 2),
        (["--keep-adapter"], 2),
        (["--local_dir", "x"], 2),
        (["--keep-adapter", "--probe"], 2),
    ],
)
def test_wrong_options_end_with_exit_2(gad_root: Path, tmp_path: Path, words: list[str], code: int) -> None:
    command = gad("merge", folder_of(gad_root, "untied-w3"), "-o", tmp_path / "out", *words)
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith("error: "), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_made_is_a_usage_error(gad_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be made"):
        to_huggingface(folder_of(gad_root, "untied-w3"), tmp_path / "file" / "out")
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_a_folder_that_is_merged_already_says_so(gad_root: Path, tmp_path: Path) -> None:
    to_huggingface(folder_of(gad_root, "untied-w3"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="already"):
        models_in(tmp_path / "out", lambda _: None)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_bytes_and_time_left(terminal: bool) -> None:
    """Redrawn on a terminal; in a log whole lines, and only every so often."""

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    with Progress("merge", amount=lambda size: human_bytes(int(size)), log_s=0.05, stream=stream) as progress:
        for done in (10, 20, 30):
            time.sleep(0.03)
            progress(done * 10**6, 40 * 10**6, "write")
    said = stream.getvalue()
    assert re.search(r"write: \d+\.0 MB of 40\.0 MB  \d\d %  [\d.]+ [kMGT]?B/s  [\d.]+ s left", said), said
    assert ("\r" in said) == terminal and said.count("\n") == (0 if terminal else 1)


def test_the_command_imports_no_torch(gad_root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from gadcli.cli.app import run; code = run(sys.argv[1:]);"
        "bad = {'torch', 'transformers', 'numpy', 'omegaconf'} & set(sys.modules);"
        "print(bad); sys.exit(code or len(bad))"
    )
    command = [sys.executable, "-c", code, "merge", str(folder_of(gad_root, "tied-w2")), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_merge_that_is_killed_leaves_no_target(tmp_path: Path, number: int) -> None:
    """Killed at eight moments of a 0.2-GB merge: either the target is whole, or it is not there."""
    from checkpoint.saving import save

    run = tmp_path / "run"
    path = save(run, 1, size=20_000_000)  # 80 MB
    (path / "actor/huggingface/config.json").write_text("{}")
    from checkpoint.saving import rewrite_manifest

    rewrite_manifest(path)
    out = tmp_path / "out"
    wholes = 0
    for wait in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 1.2) if number != signal.SIGHUP else (0.4, 0.6):
        code = (
            "import sys; from pathlib import Path; import gadcli.cli.merge as m; m._end_cleanly_on_sigterm();"
            "import gadcli.checkpoint.merge.to_huggingface as t; t.compare = lambda *a: 0;"
            "t.expected_shapes = lambda *a, **k: {}; import gadcli.checkpoint.merge.plan as p;"
            "p.meta_model = lambda *a, **k: None;"
            "t.to_huggingface(Path(sys.argv[1]), Path(sys.argv[2]))"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(path / "actor"), str(out)], env=ENV,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(wait)
        process.send_signal(number)
        process.wait(timeout=30)
        if out.exists():
            wholes += 1
            assert torch.equal(load_file(out / "model.safetensors")["w"], torch.ones(20_000_000))
            shutil.rmtree(out)
        if number != signal.SIGKILL:
            assert [p.name for p in tmp_path.iterdir()] == ["run"]
    # and the next merge clears what a SIGKILL left
    to_huggingface(path / "actor", out, MergeOptions(verify=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
