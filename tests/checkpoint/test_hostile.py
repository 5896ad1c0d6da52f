"""Artefacts made to run code or to reach outside: refused with exit 4, and nothing happens (rows 34 and 35).

The planted payload creates a file; every test asserts that it was not created. The manifest is rewritten after
planting, so that the refusal is the reader's and not the hash's.
"""

from __future__ import annotations

import enum
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from checkpoint.saving import rewrite_manifest, save
from gadcli.checkpoint.dcp_metadata import read_dcp_index
from gadcli.checkpoint.manifest import read_manifest, read_trainer, verify
from gadcli.checkpoint.safe_unpickle import TorchZip, load_pickle
from gadcli.errors import CheckpointError
from gadcli.train.checkpoint import load_checkpoint, load_rng


class Payload:
    """Unpickled anywhere, this creates `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def state() -> dict:
    return {"model": {"w": torch.zeros(6)}, "optim": {"w/exp_avg": torch.zeros(6), "lr": 0.0}}


def load_all(path: Path) -> None:
    verify(path)
    read_trainer(path)
    load_rng(path)
    load_checkpoint(path, "actor", state())


FILES = ["actor/.metadata", "actor/__0_0.distcp", "trainer/actor_optim/.metadata", "trainer/actor_optim/__0_0.distcp",
         "trainer/rng_rank_0.safetensors", "trainer/trainer.json", "MANIFEST.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_any_file_is_not_executed(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    marker = tmp_path / "executed"
    (path / name).write_bytes(pickle.dumps(Payload(marker)))
    if name != "MANIFEST.json":
        rewrite_manifest(path)
    with pytest.raises(CheckpointError):
        load_all(path)
    assert not marker.exists()


def test_the_payload_would_work_if_it_were_unpickled(tmp_path: Path) -> None:
    """The mutant of the tests above: plain pickle runs it."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def tensor_with(payload: object) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(6), "x": payload}, buffer)
    return buffer.getvalue()


def test_a_payload_inside_a_torch_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(tensor_with(Payload(tmp_path / "executed")))
    with open(file, "rb") as stream, pytest.raises(CheckpointError, match=r"posix\.system"):
        TorchZip(file, stream)
    assert not (tmp_path / "executed").exists()


def test_a_payload_in_a_non_tensor_record_is_refused(tmp_path: Path) -> None:
    """DCP itself loads these records with a full unpickler."""
    path = save(tmp_path, 1)
    index = read_dcp_index(path / "trainer" / "actor_optim")
    record = index.records["lr"]
    shard = path / "trainer" / "actor_optim" / record.file
    planted = tensor_with(Payload(tmp_path / "executed"))
    # appended, and the index pointed at it
    data = shard.read_bytes()
    shard.write_bytes(data + planted)
    metadata = path / "trainer" / "actor_optim" / ".metadata"
    meta = pickle.loads(metadata.read_bytes())
    for key, info in meta.storage_data.items():
        if key.fqn == "lr":
            info.offset, info.length = len(data), len(planted)
    metadata.write_bytes(pickle.dumps(meta))
    rewrite_manifest(path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, "actor", state())
    assert not (tmp_path / "executed").exists()


class EnumsByName(pickle.Pickler):
    """As Python 3.11.2 pickles the member of an enum: getattr(kind, name)."""

    def reducer_override(self, value: object) -> object:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def pickled_by_name(value: object) -> bytes:
    EnumsByName(out := io.BytesIO()).dump(value)
    return out.getvalue()


def test_a_checkpoint_of_an_older_python_reads_the_same(tmp_path: Path) -> None:
    metadata = save(tmp_path, 1) / "actor" / ".metadata"
    index = read_dcp_index(metadata.parent)
    metadata.write_bytes(pickled_by_name(pickle.loads(metadata.read_bytes())))
    assert b"getattr" in metadata.read_bytes()
    assert read_dcp_index(metadata.parent) == index


