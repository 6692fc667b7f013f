"""What our trainer costs beside a plain torch loop: the same model, the same batches, one rank, ZeRO-1 (`zero_stage: 1`).

    OMP_NUM_THREADS=1 python tests/benchmarks/trainer_overhead.py [--pairs 10] [--steps 20] [--rows 32] [--profile]

Ours is the whole loop of a run: DeepSpeed's engine, figures, progress bar, digests. All begin with the same weights and train the
same batches; the script ends with an error if their losses differ. The two plain loops are AdamW, the learning rate, clipped
gradients and the loss of each step as a number, nothing else. `plain` computes logits where there are labels, as our trainer
does; `all logits` everywhere, as most loops do. A pair is some steps of each, in turns, in one process; its figure is the median
of its steps, since other programs on the machine disturb some.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "proto")]

import torch  # noqa: E402

from stoker_proto.config import Config  # noqa: E402
from stoker_proto.processor import Processor  # noqa: E402
from tests.trainer.support.memory import MemoryFeed, make_config, make_examples, make_processor  # noqa: E402
from trainer.build import Connected, assemble  # noqa: E402
from trainer.checkpoints.save import Checkpoints  # noqa: E402
from trainer.engine.optimizer import learning_rate, parameter_groups  # noqa: E402
from trainer.engine.zero import deepspeed_settings, join_ranks  # noqa: E402
from trainer.feed.batch import IGNORED, StepBatch  # noqa: E402
from trainer.models.families import family_of, read_model_config, takes_positions  # noqa: E402
from trainer.models.loading import load_model, text_width  # noqa: E402
from trainer.models.tiny import build_tiny  # noqa: E402
from trainer.training.inputs import InputMaker  # noqa: E402
from trainer.training.source_table import SourceTable  # noqa: E402
from trainer.training.split import Split  # noqa: E402

LOOPS = ("ours", "plain", "all logits")


def main() -> None:
    """Run all pairs in one training run of ours, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10, help="interleaved; default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of each loop in a pair; default: %(default)s")
    parser.add_argument("--rows", type=int, default=32, help="of a batch; default: %(default)s")
    parser.add_argument(
        "--profile", action="store_true", help="print where our steps spend their time (the ratios are wrong then)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(Path(folder), arguments)
        processor = make_processor(config)
        batches = make_batches(config, processor)
        plain = [PlainLoop(config, processor, everywhere=everywhere) for everywhere in (False, True)]
        pairs = Pairs(batches, plain, arguments)
        ranks = join_ranks()
        total = pairs.num_steps
        split = Split(feed=pairs, num_samples=total * arguments.rows, sources=SourceTable(("memory",), (0,), (1,)))
        connected = Connected(train=split, val=None, processor=processor, fingerprints={})
        trainer = assemble(config, ranks, connected, Checkpoints(config, ranks), None)
        pairs.loss_of_ours = lambda: trainer._last["train/loss"]
        trainer.run()
        trainer.close()
        pairs.report()


def run_config(folder: Path, arguments: argparse.Namespace) -> Config:
    """A tiny LLaVA in fp32, micro-batch = global batch, no checkpoint but the last."""
    build_tiny("llava", folder / "model")
    config = make_config(
        folder / "model", folder / "output", zero_stage=1, lr=1e-4, checkpoint={"interval": 0}, export=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = dataclasses.replace(config.trainer, micro_batch_size=arguments.rows, global_batch_size=arguments.rows)
    return dataclasses.replace(config, trainer=trainer)


def make_batches(config: Config, processor: Processor) -> list[StepBatch]:
    """Eight steps of rows with images and without."""
    feed = MemoryFeed(make_examples(8 * config.trainer.micro_batch_size, seed=1), config, processor, 0, 1)
    return list(feed.steps(0, 0))


class PlainLoop:
    """The same model without our trainer."""

    def __init__(self, config: Config, processor: Processor, *, everywhere: bool) -> None:
        """everywhere: logits of all positions."""
        model_config = read_model_config(config.model.base_model_path)
        family = family_of(model_config)
        settings = deepspeed_settings(config, world_size=1, hidden_size=text_width(model_config))
        torch.manual_seed(config.trainer.seed)
        self.model = load_model(config, family, settings, processor.vocab_size_needed).train()
        self.make_inputs = InputMaker(processor, family, torch.device("cpu"), torch.float32)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.trainer.weight_decay), lr=config.trainer.lr, betas=config.trainer.betas
        )
        self.config, self.num_steps, self.everywhere = config.trainer, 0, everywhere
        self.keeps = takes_positions(self.model)
        self.losses: list[float] = []

    def step(self, batch: StepBatch) -> None:
        """One optimizer step."""
        (micro,) = batch.micro_batches
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, len(self.losses), self.num_steps)
        inputs = self.make_inputs(micro)
        if self.everywhere or not self.keeps:
            logits = self.model(**inputs.arguments, use_cache=False).logits[: inputs.num_rows, inputs.positions]
        else:
            output = self.model(**inputs.arguments, use_cache=False, logits_to_keep=inputs.positions)
            logits = output.logits[: inputs.num_rows]
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), inputs.targets.flatten(), ignore_index=IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


