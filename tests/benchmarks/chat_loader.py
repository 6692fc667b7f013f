"""What a conversation costs in the whole loader, beside a straight reader of the same libraries on the same lines.

`straight` reads a line, parses it (orjson), renders it (an f-string, or the model's chat template by jinja2), encodes the text
with `tokenizers`, and packs arrays of ids and labels (msgpack), 32 conversations to a message; packed, it joins all tokens and
cuts them into rows. No order, no labels worth the name, no other process. `loader` is `loader-serve` with a null trainer:
everything between ticket and piece, the plan included. Interleaved rounds of one run; medians of CPU time per conversation.

    python tests/benchmarks/chat_loader.py [--rows 4000] [--turns 2] [--rounds 5] [--model DIR] [--template stoker]

`--model` is a folder with a tokenizer.json (default: the tests' tiny one); the words are those of Python's own manual.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pydoc_data.topics import topics

import jinja2.sandbox
import msgpack
import numpy as np
import orjson
import yaml
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "proto")]

from loader_cost import bench, loaders, run_tool  # noqa: E402 - found through the line above

from tests.proto.conftest import write_chat_folder  # noqa: E402
from tests.proto.text.chat_templates import CHATML, plain  # noqa: E402

BATCH = 32
MAX_SEQ_LEN = 2048


def main() -> None:
    """Make the data, run all rounds, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16000, help="conversations; default: %(default)s")
    parser.add_argument("--turns", type=int, default=2, help="of each conversation; default: %(default)s")
    parser.add_argument("--words", type=int, default=80, help="of a turn, on average; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved; default: %(default)s")
    parser.add_argument("--template", action="append", choices=["stoker", "chat_template"], help="default: both")
    parser.add_argument("--packing", action="append", choices=["false", "true"], help="default: both")
    parser.add_argument("--loaders", type=int, default=1, help="processes that serve; default: %(default)s")
    parser.add_argument("--model", type=Path, help="folder with a tokenizer.json; default: the tiny one")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/bench", help="where data is made and kept")
    arguments = parser.parse_args()
    model = arguments.model or write_chat_folder(arguments.folder / "chat-model", plain(CHATML))
    folder = arguments.folder / f"chat-{arguments.rows}-{arguments.turns}-{arguments.words}"
    shard = folder / "train.jsonl"
    if not shard.exists():
        folder.mkdir(parents=True)
        write_conversations(shard, arguments.rows, arguments.turns, arguments.words)
    for template in arguments.template or ["stoker", "chat_template"]:
        for packing in arguments.packing or ["false", "true"]:
            measure(arguments, model.resolve(), shard, template, packing == "true")


def write_conversations(shard: Path, rows: int, turns: int, words: int) -> None:
    """Users and assistants by turns; each turn is a piece of the manual of 0.5 to 1.5 times `words` words."""
    generator = random.Random(0)
    text = " ".join(topics.values()).split(" ")
    with shard.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            messages = []
            for turn in range(turns):
                count = generator.randint(words // 2, words * 3 // 2)
                start = generator.randrange(len(text) - count)
                said = " ".join(text[start : start + count]).strip() or "Yes."
                messages.append({"role": ("user", "assistant")[turn % 2], "content": said})
            lines.write(json.dumps({"messages": messages}) + "\n")


def measure(arguments: argparse.Namespace, model: Path, shard: Path, template: str, packing: bool) -> None:
    """One line of figures."""
    config = shard.parent / f"{template}-{json.dumps(packing)}.yaml"
    micro = 8 if packing else BATCH
    tree = {
        "model": {"base_model_path": str(model)},
        "data": {
            "dataset_type": "chat", "train_data_paths": [str(shard)], "max_seq_len": MAX_SEQ_LEN, "packing": packing,
            "dialogue": {"template": template}, "overlong": "truncate",
        },
        "trainer": {"micro_batch_size": micro, "global_batch_size": micro, "lr": 1e-4},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(tree))
    run_tool("loader_service.cli", "prepare", "--config", str(config))
    straight, stoker, rates = [], [], []
    for _ in range(arguments.rounds):
        tokenizer = Tokenizer.from_file(
            str(model / "tokenizer.json")
        )  # a new one: its cache of words is empty, as ours is
        start = time.process_time()
        tokens = straight_reader(model, tokenizer, shard, template, packing)
        straight.append(1e6 * (time.process_time() - start) / arguments.rows)
        with loaders(config, arguments.loaders) as addresses:
            figures = bench(config, addresses)
        stoker.append(1e3 * figures["loader_cpu_ms_per_sample"] * figures["samples"] / arguments.rows)
        rates.append(figures["samples_per_s"] * arguments.rows / figures["samples"])
    print(
        line(f"{template}{', packed' if packing else ''}", tokens / arguments.rows, straight, stoker, rates), flush=True
    )


def line(name: str, tokens: float, straight: list[float], stoker: list[float], rates: list[float]) -> str:
    """Medians and their ratio."""
    a, b = statistics.median(straight), statistics.median(stoker)
    ratios = [y / x for x, y in zip(straight, stoker, strict=True)]
    return (
        f"{name:22} {tokens:.0f} tokens | straight {a:.0f} | loader {b:.0f} CPU us/conversation = "
        f"{statistics.median(ratios):.2f}x (rounds {min(ratios):.2f}-{max(ratios):.2f}x) | "
        f"{statistics.median(rates):.0f} conversations/s"
    )


def straight_reader(model: Path, tokenizer: Tokenizer, shard: Path, template: str, packing: bool) -> int:
    """All conversations in the order of the file; the number of tokens."""
    names = json.loads((model / "tokenizer_config.json").read_text())
    end = tokenizer.token_to_id(names["eos_token"])
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string((model / "chat_template.jinja").read_text())
    total, batch = 0, []
    left = np.zeros(0, np.int32)
    with shard.open("rb") as file:
        for read in file:
            messages = orjson.loads(read)["messages"]
            if template == "stoker":
                text = "".join(
                    f" <|Assistant|> {m['content']}</s>" if m["role"] == "assistant" else f"<|User|> {m['content']}"
                    for m in messages
                )
            else:
                text = compiled.render(messages=messages, bos_token="<s>", eos_token="</s>")
            ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
            total += len(ids)
            if packing:
                left = np.concatenate((left, ids, [np.int32(end)]))
                while len(left) >= MAX_SEQ_LEN:
                    row, left = left[:MAX_SEQ_LEN], left[MAX_SEQ_LEN:]
                    batch.append(packed(row))
            else:
                batch.append(packed(ids[:MAX_SEQ_LEN]))
            if len(batch) == (8 if packing else BATCH):
                assert len(msgpack.packb(batch))
                batch = []
    return total


def packed(ids: np.ndarray) -> dict[str, Any]:
    """A row as it travels."""
    return {"ids": ids.tobytes(), "labels": np.ones(len(ids), np.uint8).tobytes()}


if __name__ == "__main__":
    main()
