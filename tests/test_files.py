"""Files that are whole or not there, and locks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gadcli.files import locked, replacing, write_atomic


@pytest.mark.parametrize("durable", [False, True])
def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "f"
    write_atomic(path, "old", durable=durable)

    def fail_midway() -> None:
        with replacing(path, durable=durable) as stream:
            stream.write(b"half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    write_atomic(path, "new ü", durable=durable)
    assert path.read_bytes() == b"new \xc3\xbc" and os.listdir(tmp_path) == ["f"]


def test_a_lock_is_refused_while_another_process_holds_it(tmp_path: Path) -> None:
    code = "import sys, pathlib, gadcli.files as f\nwith f.locked(pathlib.Path(sys.argv[1]), wait=False): pass"
    ask = [sys.executable, "-c", code, str(tmp_path / "sub" / "lock")]
    with locked(tmp_path / "sub" / "lock"):
        assert b"BlockingIOError" in subprocess.run(ask, capture_output=True, check=False).stderr
    assert subprocess.run(ask, capture_output=True, check=False).returncode == 0
