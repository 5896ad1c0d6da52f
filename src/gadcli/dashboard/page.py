"""HTML pages from templates/: one file each, no script, no network; every text is escaped, whatever it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def printable(text: str) -> str:
    """Text without control characters, which neither HTML nor XML may hold."""
    return "".join(c for c in text if c.isprintable() or c in "\n ")


def page(template: str, **values: Any) -> str:
    """A template of `templates/` with these values. Only a `markupsafe.Markup` goes in as it is."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def clean(value: Any) -> Any:
        return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=clean, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)
