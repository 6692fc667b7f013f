"""A row as text: its origin, its tokens with the labels marked, its images, its action, and the action that its tokens decode to.

train 0 (demos/train.jsonl): lane 3, row 0 of 41
  record 17, sample 3     demos/train.jsonl, offset 5310, size 4102
  images                  256x256 (14.2 KB)
  tokens                  24, of them 5 labels
  text                    <s><|User|> <image>x16 Push the cube <|Assistant|>[<action 31><action 88></s>]
                          (letters that only spell a token have a backslash before them: \\</s>)
  action                  0.012 -0.3 ...
  action of the tokens    0.011 -0.3 ...    largest difference 0.001
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.inspection.rows import InspectedRow, InspectedSample
from loader_service.pieces.piece import EncodedSample
from stoker_proto.errors import DataError
from stoker_proto.processor import Processor

_WIDTH = 24  # of the first column


def row_lines(
    row: InspectedRow, processor: Processor, *, tokens: bool, colour: bool, picture: Path | None
) -> Iterator[str]:
    """For people. tokens: also one line for each token; colour: labels are green, else they stand in brackets."""
    manifest = row.manifest
    yield f"{manifest.split} {manifest.entry} ({manifest.path}): {row.place}"
    for sample in row.samples:
        yield _line(
            f"record {sample.ref.record}, sample {sample.ref.sample}",
            f"{sample.shard}, offset {sample.offset}, size {sample.size}",
        )
        if sample.encoded is None:
            yield _line("skipped", str(sample.error))
        else:
            yield from _sample_lines(sample.encoded, processor, tokens=tokens, colour=colour)
    if picture is not None:
        yield _line("picture", str(picture))


def row_tree(row: InspectedRow, processor: Processor) -> dict[str, Any]:
    """For programs: plain values."""
    return {
        "split": row.manifest.split,
        "entry": row.manifest.entry,
        "path": row.manifest.path,
        "place": row.place,
        "samples": [_sample_tree(sample, processor) for sample in row.samples],
    }


def _sample_lines(sample: EncodedSample, processor: Processor, *, tokens: bool, colour: bool) -> Iterator[str]:
    texts, labels = token_texts(sample, processor), sample.supervised.astype(bool)
    if sample.images:
        sizes = ", ".join(f"{len(image) / 1000:.1f} KB" for image in sample.images)
        assert processor.image is not None  # else the encoder would have refused the sample
        yield _line("images", f"{processor.image.width}x{processor.image.height}, as they travel: {sizes}")
    yield _line("tokens", f"{len(texts)}, of them {int(labels.sum())} labels")
    shown = spelled_out(texts, sample.input_ids.tolist(), processor)
    yield _line("text", marked_text(shown, labels, colour=colour))
    if tokens:
        for number, token in enumerate(sample.input_ids.tolist()):
            yield f"{'label' if labels[number] else '':>{_WIDTH}}  {number:5} {token:7}  {texts[number]!r}"
    if sample.action is not None:
        yield from _action_lines(sample, labels, processor)


def token_texts(sample: EncodedSample, processor: Processor) -> list[str]:
    """The text of each token; where an action is learned, its codes."""
    texts, vocabulary = processor.token_texts(sample.input_ids), processor.vocabulary
    if sample.action is not None and vocabulary is not None:
        ids = sample.input_ids
        places = _action_places(sample, sample.supervised != 0, processor)
        for place, code in zip(places.tolist(), vocabulary.to_codes(ids[places]).tolist(), strict=True):
            texts[place] = f"<action {code}>"
    return texts


def spelled_out(texts: list[str], ids: list[int], processor: Processor) -> list[str]:
    """The texts with a backslash before letters that spell a control token: `\\<|im_end|>` is no token, `<|im_end|>` is one."""
    shown, start = list(texts), 0
    while start < len(ids):
        stop = start
        while stop < len(ids) and not processor.is_added(ids[stop]):
            stop += 1
        run = "".join(texts[start:stop])
        for found in processor.control.find_all(run):
            position, place = 0, start
            while position + len(texts[place]) <= found.start():
                position += len(texts[place])
                place += 1
            cut = found.start() - position + len(shown[place]) - len(texts[place])
            shown[place] = f"{shown[place][:cut]}\\{shown[place][cut:]}"
        start = stop + 1
    return shown


def _action_lines(sample: EncodedSample, labels: NDArray[np.bool_], processor: Processor) -> Iterator[str]:
    assert sample.action is not None
    yield _line("action", _numbers(sample.action))
    try:
        decoded = decoded_action(sample, labels, processor)
    except DataError as error:
        yield _line("action of the tokens", f"none: {error}")
        return
    difference = float(np.abs(decoded - sample.action).max())
    yield _line("action of the tokens", f"{_numbers(decoded)}    largest difference {difference:.3g}")


def decoded_action(sample: EncodedSample, labels: NDArray[np.bool_], processor: Processor) -> NDArray[np.float32]:
    """float32[K, D]: the action of a model that predicts every label exactly. Raises DataError."""
    if processor.vocabulary is None:
        raise DataError("there is no action codec")
    return processor.actions_from_ids(sample.input_ids[_action_places(sample, labels, processor)])


def action_codes(sample: EncodedSample, processor: Processor) -> NDArray[np.int32]:
    """int32[n]: the codes of the sample's action tokens."""
    vocabulary = processor.vocabulary
    assert vocabulary is not None  # an action was encoded
    return vocabulary.to_codes(sample.input_ids[_action_places(sample, sample.supervised != 0, processor)])


