"""What the source itself must never do, over every file of it; each rule with an example that breaks it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
# Modules that execute what they read; `pickle` itself is imported for its pure-Python base class and its error.
READERS = (
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "dill.load",
    "joblib.load",
    "shelve.open",
)
YAML_UNSAFE = ("yaml.load", "yaml.unsafe_load", "yaml.full_load")


def dotted(node: ast.expr) -> str:
    """`torch.load` of the expression that is called."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def violations(source: str) -> Iterator[str]:
    """Calls that would execute what a file holds, or a shell."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and not is_constant(value, False):
                    yield f"line {node.lineno}: trust_remote_code"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        words = {word.arg: word.value for word in node.keywords}
        if name.endswith("torch.load") and not is_constant(words.get("weights_only"), True):
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if name in READERS or name in ("eval", "exec", "os.system"):
            yield f"line {node.lineno}: {name}"
        if name in YAML_UNSAFE and not dotted(words.get("Loader", ast.Name("none"))).endswith("Loader"):
            yield f"line {node.lineno}: {name}"
        if "trust_remote_code" in words and not is_constant(words["trust_remote_code"], False):
            yield f"line {node.lineno}: trust_remote_code"
        if is_constant(words.get("shell"), True):
            yield f"line {node.lineno}: shell=True"


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_file_of_ours_executes_what_it_reads() -> None:
    found = [f"{path.relative_to(ROOT)}: {line}" for path in SOURCES for line in violations(path.read_text())]
    assert len(SOURCES) > 100 and found == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.loads(data)", "eval(text)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)", "AutoModel.from_pretrained(p, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}", "subprocess.run(words, shell=True)", "yaml.load(text)",
    ],
)  # fmt: skip
def test_each_way_of_executing_would_be_found(source: str) -> None:
    assert list(violations(source))


def test_every_pin_of_the_locked_environment_has_a_hash() -> None:
    for name in ("cpu", "test", "demo", "torch"):
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ").splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert pins, name
        for pin in pins:
            assert "==" in pin and "--hash=sha256:" in pin and len(pin.split("sha256:")[1].strip()) == 64, pin
    script = (ROOT / "requirements" / "install.sh").read_text()
    assert script.count("--require-hashes -r") == 3  # cpu, test, demo; a hash in torch.txt alone turns the mode on


def test_security_md_names_files_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    for part in text.split("](")[1:]:
        assert (ROOT / part.partition(")")[0]).exists(), part
