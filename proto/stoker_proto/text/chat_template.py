"""A model's own jinja2 chat template, rendered as transformers renders it, in a sandbox.

The date (`strftime_now`) is the option `date`. Without it the function is undefined, and templates use their fixed date: a prompt
must not change overnight.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, NoReturn, TypeVar

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stoker_proto.errors import ConfigError, DataError
from stoker_proto.text.chat_messages import CallForm, Mark, Message, messages_of
from stoker_proto.text.control_tokens import GENERATION_CLOSE, GENERATION_OPEN
from stoker_proto.text.functions import Tools
from stoker_proto.text.turns import Call, Parts, Turn, is_plain

_GENERATION = re.compile(f"[{GENERATION_OPEN}{GENERATION_CLOSE}]")
_PROBE = "probe words"
_DEADLINE_S = 20.0
"""For one short turn; published templates take 1 ms."""
_MOST = 1_000_000
"""Characters of a repeated text; size of a factor."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_defined",
        "description": "probe",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "probe"}},
            "required": ["probe_key"],
        },
    },
}
_RESULT = "probe_result"
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
"""Variables that are not options."""


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

    def __init__(self, source: str, names: Mapping[str, str], options: Mapping[str, Any] | None = None) -> None:
        """names: special tokens by name, e.g. {"bos_token": "<s>"}. options: variables of the template. Raises ConfigError."""
        environment = _BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        options = dict(options or {})
        if (clock := _clock(options)) is not None:
            environment.globals["strftime_now"] = clock
        self._variables = {**names, **options}
        try:
            self._template = _in_time(lambda: environment.from_string(source))
            self._template.globals = dict(
                self._template.globals
            )  # was a ChainMap, which is slow to copy for each rendering
            self.marks_generation = environment.parse(source).find(nodes.ExtensionAttribute) is not None
            """Whether the template marks the assistant's text itself."""
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
        turn, parts = Turn(role="user", text=instruction), (None,) * num_images + (instruction,)
        messages = messages_of([turn], [parts], _unchanged, None, as_string=self._takes_strings and not num_images)
        try:
            text = self._render(messages, True)
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(_failed(error)) from error
        text = _GENERATION.sub("", text)
        if num_images and text.count(image) != num_images:
            raise DataError(
                f"the model's chat template writes {text.count(image)} times {image!r} for {num_images} images; "
                "use data.dialogue.template=stoker, or an instruction without that text"
            )
        return text

    def messages(self, turns: Sequence[Turn], parts: Sequence[Parts], mark: Mark) -> list[Message]:
        """The input of the template; its texts went through `mark`.

        Templates of vision-language models take content as a list of parts, those of text models as a string.
        """
        as_string = self._takes_strings and not any(None in of_turn for of_turn in parts)
        form = None if is_plain(turns) else self.call_form
        return messages_of(turns, parts, mark, form, as_string=as_string)

    def render(self, messages: Sequence[Message], *, opening: bool, tools: Tools = ()) -> str:
        """The text. opening: followed by the beginning of an assistant's turn. Raises DataError where the template fails."""
        try:
            return self._render(messages, opening, tools)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(str(message["role"]) for message in messages[:8])
            raise DataError(f"the model's chat template does not take this dialogue ({roles} ...): {error}") from error

    @cached_property
    def call_form(self) -> CallForm | None:
        """How the template takes definitions and calls of functions; None where it does not write both."""
        forms = [CallForm(as_text, own) for own in (True, False) for as_text in (False, True)]
        return next((form for form in forms if self._writes_calls(form)), None)

    @cached_property
    def takes_reasoning(self) -> bool:
        """Whether the template writes the reasoning of the last answer."""
        turns = [Turn(role="user", text=_PROBE), Turn(role="assistant", text="yes", reasoning="probe_reasoning")]
        return "probe_reasoning" in (self.try_turns(turns) or "")

    def try_turns(self, turns: Sequence[Turn], tools: Tools = (), form: CallForm | None = None) -> str | None:
        """The text of turns without images, as they are; None where the template does not take them."""
        parts = [(turn.text,) for turn in turns]
        messages = messages_of(turns, parts, _unchanged, form, as_string=self._takes_strings)
        try:
            return _GENERATION.sub("", self._render(messages, False, tools))
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError):
            return None

    def _writes_calls(self, form: CallForm) -> bool:
        call = Call("probe_defined", {"probe_key": "probe_value"}, "call_0123456789abcdef")
        turns = [
            Turn(role="user", text=_PROBE),
            Turn(role="assistant", text="", calls=(call,)),
            Turn(role="tool", text=_RESULT, call_id=call.id),
            Turn(role="assistant", text="yes"),
        ]
        text = self.try_turns(turns, [_TOOL], form)
        if text is None or self.try_turns(turns[:1], [_TOOL]) == self.try_turns(turns[:1]):
            return False
        shown = all(word in text for word in ("probe_defined", "probe_value", _RESULT))
        return shown and "'probe_key'" not in text and '\\"probe_key' not in text  # Python's form, or JSON inside JSON

    def _render(self, messages: Sequence[Message], opening: bool, tools: Tools = ()) -> str:
        text: str = self._template.render(
            messages=list(messages),
            tools=list(tools) or None,
            documents=None,
            add_generation_prompt=opening,
            **self._variables,
        )
        return text

    def _probe(self, content: str | list[dict[str, str]]) -> str:
        try:
            return _in_time(lambda: self._render([{"role": "user", "content": content}], True))
        except (TemplateError, TypeError, ValueError) as error:
            if isinstance(content, str) and not isinstance(error, TemplateError):
                return ""  # the template takes a list of parts
            raise ConfigError(_failed(error)) from error


def _clock(options: dict[str, Any]) -> Callable[[str], str] | None:
    """`strftime_now` of the option `date`. Raises ConfigError for an option that cannot be one."""
    for name in options:
        if name in _RESERVED or not name.isidentifier():
            raise ConfigError(
                f"data.dialogue.template_options has {name!r}: name variables of the chat template, such as enable_thinking"
            )
    date = options.get("date")
    if date is None:
        return None
    try:
        day = datetime.datetime.strptime(str(date), "%Y-%m-%d")
    except ValueError as error:
        raise ConfigError(
            f"data.dialogue.template_options.date is {date!r}: a day such as 2025-06-30 is expected"
        ) from error
    return day.strftime


def _unchanged(text: str, of_assistant: bool) -> str:
    return text


def _failed(error: Exception) -> str:
    way_out = "use another template"
    if "strftime_now" in str(error):
        way_out = "it writes today's date: fix one with data.dialogue.template_options: {date: 2025-06-30}"
    return f"the model's chat template fails on one user's turn ({error}); {way_out}"


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
