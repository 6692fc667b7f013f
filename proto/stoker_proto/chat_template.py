"""A model's own jinja2 chat template, rendered as transformers renders it, in a sandbox.

The date (`strftime_now`) is left undefined, for which templates have a fixed one: a prompt must not change overnight.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stoker_proto.errors import ConfigError, DataError


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words; here it is only what it holds."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One template, compiled."""

    def __init__(self, source: str, names: dict[str, str]) -> None:
        """names: special tokens by name, e.g. {"bos_token": "<s>"}. Raises ConfigError."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        self._names = names
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid ({error}); use another template") from error

    def prompt(self, instruction: str, num_images: int, image: str) -> str:
        """A user's turn with images and words, and the opening of the assistant's.

        Models that see images take content as a list of parts, those of text only as a string: so do their templates.
        `image` is what stands for an image in the rendered text; DataError where the template leaves images out.
        """
        content: str | list[dict[str, str]] = instruction
        if num_images:
            content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": instruction}]
        try:
            text = self._template.render(
                messages=[{"role": "user", "content": content}], add_generation_prompt=True, **self._names
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the model's chat template fails on one user's turn ({error}); use another template"
            ) from error
        if num_images and text.count(image) != num_images:
            raise DataError(
                f"the model's chat template writes {text.count(image)} times {image!r} for {num_images} images; "
                "use data.dialogue.template=stoker, or an instruction without that text"
            )
        return text


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
