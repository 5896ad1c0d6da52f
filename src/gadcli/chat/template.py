"""Chat templates rendered as transformers renders them, without importing transformers (which brings torch).

The environment below is that of transformers 5.19 `utils.chat_template_utils`; a test holds the two equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]  # role and content; tool_calls, tool_call_id, name where the data has them
Tools = list[dict[str, Any]]
SHAPES_KEPT = 1024
TOOL = {"description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}


class TemplateRefusal(ValueError):
    """The template raised for these messages, or leaves a part of them out; `reason` is one of findings.REASONS."""

    def __init__(self, message: str, reason: str = "template_refuses") -> None:
        super().__init__(message)
        self.reason = reason


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for masks; the text inside is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False,
            ) -> str:  # fmt: skip
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One model's template: its source, or transformers' table of named ones, of which `tool_use` serves rows with
    tools and `default` the others. `kwargs` are variables of the user's (`data.template_kwargs`)."""

    def __init__(
        self, source: str | Mapping[str, str], specials: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None
    ) -> None:
        named = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in named:
            names = ", ".join(sorted(named))
            raise TemplateRefusal(f"the tokenizer has several chat templates ({names}) and none is named 'default'")
        self.source = named["default"]
        self.variables = {**specials, **(kwargs or {})}
        self.writes_date = False
        # One moment for all that is rendered: the prompt and the whole conversation must agree.
        self._now = datetime.now()
        env = self._environment()
        try:
            self._plain = env.from_string(self.source)
            self._with_tools = env.from_string(named.get("tool_use", self.source))
        except jinja2.exceptions.TemplateError as error:
            raise TemplateRefusal(f"the chat template does not compile: {error}") from None
        self._left_out: dict[Any, str] = {}

    def _environment(self) -> ImmutableSandboxedEnvironment:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = self._date
        return env

    def _date(self, form: str) -> str:
        self.writes_date = True
        return self._now.strftime(form)

    def render(
        self, messages: Sequence[Message], tools: Tools | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The conversation's text. Raises TemplateRefusal with the template's own words."""
        try:
            return (self._with_tools if tools else self._plain).render(
                messages=[_with_parsed_arguments(m) for m in messages],
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except (jinja2.exceptions.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise TemplateRefusal(str(error)[:120]) from None

    def refuse_what_is_left_out(self, messages: Sequence[Message], tools: Tools | None) -> None:
        """Raises TemplateRefusal where the template silently leaves out a message, a tool call or the tools.

        Each shape of conversation (roles, calls, tools or none) is rendered once, marks in place of its texts.
        """
        shape = (bool(tools), *[(m["role"], len(m.get("tool_calls") or ())) for m in messages])
        if shape not in self._left_out:
            if len(self._left_out) >= SHAPES_KEPT:
                self._left_out.clear()
            self._left_out[shape] = self._find_left_out(shape)
        if fault := self._left_out[shape]:
            called = [call["function"]["name"] for m in messages for call in m.get("tool_calls") or ()]
            offered = [tool.get("function", tool).get("name", "?") for tool in tools or ()]
            raise TemplateRefusal(fault.format(tools=_some(offered), calls=_some(called)), "template_leaves_out")

    def _find_left_out(self, shape: tuple[Any, ...]) -> str:
        offers_tools, *turns = shape
        messages: list[Message] = []
        for i, (role, calls) in enumerate(turns):
            # With calls beside it, many templates write no content, and most data has none.
            messages.append({"role": role, "content": "" if calls else f"gadmark{i}end"})
            if calls:
                functions = [{"name": f"gadcall{i}x{j}end", "arguments": {"a": "b"}} for j in range(calls)]
                messages[-1]["tool_calls"] = [{"id": "call00001", "type": "function", "function": f} for f in functions]
            elif role == "tool":
                messages[-1] |= {"name": "gadtoolend", "tool_call_id": "call00001"}
        tools = [{"type": "function", "function": {"name": "gadtoolend", **TOOL}}] if offers_tools else None
        try:
            text = self.render(messages, tools).lower()  # marks survive trimming, quoting and capitals
        except TemplateRefusal:
            return ""  # the row's own rendering will tell, in the template's words
        for i, (role, calls) in enumerate(turns):
            if calls and f"gadcall{i}x0end" not in text:
                return "the chat template leaves out tool calls ({calls})"
            if not calls and f"gadmark{i}end" not in text:
                return f"the chat template leaves out message {i + 1}, of role {role!r}"
        return "the chat template leaves out the tools ({tools})" if tools and "gadtoolend" not in text else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))[:80]


def _with_parsed_arguments(message: Message) -> Message:
    """Arguments of tool calls as a dict, as templates expect them; OpenAI's format has them as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError):  # the template gets it as it stands
                arguments = json.loads(arguments)
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}
