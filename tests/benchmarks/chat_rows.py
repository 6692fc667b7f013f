"""CPU time of a dialogue's row against a straight `tokenizers` encode of the same text: `python tests/benchmarks/chat_rows.py`.

The row is: the text rendered and tokenised once, labels. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core, as CPU time is counted

from tokenizers import Tokenizer

from stoker_proto.processor import Processor
from stoker_proto.text.turns import Turn
from tests.proto.conftest import write_chat_folder
from tests.proto.text.chat_templates import CHATML, LLAMA_3, QWEN, plain, tagged
from tests.tiny_models import make_config

TEXT = (
    "push pull the a red green blue cube ball plate goal and then slowly place it on to with what should robot do next"
)
WORDS = TEXT.split()


def dialogue(num_turns: int, words: int, seed: int) -> list[Turn]:
    """Users and assistants by turns, all of the assistant's learned."""
    generator = random.Random(seed)

    def text() -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(words // 2, words * 3 // 2)))

    return [
        Turn(role=("user", "assistant")[i % 2], text=text(), learned=i % 2 == 1)  # type: ignore[arg-type]
        for i in range(num_turns)
    ]


def cpu_ms(work: Callable[[], object], repeats: int) -> float:
    """CPU milliseconds of one call."""
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats * 1000


def straight_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The comparison."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    templates = {
        "stoker": ("stoker", ""),
        "ChatML": ("chat_template", plain(CHATML)),
        "ChatML, generation blocks": ("chat_template", tagged(CHATML)),
        "Llama 3": ("chat_template", plain(LLAMA_3)),
        "Qwen": ("chat_template", plain(QWEN)),
    }
    print(f"{'template':28}{'turns':>6}{'tokens':>8}{'encode ms':>11}{'row ms':>9}{'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (template, source)) in enumerate(templates.items()):
            path = write_chat_folder(Path(folder) / str(number), source)
            processor = Processor.build(
                make_config(path, f"data.dialogue.template={template}", max_seq_len=1 << 20), None
            )
            tokenizer = processor._tokenizer.tokenizer
            for num_turns, words in ((2, 60), (6, 100), (12, 100), (40, 60)):
                turns = dialogue(num_turns, words, seed=num_turns)
                row = processor.encode_turns(turns)
                text = tokenizer.decode(row.input_ids.tolist(), skip_special_tokens=False)
                pairs = []
                repeats = max(3, 40_000 // len(row.input_ids))
                for _ in range(rounds):
                    straight = cpu_ms(partial(straight_ids, tokenizer, text), repeats)
                    ours = cpu_ms(partial(processor.encode_turns, turns), repeats)
                    pairs.append((straight, ours))
                straight, ours = (statistics.median(values) for values in zip(*pairs, strict=True))
                ratio = statistics.median(b / a for a, b in pairs)
                print(f"{name:28}{num_turns:6}{len(row.input_ids):8}{straight:11.3f}{ours:9.3f}{ratio:7.2f}")


if __name__ == "__main__":
    main()