class Pairs:
    """Takes the feed's place: while our loop waits for its next batch, the plain loops run and clocks are read."""

    num_ready = 0

    def __init__(self, batches: Sequence[StepBatch], plain: Sequence[PlainLoop], arguments: argparse.Namespace) -> None:
        self.batches, self.plain, self.arguments = batches, plain, arguments
        self.num_steps = (1 + arguments.pairs) * arguments.steps + 1  # nobody comes back after the last one
        for loop in plain:
            loop.num_steps = self.num_steps
        self.loss_of_ours: Callable[[], float] = float
        self.losses: list[float] = []
        # (CPU ms, ms) of each step of each pair of each loop
        self.times: dict[str, list[list[tuple[float, float]]]] = {
            loop: [[] for _ in range(1 + arguments.pairs)] for loop in LOOPS
        }
        self._profile = cProfile.Profile() if arguments.profile else None

    def begin(self) -> None:
        """Nothing is to be connected."""

    def close(self) -> None:
        """Nothing is held."""

    def copy_ahead(self, copy: Callable[[Any], Any]) -> None:
        """Not on a CPU."""

    def steps(self, epoch: int, first_sample: int) -> Iterator[StepBatch]:
        """Steps of ours; between them, those of the plain loops. The first pair warms up."""
        for step in range(self.num_steps - 1):
            pair = step // self.arguments.steps
            if step % 2:
                self._plain_steps(pair, step)
            began = clocks()
            if self._profile and pair:
                self._profile.enable()
            yield self._numbered(step, epoch)
            if self._profile:
                self._profile.disable()
            self._add("ours", pair, began)
            self.losses.append(self.loss_of_ours())
            if not step % 2:
                self._plain_steps(pair, step)
        yield self._numbered(self.num_steps - 1, epoch)

    def _numbered(self, step: int, epoch: int) -> StepBatch:
        rows = self.arguments.rows
        batch = self.batches[step % len(self.batches)]
        return dataclasses.replace(
            batch,
            epoch=epoch,
            step=step,
            num_steps=self.num_steps,
            first_sample=step * rows,
            next_sample=(step + 1) * rows,
        )

    def _plain_steps(self, pair: int, step: int) -> None:
        loops = list(zip(LOOPS[1:], self.plain, strict=True))
        for name, loop in loops if step % 4 < 2 else loops[::-1]:
            began = clocks()
            loop.step(self.batches[step % len(self.batches)])
            self._add(name, pair, began)

    def _add(self, name: str, pair: int, began: tuple[float, float]) -> None:
        cpu, wall = (1e3 * (now - then) for now, then in zip(clocks(), began, strict=True))
        self.times[name][pair].append((cpu, wall))

    def report(self) -> None:
        """Print; SystemExit if the loops did not train the same."""
        for loop in self.plain:
            apart = max(abs(a - b) for a, b in zip(self.losses, loop.losses, strict=False))
            if apart > 1e-3:
                raise SystemExit(f"the losses are {apart:.2g} apart: the loops do not train the same")
        sizes = f"{self.arguments.pairs} pairs of {self.arguments.steps} steps of {self.arguments.rows} rows"
        print(f"{sizes}, load {os.getloadavg()[0]:.1f}, losses equal within {apart:.1g}")
        for clock, unit in enumerate(("CPU", "wall")):
            columns = {
                name: [statistics.median(times[clock] for times in pair) for pair in several[1:]]
                for name, several in self.times.items()
            }
            print(f"{unit:5}" + "".join(f"{name}: {shown(times)} ms per step   " for name, times in columns.items()))
            for other in LOOPS[1:]:
                ratios = [a / b for a, b in zip(columns["ours"], columns[other], strict=True)]
                print(f"      ours / {other}: {shown(ratios, 3)}")
        if self._profile:
            profile = pstats.Stats(self._profile)
            profile.sort_stats("tottime").print_stats(25)
            profile.sort_stats("cumtime").print_stats("(deepspeed/runtime|/trainer/|torch/optim|run_backward)", 45)


def clocks() -> tuple[float, float]:
    """(CPU seconds of all threads, seconds)."""
    return time.process_time(), time.perf_counter()


def shown(values: Sequence[float], digits: int = 1) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
