"""The chat template that an exported model carries: the one that was trained, in transformers' form.

    chat_template     the model's own; its options are set where the caller does not set them
    stoker            <s><|User|> <image> Hi <|Assistant|> Hello</s>
    openvla, custom   one user turn, and the answer

Without it, an instruct model that was trained with `stoker` would be asked in its old template.
"""

from __future__ import annotations

import json

from stoker_proto.text.dialogue import Dialogue

_PARTS = (
    "{%- macro said(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if not loop.first %}{{ ' ' }}{% endif -%}"
    "{%- if part.type == 'image' -%}{{ IMAGE }}{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)
_STOKER = (
    _PARTS + "{{ LEADING }}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
    "{{ '<|Assistant|>' }}{% generation %}{{ ' ' + said(message.content) + END }}{% endgeneration %}"
    "{%- elif message.role == 'system' -%}{{ said(message.content) + ' ' }}"
    "{%- else -%}{{ '<|User|> ' + said(message.content) + ' ' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|Assistant|>' }}{%- endif -%}"
)
_SINGLE = (
    "{%- if messages[0].role != 'user' or messages|length > 2 -%}"
    "{{ raise_exception('this model was trained on one user turn and one answer') }}{%- endif -%}"
    "{%- set ns = namespace(text='', images=[]) -%}{%- set content = messages[0].content -%}"
    "{%- if content is string -%}{%- set ns.text = content -%}{%- else -%}{%- for part in content -%}"
    "{%- if part.type == 'image' -%}{%- set ns.images = ns.images + [IMAGE] -%}"
    "{%- else -%}{%- set ns.text = ns.text + part.text -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- set images = ns.images|join(SEPARATOR) -%}{{ LEADING }}WRITTEN"
    "{%- if messages|length == 2 -%}{% generation %}{{ messages[1].content + END }}{% endgeneration %}{%- endif -%}"
)


def exported_template(dialogue: Dialogue, *, leading: str, end: str, image: str) -> str:
    """jinja2 source. leading: tokens before every text, as text; end: the token behind answers; image: its placeholder, or ""."""
    if dialogue.template == "chat_template":
        return _with_options(dialogue)
    if dialogue.template == "stoker":
        source = _STOKER
    else:
        source = _SINGLE.replace("WRITTEN", _written(dialogue)).replace(
            "SEPARATOR", '""' if _is_openvla(dialogue) else '" "'
        )
    for name, text in (("LEADING", leading), ("END", end), ("IMAGE", image)):
        source = source.replace(name, json.dumps(text, ensure_ascii=False))
    return source


def _with_options(dialogue: Dialogue) -> str:
    """`date` is left out: whoever uses the model has a day of his own."""
    options = {name: value for name, value in dialogue.options.items() if name != "date"}
    return (
        "".join(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif -%}}\n"
            for name, value in options.items()
        )
        + dialogue.text
    )


def _literal(value: object) -> str:
    return (
        {True: "true", False: "false", None: "none"}[value] if value is None or isinstance(value, bool) else repr(value)
    )


def _written(dialogue: Dialogue) -> str:
    """The prompt of a template with {image} and {instruction}, as jinja2 expressions."""
    if _is_openvla(dialogue):
        text = dialogue.text.replace("{image}", "")
        before, _, after = text.partition("{instruction}")
        return "{{ images + " + json.dumps(before) + " + ns.text|lower + " + json.dumps(after) + " }}"
    pieces = []
    with_space = dialogue.text.replace("{image} ", "\0 ").replace("{image}", "\0")
    for number, part in enumerate(with_space.split("{instruction}")):
        if number:
            pieces.append("ns.text")
        for k, text in enumerate(part.split("\0")):
            if k:
                pieces.append('(images + " " if images else "")' if text.startswith(" ") else "images")
                text = text.removeprefix(" ")
            if text:
                pieces.append(json.dumps(text, ensure_ascii=False))
    return "{{ " + " + ".join(pieces) + " }}"


def _is_openvla(dialogue: Dialogue) -> bool:
    return dialogue.template == "openvla"
