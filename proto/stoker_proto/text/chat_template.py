"""A model's own jinja2 chat template, rendered as transformers renders it, in a sandbox.

The date (`strftime_now`) is undefined, so that templates use their fixed date: a prompt must not change overnight.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stoker_proto.errors import ConfigError, DataError
from stoker_proto.text.control_tokens import GENERATION_CLOSE, GENERATION_OPEN, ControlTokens
from stoker_proto.text.turns import Parts, Turn, mark_parts, mark_reasoning

Message = dict[str, Any]
_GENERATION = re.compile(f"[{GENERATION_OPEN}{GENERATION_CLOSE}]")
_PROBE = "probe words"
_DEADLINE_S = 20.0
"""For one short turn; published templates take 1 ms."""
_MOST = 1_000_000
"""Characters of a repeated text; size of a factor."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names that templates have for the reasoning of a turn."""


class _Generation(Extension):
    """Puts the text of `{% generation %} ... {% endgeneration %}`, which is the assistant's, between two marks."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{GENERATION_OPEN}{caller()}{GENERATION_CLOSE}"


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox bounds `range`. This one bounds `*` and `**` too, each of which can take all memory in one step."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Raises SecurityError for a product that may be large."""
        plain = isinstance(left, int | float) and isinstance(right, int | float)
        if not (plain and operator == "*" and max(abs(left), abs(right)) <= _MOST):
            size = max((len(value) for value in (left, right) if isinstance(value, str | list | tuple)), default=0)
            times = max((value for value in (left, right) if isinstance(value, int)), default=0)
            if plain or size * times > _MOST:
                raise SecurityError(f"{operator} of large values is not computed")
        return super().call_binop(context, operator, left, right)


Rendered = TypeVar("Rendered")


def _in_time(work: Callable[[], Rendered]) -> Rendered:
    """`work()`, of a template that nobody has tried yet. Raises ConfigError if it takes longer than _DEADLINE_S."""
    done: Future[Rendered] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            done.set_exception(error)

    # A daemon: a template that never ends must not keep the process from ending with the error.
    threading.Thread(target=run, name="chat-template", daemon=True).start()
    try:
        return done.result(_DEADLINE_S)
    except TimeoutError:
        raise ConfigError(
            f"the model's chat template takes more than {_DEADLINE_S:.0f} s for one user's turn: it does not end, or not soon; "
            "use another template"
        ) from None


class ChatTemplate:
    """One template, compiled."""

    def __init__(self, source: str, names: dict[str, str]) -> None:
        """names: special tokens by name, e.g. {"bos_token": "<s>"}. Raises ConfigError."""
        environment = _BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        self._names = names
        try:
            self._template = _in_time(lambda: environment.from_string(source))
            self._template.globals = dict(
                self._template.globals
            )  # was a ChainMap, which is slow to copy for each rendering
            self.marks_generation = environment.parse(source).find(nodes.ExtensionAttribute) is not None
            """Whether the template marks the assistant's text itself."""
            self.reasoning_field = _reasoning_field(environment.parse(source))
            """Its name for the reasoning of a turn; None: it writes none."""
        except TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid ({error}); use another template") from error
        self._takes_strings = _PROBE in self._probe(_PROBE)
        if not self._takes_strings and _PROBE not in self._probe([{"type": "text", "text": _PROBE}]):
            raise ConfigError("the model's chat template leaves out what the user says; use another template")

    def prompt(self, instruction: str, num_images: int, image: str) -> str:
        """A user turn with images and text, and the opening of the assistant's turn.

        image: the placeholder of an image in the rendered text. Raises DataError where the template leaves images out,
        ConfigError where it fails.
        """
        parts = (None,) * num_images + (instruction,)
        try:
            text = self._render([_message("user", parts, as_string=self._takes_strings and not num_images)], True)
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the model's chat template fails on one user's turn ({error}); use another template"
            ) from error
        text = _GENERATION.sub("", text)
        if num_images and text.count(image) != num_images:
            raise DataError(
                f"the model's chat template writes {text.count(image)} times {image!r} for {num_images} images; "
                "use data.dialogue.template=stoker, or an instruction without that text"
            )
        return text

    def messages(self, turns: Sequence[Turn], parts: Sequence[Parts], control: ControlTokens) -> list[Message]:
        """The input of the template. Control tokens in the turns' text are marked.

        Templates of vision-language models take content as a list of parts, those of text models as a string.
        """
        as_string = self._takes_strings and not any(None in of_turn for of_turn in parts)
        return [
            _message(turn.role, mark_parts(turn, of_turn, control), as_string) | self._reasoning(turn, control)
            for turn, of_turn in zip(turns, parts, strict=True)
        ]

    def _reasoning(self, turn: Turn, control: ControlTokens) -> Message:
        """The turn's reasoning under the name that the template knows, else under the usual one."""
        marked = mark_reasoning(turn, control)
        if marked is None:
            return {}
        return {self.reasoning_field or REASONING_FIELDS[0]: marked}

    def render(self, messages: Sequence[Message], *, opening: bool) -> str:
        """The text. opening: followed by the beginning of an assistant's turn. Raises DataError where the template fails."""
        try:
            return self._render(messages, opening)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(str(message["role"]) for message in messages[:8])
            raise DataError(f"the model's chat template does not take this dialogue ({roles} ...): {error}") from error

    def _render(self, messages: Sequence[Message], opening: bool) -> str:
        text: str = self._template.render(
            messages=list(messages), tools=None, documents=None, add_generation_prompt=opening, **self._names
        )
        return text

    def _probe(self, content: str | list[dict[str, str]]) -> str:
        try:
            return _in_time(lambda: self._render([{"role": "user", "content": content}], True))
        except (TemplateError, TypeError, ValueError) as error:
            if isinstance(content, str) and not isinstance(error, TemplateError):
                return ""  # the template takes a list of parts
            raise ConfigError(
                f"the model's chat template fails on one user's turn ({error}); use another template"
            ) from error


def _reasoning_field(source: nodes.Template) -> str | None:
    """The first of the fields that the template looks at: message.thinking, message['thinking'] or 'thinking' in message."""
    named = {node.attr for node in source.find_all(nodes.Getattr)} | {
        node.value for node in source.find_all(nodes.Const)
    }
    return next((field for field in REASONING_FIELDS if field in named), None)


def _message(role: str, parts: Parts, as_string: bool) -> Message:
    if as_string:
        return {"role": role, "content": parts[0]}
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
