"""The child of a `python` reward: reads batches as JSON lines, calls the user's function, answers in JSON lines.

Started as `python -P child.py FUNCTION` (module:function or file.py:function), so that it loads nothing of gad.
The user's own prints go to stderr: stdout carries the answers alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from typing import Any


def load(dotted: str) -> Any:
    """The function behind module:function or path/to/file.py:function."""
    place, _, name = dotted.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("gad_user_reward", place)
        if spec is None or spec.loader is None or not os.path.isfile(place):
            raise FileNotFoundError(place)
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, os.path.dirname(os.path.abspath(place)))
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        module = importlib.import_module(place)
    return getattr(module, name)


def plain(value: Any) -> Any:
    """A score as JSON can carry it: numpy and torch scalars become floats."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return float(value)


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")
        out.flush()

    try:
        function = load(sys.argv[1])
        say({"ready": True})
        for line in sys.stdin:
            batch = json.loads(line)
            say({"scores": [plain(x) for x in function(batch["prompts"], batch["answers"], batch["rows"])]})
    except Exception as error:  # noqa: BLE001  whatever the user's code raises is told to the parent
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