def test_getattr_looks_nothing_up(tmp_path: Path) -> None:
    metadata = save(tmp_path, 1) / "actor" / ".metadata"
    meta = pickle.loads(metadata.read_bytes())
    (entry,) = [value for name, value in meta.state_dict_metadata.items() if name == "w"]

    class Reached:
        def __reduce__(self) -> tuple:
            return getattr, (entry, "properties")  # of an object, not of an enum's class

    meta.planner_data = Reached()
    metadata.write_bytes(pickle.dumps(meta))
    with pytest.raises(CheckpointError, match="getattr of something that is no enum"):
        read_dcp_index(metadata.parent)


@pytest.mark.parametrize(
    "name", ["../actor/__0_0.distcp", "/etc/hostname", "sub/__0_0.distcp", "..", "", "other.distcp"]
)
def test_metadata_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    metadata = path / "actor" / ".metadata"
    meta = pickle.loads(metadata.read_bytes())
    for info in meta.storage_data.values():
        info.relative_path = name
    metadata.write_bytes(pickle.dumps(meta))
    rewrite_manifest(path)
    with pytest.raises(CheckpointError, match=r"refused|manifest does not list"):
        load_checkpoint(path, "actor", {"model": {"w": torch.zeros(6)}})


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "actor/../../outside"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    manifest = path / "MANIFEST.json"
    raw = json.loads(manifest.read_text())
    raw["files"][name] = {"size": 1, "sha256": "0"}
    manifest.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_manifest(path)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_links_are_refused(tmp_path: Path, link: str) -> None:
    path = save(tmp_path, 1)
    target = path / ("actor/__0_0.distcp" if link == "file" else "actor")
    moved = tmp_path / "moved"
    target.rename(moved)
    target.symlink_to(moved)
    with pytest.raises(CheckpointError, match="link or no plain file"):
        verify(path)


def test_a_pickle_that_writes_on_a_stand_in_class_is_damage(tmp_path: Path) -> None:
    """BUILD on a class would set attributes on it; the stand-ins are made so that it cannot."""
    from gadcli.checkpoint.dcp_metadata import _resolve
    from gadcli.checkpoint.safe_unpickle import Inert

    evil = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x05\x00\x00\x00stateK\x01stb."
    with pytest.raises(CheckpointError, match="damaged"):
        load_pickle(evil, _resolve, "evil")
    assert Inert.state is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of 8 EiB
        b"\x80\x02r\xff\xff\xff\x7f.",  # a memo index that makes the C unpickler allocate 32 GB
        b"\x80\x02}(K\x01K\x02u0.",
        b"\x80\x02" + b"(" * 100_000,
    ],
)
def test_nonsense_is_an_error_and_takes_no_memory(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        load_pickle(data, lambda module, name: None, "nonsense")


@pytest.mark.parametrize("seed", range(25))
def test_mutated_files_end_in_documented_errors_only(tmp_path: Path, seed: int) -> None:
    """4 random bytes changed in .metadata and in the shard, the manifest made to agree: CheckpointError or a load."""
    import random

    path = save(tmp_path, 1)
    rng = random.Random(seed)
    for name in ("actor/.metadata", "actor/__0_0.distcp"):
        data = bytearray((path / name).read_bytes())
        for _ in range(4):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (path / name).write_bytes(data)
    rewrite_manifest(path)
    error: CheckpointError | None = None
    try:
        load_checkpoint(path, "actor", {"model": {"w": torch.zeros(6)}})
    except CheckpointError as caught:
        error = caught
    assert error is None or str(path) in error.message


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    """A zip bomb inside a torch file would be unpacked by nobody, but its sizes would lie."""
    plain = io.BytesIO()
    torch.save(torch.zeros(1000), plain)
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with open(bomb, "rb") as stream, pytest.raises(CheckpointError, match="compressed record"):
        TorchZip(bomb, stream)
