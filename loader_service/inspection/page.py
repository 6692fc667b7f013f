"""Rows as one page of HTML that needs nothing else: pictures inside, no script, no request, the same in any browser.

    page = Page(config, processor, "loader-inspect --config my.yaml")
    page.add(row); ...; page.write(Path("rows.html"))

First what all rows on the page have in common (lengths, actions before and after the codec, codes, sources), then row by row.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from loader_service.inspection.charts import counts, histogram
from loader_service.inspection.rows import InspectedRow, InspectedSample
from loader_service.inspection.show import action_codes, decoded_action, token_texts
from loader_service.inspection.style import HEAD
from loader_service.pieces.piece import EncodedSample
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.host.files import write_whole
from stoker_proto.processor import Processor

MAX_ROWS = 500
"""Of one page: with pictures a browser holds no more with ease."""
_TOKEN_MULTIPLE = 8
"""Trainers pad rows to a multiple of it (`trainer.feed.batch`)."""


class Page:
    """Collects rows; `write` writes the page."""

    def __init__(self, config: Config, processor: Processor, title: str) -> None:
        self._config, self._processor, self._title = config, processor, title
        self._rows: list[str] = []
        self._lengths: list[int] = []  # of rows, in tokens
        self._labels = 0
        self._raw: list[NDArray[np.float32]] = []  # actions [K, D]
        self._decoded: list[NDArray[np.float32]] = []
        self._codes: list[NDArray[np.int32]] = []
        names = config.data.source_names()
        self._sources = {name: [0, 0, 0] for name in names}  # rows, tokens, labels

    def add(self, row: InspectedRow, *, heading: str = "", is_wrong: bool = False) -> None:
        """Append a row. heading: more about its place; is_wrong: mark it. Raises ConfigError above MAX_ROWS."""
        if len(self._rows) == MAX_ROWS:
            raise ConfigError(f"a page holds at most {MAX_ROWS} rows: ask for fewer with --num")
        samples = "".join(self._sample(sample) for sample in row.samples)
        self._count(row)
        manifest = row.manifest
        place = escape(f"{heading}{manifest.split} {manifest.entry}: {row.place}")
        wrong = '<strong class="wrong">differs from what was trained</strong>' if is_wrong else ""
        self._rows.append(f"<section><h2>{place}</h2>{wrong}{samples}</section>")

    def write(self, path: Path) -> None:
        """Write the page. Raises ConfigError where that fails."""
        try:
            write_whole(path, self.html().encode())
        except OSError as error:
            raise ConfigError(f"--html {path} cannot be written ({error.strerror}): name another file") from error

    def html(self) -> str:
        """The page."""
        title = escape(self._title)
        summary = "".join(self._summary())
        legend = (
            '<p class="legend"><span class="t l">label</span> is trained, <span class="t">context</span> is not; '
            '<span class="t s">special token</span> is one token, letters that only look like it have no frame; '
            '<span class="t a">action 12</span> is the code of an action.</p>'
        )
        return (
            f"<!doctype html><html lang=en><head>{HEAD}<title>{title}</title></head><body>"
            f"<h1>{title}</h1>{summary}{legend}{''.join(self._rows)}</body></html>\n"
        )

    # -- one row

    def _sample(self, sample: InspectedSample) -> str:
        where = escape(
            f"record {sample.ref.record}, sample {sample.ref.sample} of {sample.shard}, offset {sample.offset}, "
            f"size {sample.size}"
        )
        if sample.encoded is None:
            return f'<p class="where">{where}</p><p class="wrong">skipped: {escape(str(sample.error))}</p>'
        encoded = sample.encoded
        images = "".join(self._image(data) for data in encoded.images)
        labels = int(encoded.supervised.sum())
        size = f"{len(encoded.input_ids)} tokens, of them {labels} labels"
        return (
            f'<p class="where">{where}</p><div class="images">{images}</div><p class="size">{size}</p>'
            f'<p class="text">{"".join(self._tokens(encoded))}</p>{self._action(encoded)}'
        )

    def _image(self, data: bytes) -> str:
        """As the model sees it: decoded from what travels."""
        image = self._processor.image
        assert image is not None  # else the encoder would have refused the sample
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        self._processor.decode_image(data, pixels)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        text = base64.b64encode(file.getvalue()).decode("ascii")
        size = f"width={image.width} height={image.height}"
        return f'<img alt="what the model sees" {size} src="data:image/png;base64,{text}">'

    def _tokens(self, sample: EncodedSample) -> Iterator[str]:
        """A span for each token; equal tokens in a row (images) are counted."""
        processor, ids = self._processor, sample.input_ids.tolist()
        texts, labels = token_texts(sample, processor), sample.supervised.tolist()
        start = 0
        while start < len(ids):
            stop = start + 1
            while stop < len(ids) and (ids[stop], labels[stop]) == (ids[start], labels[start]):
                stop += 1
            if stop - start <= 3:
                stop = start + 1
            is_action = texts[start].startswith("<action ") and not processor.is_added(ids[start])
            kinds = ["t", *(["l"] if labels[start] else [])]
            if is_action:
                kinds.append("a")
            elif processor.is_added(ids[start]):
                kinds.append("s")
            text = texts[start][1:-1] if is_action else texts[start]
            shown = escape(text).replace("\n", '<i class="feed">&#8629;</i><br>')
            times = f"<b>&times;{stop - start}</b>" if stop - start > 1 else ""
            yield f'<span class="{" ".join(kinds)}" title="place {start}, id {ids[start]}">{shown}{times}</span>'
            start = stop

    def _action(self, sample: EncodedSample) -> str:
        if sample.action is None:
            return ""
        raw = sample.action
        try:
            decoded = decoded_action(sample, sample.supervised != 0, self._processor)
        except DataError as error:
            return f'<p class="wrong">its tokens decode to no action: {escape(str(error))}</p>'
        self._raw.append(raw)
        self._decoded.append(decoded)
        self._codes.append(action_codes(sample, self._processor))
        difference = np.abs(decoded - raw)
        head = "".join(f"<th>{n}</th>" for n in range(raw.shape[1]))
        lines = "".join(
            _cells(f"{name} {step}" if len(raw) > 1 else name, values[step], style)
            for step in range(len(raw))
            for name, values, style in (("action", raw, ""), ("decoded", decoded, ""), ("error", difference, "error"))
        )
        return (
            f'<div class="wide"><table class="action"><tr><th>dimension</th>{head}</tr>{lines}</table></div>'
            f'<p class="size">largest error {float(difference.max()):.3g}</p>'
        )

    # -- all rows

    def _count(self, row: InspectedRow) -> None:
        encoded = [sample.encoded for sample in row.samples if sample.encoded is not None]
        tokens = sum(len(sample.input_ids) for sample in encoded)
        labels = sum(int(sample.supervised.sum()) for sample in encoded)
        self._lengths.append(max(tokens, 1))
        self._labels += labels
        data = self._config.data
        name = data.source_names()[data.entry_sources(row.manifest.split)[row.manifest.entry]]
        for place, value in enumerate((1, tokens, labels)):
            self._sources[name][place] += value

    def _summary(self) -> Iterator[str]:
        if not self._rows:
            yield "<p>no rows</p>"
            return
        size, data = self._config.trainer.micro_batch_size, self._config.data
        yield (
            f"<p>{len(self._rows)} rows, {sum(self._lengths)} tokens, {self._labels} labels. The longest has "
            f"{max(self._lengths)} tokens, data.max_seq_len is {data.max_seq_len}. In micro-batches of {size}, in this order, "
            f"{100 * padding_share(self._lengths, size):.1f}% of the positions are padding.</p>"
        )
        yield self._source_table()
        yield f'<div class="charts">{histogram("tokens of a row", np.asarray(self._lengths, np.float64))}'
        yield from self._action_charts()
        yield "</div>"

    def _source_table(self) -> str:
        weights = self._config.data.weights or (None,) * len(self._sources)
        total = max(sum(self._lengths), 1)
        lines = "".join(
            f"<tr><td>{escape(name)}</td><td>{'one pass' if weight is None else f'{weight:g}'}</td><td>{rows}</td>"
            f"<td>{100 * rows / len(self._rows):.1f}%</td><td>{100 * tokens / total:.1f}%</td><td>{labels}</td></tr>"
            for (name, (rows, tokens, labels)), weight in zip(self._sources.items(), weights, strict=True)
        )
        head = (
            "<tr><th>source</th><th>weight</th><th>rows here</th><th>of rows</th><th>of tokens</th><th>labels</th></tr>"
        )
        return f'<div class="wide"><table class="sources">{head}{lines}</table></div>'

    def _action_charts(self) -> Iterator[str]:
        codec = self._processor.codec
        if not self._raw or codec is None:
            return
        raw = np.concatenate(self._raw).astype(np.float64)  # [N K, D]
        decoded = np.concatenate(self._decoded).astype(np.float64)
        difference = np.abs(decoded - raw)
        for dim in range(raw.shape[1]):
            title = f"action {dim}: bars are the data, the line is after the codec; mean error {difference[:, dim].mean():.3g}"
            yield histogram(title, raw[:, dim], decoded[:, dim])
        used = np.bincount(np.concatenate(self._codes), minlength=codec.num_codes)
        yield counts(f"codes of {codec.name}: {int((used > 0).sum())} of {codec.num_codes} are used", used.tolist())


def padding_share(lengths: list[int], micro_batch_size: int) -> float:
    """The share of positions that hold no token, where rows are put together in this order.

    >>> padding_share([8, 4, 16], 2)
    0.125
    """
    positions = 0
    for first in range(0, len(lengths), micro_batch_size):
        batch = lengths[first : first + micro_batch_size]
        positions += len(batch) * -(-max(batch) // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
    return 1 - sum(lengths) / positions


def _cells(name: str, values: NDArray[np.float32], style: str) -> str:
    cells = "".join(f"<td>{value:.4g}</td>" for value in values.tolist())
    return f'<tr class="{style}"><td>{name}</td>{cells}</tr>'
