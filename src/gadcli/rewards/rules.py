"""Rewards that are rules over an answer's text: regex, JSON schema, parses, length band. Each is in [0, 1]."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gadcli.config.rewards import RewardConfig
from gadcli.errors import ConfigError
from gadcli.rewards.answer import AnswerText, Score, extracted


def rule(spec: RewardConfig) -> Score:
    """The rule that `spec.kind` names. ConfigError for a schema that is missing or invalid."""
    if spec.kind == "length":
        return lambda items: [length_band(item, spec.low, spec.high) for item in items]
    holds = _test(spec)

    def score(items: Sequence[AnswerText]) -> list[float]:
        texts = [extracted(spec.extract, item.answer) for item in items]
        return [float(text is not None and holds(text)) for text in texts]

    return score


def length_band(item: AnswerText, low: float, high: float) -> float:
    """1 within [low, high] times the teacher's tokens, falling linearly to 0 one teacher's length beyond either end."""
    ratio = item.tokens / max(item.teacher_tokens, 1)
    return max(0.0, 1.0 - max(low - ratio, ratio - high, 0.0))


def _test(spec: RewardConfig) -> Callable[[str], bool]:
    if spec.kind == "regex":
        pattern = re.compile(spec.pattern, re.DOTALL)
        return lambda text: pattern.search(text) is not None
    if spec.kind == "json_schema":
        return _schema_test(spec)
    parse: Callable[[str], Any] = {"json": _strict_json, "python": _python}[spec.language]
    return lambda text: bool(text.strip()) and _succeeds(parse, text)


def _strict_json(text: str) -> Any:
    """RFC 8259: no NaN or Infinity, which Python's reader would accept."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _python(text: str) -> Any:
    with warnings.catch_warnings():  # an invalid escape in a student's answer is not our user's concern
        warnings.simplefilter("ignore")
        return ast.parse(text)


def _succeeds(parse: Callable[[str], Any], text: str) -> bool:
    try:
        parse(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # ast raises the last two on deep nesting
        return False
    return True


def _schema_test(spec: RewardConfig) -> Callable[[str], bool]:
    try:
        import jsonschema
    except ImportError as error:
        raise ConfigError(f"reward {spec.name}: kind json_schema needs jsonschema", "pip install jsonschema") from error
    try:
        schema = json.loads(Path(spec.schema).read_text(encoding="utf-8"))
        validator = jsonschema.validators.validator_for(schema)
        validator.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"reward {spec.name}: {spec.schema} is not a JSON schema: {reason}", "schema=FILE.json"
        ) from error
    valid = validator(schema)

    def holds(text: str) -> bool:
        try:
            return bool(valid.is_valid(_strict_json(text)))
        except (ValueError, RecursionError):
            return False

    return holds