def _action_places(sample: EncodedSample, labels: NDArray[np.bool_], processor: Processor) -> NDArray[np.int64]:
    """Where the action's tokens stand: in front of the end token, labels or not where their number is fixed."""
    codec, vocabulary, ids = processor.codec, processor.vocabulary, sample.input_ids
    assert codec is not None  # an action was encoded
    assert vocabulary is not None
    if codec.code_lengths is None:
        return np.arange(max(len(ids) - 1 - codec.max_tokens, 0), len(ids) - 1)
    return np.flatnonzero(labels & (ids >= vocabulary.first_id) & (ids < vocabulary.end_id))


def marked_text(texts: list[str], labels: NDArray[np.bool_], *, colour: bool) -> str:
    """Tokens one after the other, repeated ones (images) counted, line feeds visible, labels green or in brackets."""
    opening, closing = ("\x1b[32m", "\x1b[0m") if colour else ("[", "]")
    parts, start = [], 0
    while start < len(texts):
        stop = start
        while stop < len(texts) and labels[stop] == labels[start]:
            stop += 1
        words = _counted(texts[start:stop]).replace("\n", "\\n")
        parts.append(f"{opening}{words}{closing}" if labels[start] else words)
        start = stop
    return "".join(parts)


def _counted(texts: list[str]) -> str:
    found, start = [], 0
    while start < len(texts):
        stop = start
        while stop < len(texts) and texts[stop] == texts[start]:
            stop += 1
        found.append(f"{texts[start]}x{stop - start}" if stop - start > 3 else texts[start] * (stop - start))
        start = stop
    return "".join(found)


def _sample_tree(sample: InspectedSample, processor: Processor) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "record": sample.ref.record,
        "sample": sample.ref.sample,
        "shard": str(sample.shard),
        "offset": sample.offset,
        "error": sample.error,
    }
    encoded = sample.encoded
    if encoded is None:
        return tree
    return tree | {
        "timestep": encoded.timestep,
        "input_ids": encoded.input_ids.tolist(),
        "labels": encoded.supervised.tolist(),
        "texts": token_texts(encoded, processor),
        "image_bytes": [len(image) for image in encoded.images],
        "action": None if encoded.action is None else encoded.action.tolist(),
    }


def _numbers(action: NDArray[np.float32]) -> str:
    return " | ".join(" ".join(f"{number:.4g}" for number in step) for step in action.tolist())


def _line(name: str, value: str) -> str:
    return f"  {name:<{_WIDTH - 2}}  {value}"
