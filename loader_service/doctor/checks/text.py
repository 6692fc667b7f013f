"""Language: answers, labels, ends, lengths, special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator

from loader_service.doctor.facts import Examined
from loader_service.doctor.finding import Finding

_SHOWN = 5
_LONG = 10
"""Times the median."""
_ENOUGH = 10


def empty_answers(examined: Examined) -> Iterator[Finding]:
    """Warning: a learned turn of the assistant without text."""
    for entry in examined.entries:
        found = [
            record.record
            for record in entry.records
            if any(turn.learned and turn.role == "assistant" and not turn.text.strip() for turn in record.turns)
        ]
        if found:
            problem = (
                f"{len(found)} of {len(entry.records)} sampled dialogues have an empty answer, which teaches it to stop"
            )
            yield Finding("warning", "empty_answers", entry.path, _records(found), problem, "remove these turns")


def no_labels(examined: Examined) -> Iterator[Finding]:
    """Error: a row without a token to learn."""
    for entry in examined.entries:
        found = [record.record for record in entry.records if any(row.num_labels == 0 for row in record.rows)]
        if found:
            problem = f"{len(found)} of {len(entry.records)} sampled records have a row without a label: nothing is learned of it"
            way_out = "check data.options.learn, the messages' flags, and data.overlong"
            yield Finding("error", "no_labels", entry.path, _records(found), problem, way_out)


def stop_token(examined: Examined) -> Iterator[Finding]:
    """Warning: the last label of an answer is no token at which generation stops."""
    if examined.processor is None or not examined.stop_ids:
        return
    for entry in examined.entries:
        rows = [
            (r.record, row) for r in entry.records for row in r.rows if row.is_answer and row.last_label is not None
        ]
        # Of a row that was cut at max_seq_len the end is not there: `cut_dialogues`.
        whole = [(number, row) for number, row in rows if row.num_tokens < examined.config.data.max_seq_len]
        found = [(number, row.last_label) for number, row in whole if row.last_label not in examined.stop_ids]
        if found:
            numbers = list(dict.fromkeys(number for number, _ in found))
            last = found[0][1]
            problem = (
                f"the last learned token of {len(found)} of {len(whole)} rows, e.g. id {last}, is none at which generation stops "
                f"({', '.join(map(str, sorted(examined.stop_ids)))}): the model talks on after its answer"
            )
            way_out = "name the token that ends a turn in data.dialogue.end, or add it to eos_token_id of generation_config.json"
            yield Finding("warning", "stop_token", entry.path, _records(numbers), problem, way_out)


def cut_dialogues(examined: Examined) -> Iterator[Finding]:
    """Warning: dialogues as long as max_seq_len, where data.overlong cuts them."""
    data = examined.config.data
    if data.overlong == "error":
        return
    for entry in examined.entries:
        dialogues = [record for record in entry.records if record.turns]
        found = [
            record.record for record in dialogues if any(row.num_tokens >= data.max_seq_len for row in record.rows)
        ]
        if found:
            problem = (
                f"{len(found)} of {len(dialogues)} sampled dialogues fill all {data.max_seq_len} tokens: "
                f"they were cut (data.overlong {data.overlong})"
            )
            yield Finding("warning", "cut_dialogues", entry.path, _records(found), problem, "raise data.max_seq_len")


def long_rows(examined: Examined) -> Iterator[Finding]:
    """Note: the longest row is many times as long as the median one, so batches without packing are mostly padding."""
    data = examined.config.data
    if data.packing or data.group_by_length:
        return
    lengths = sorted(row.num_tokens for _, record in examined.records() for row in record.rows)
    if len(lengths) >= _ENOUGH and lengths[-1] > _LONG * lengths[len(lengths) // 2]:
        problem = f"the longest of {len(lengths)} sampled rows has {lengths[-1]} tokens, the median {lengths[len(lengths) // 2]}"
        way_out = "set data.packing or data.group_by_length, or batches are mostly padding"
        yield Finding("note", "long_rows", "", "", problem, way_out)


def special_tokens(examined: Examined) -> Iterator[Finding]:
    """Warning: a special token of the model stands in a text; it is tokenised as plain text."""
    if not examined.special_tokens:
        return
    pattern = re.compile("|".join(map(re.escape, sorted(examined.special_tokens, key=len, reverse=True))))
    for entry in examined.entries:
        found = {}
        for record in entry.records:
            # `<image>` is the place of an image where there are some.
            hits = {
                h for text in record.texts for h in pattern.findall(text) if not (record.cameras and h == "<image>")
            }
            if hits:
                found[record.record] = sorted(hits)
        if found:
            tokens = ", ".join(dict.fromkeys(token for hits in found.values() for token in hits))
            problem = (
                f"{len(found)} of {len(entry.records)} sampled records have special tokens in their text, "
                f"read as plain text: {tokens}"
            )
            way_out = "remove them, or write the dialogue as messages, so that the template writes the tokens"
            yield Finding("warning", "special_tokens", entry.path, _records(list(found)), problem, way_out)


def _records(numbers: list[int]) -> str:
    more = "..." if len(numbers) > _SHOWN else ""
    return f"record{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_SHOWN]))}{more}"
