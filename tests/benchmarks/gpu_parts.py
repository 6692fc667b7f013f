"""The parts of `gpu.py`. Each is a function of (`Bench`) that returns figures; `{"skipped": reason}` where it cannot run here."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from stoker_proto.config import (
    ActionConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    DialogueConfig,
    ImageConfig,
    LoggerConfig,
    LoraConfig,
    ModelConfig,
    TrainerConfig,
)
from stoker_proto.processor import Processor
from stoker_proto.wire.messages import Piece
from tests.benchmarks.synthetic import write_trajectories
from tests.trainer.support.memory import MemoryFeed, make_config, make_examples, make_processor
from trainer.build import Connected, assemble, build_engine, build_stepper, build_trainer, pinned_memory
from trainer.checkpoints.save import Checkpoints
from trainer.engine.ranks import Ranks
from trainer.engine.zero import deepspeed_settings, join_ranks, wrap
from trainer.feed.batch import BatchBuilder, MicroBatch, StepBatch
from trainer.feed.buffers import reused_memory
from trainer.loop import Trainer
from trainer.models.loading import choose_trained, count_parameters
from trainer.models.recomputing import recompute_layers
from trainer.models.tiny import build_tiny
from trainer.training.flops import count_flops, peak_flops
from trainer.training.source_table import SourceTable
from trainer.training.split import Split

ROOT = Path(__file__).resolve().parents[2]
ONE_SOURCE = SourceTable(("memory",), (0,), (1,))
FAMILIES = ("causal", "llava", "openvla", "qwen3_vl")
WARM_UP = 20
"""Steps that count for nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how large."""

    folder: Path
    tiny: bool

    @property
    def steps(self) -> int:
        """Of the feed's parts."""
        return 6 if self.tiny else 300

    @property
    def warm_up(self) -> int:
        return 1 if self.tiny else WARM_UP


def same_steps(bench: Bench, precision: str) -> dict[str, Any]:
    """Losses and norms of 5 steps of each family; the labels of some micro-batches are computed in chunks."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ranks, figures = join_ranks(), {}
    for family in FAMILIES:
        model = bench.folder / f"tiny-{family}"
        if not model.exists():
            build_tiny(family, model)
        size = (64, 64) if family.startswith("qwen") else None
        data = {"image": ImageConfig(transport="pixels", size=size), "action": ActionConfig(codec="bins")}
        config = make_config(model, bench.folder / "parity", data=data, precision=precision, zero_stage=1)
        config = in_chunks(config, 16)
        processor = make_processor(config)
        engine = build_engine(config, ranks, processor, Checkpoints(config, ranks), None)
        stepper = build_stepper(engine, config, processor, ranks, ONE_SOURCE)
        feed = MemoryFeed(make_examples(40, seed=1, images=family != "causal"), config, processor, 0, 1)
        feed.copy_ahead(stepper.make_inputs.copy)
        results = [stepper.step(step.micro_batches, step.step) for step in feed.steps(0, 0)]
        figures[family] = [figure for result in results for figure in (result.loss, result.grad_norm)]
        engine.destroy()
    return {"figures": figures}


def in_chunks(config: Config, size: int) -> Config:
    """The config with labels in chunks of so many."""
    loss = dataclasses.replace(config.trainer.loss, chunk_labels=size)
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, loss=loss))


class CachedFeed:
    """One step's micro-batches again and again; with `copy_ahead`, they stay on the device."""

    num_ready = 0

    def __init__(self, batches: Sequence[MicroBatch], steps: int) -> None:
        self.batches, self.num_steps = list(batches), steps

    def begin(self) -> None:
        """Nothing is to be connected."""

    def close(self) -> None:
        """Nothing is held."""

    def copy_ahead(self, copy: Callable[[MicroBatch], Any]) -> None:
        """Now, and once."""
        for batch in self.batches:
            batch.on_device = copy(batch)

    def steps(self, epoch: int, first_sample: int) -> Iterator[StepBatch]:
        """The same each time."""
        rows = sum(batch.num_rows for batch in self.batches)
        for step in range(self.num_steps - first_sample // rows):
            first = first_sample + step * rows
            yield StepBatch(
                micro_batches=self.batches, wait_s=0.0, epoch=epoch, step=step, num_steps=self.num_steps,
                first_sample=first, next_sample=first + rows,
            )  # fmt: skip


class Recorder:
    """Takes the trackers' place and keeps each step's figures."""

    is_active = False
    """No pictures."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def log(self, figures: dict[str, float], step: int) -> None:
        """Of a step."""
        if "train/step_s" in figures:
            self.steps.append(dict(figures))

    def show(self, media: Any, step: int) -> None:
        """Nothing is shown."""

    def close(self) -> None:
        """Nothing is open."""

    def summary(self, warm_up: int) -> dict[str, float]:
        """Without the first `warm_up` steps."""
        kept = self.steps[warm_up:]
        total = sum(step["train/step_s"] for step in kept)
        means = {
            name.removeprefix("train/"): sum(s[name] * s["train/step_s"] for s in kept) / total
            for name in ("train/samples_per_s", "train/tokens_per_s", "train/mfu")
            if name in kept[0]
        }
        waited = sum(step["train/data_wait_s"] for step in kept)
        times = sorted(step["train/step_s"] for step in kept)
        return {
            **means, "steps": len(kept), "median_step_s": statistics.median(times), "mean_step_s": total / len(kept),
            "p95_step_s": times[-(-95 * len(times) // 100) - 1], "data_wait_s": waited, "data_wait_frac": waited / total,
            "loss": kept[-1]["train/loss"],
        }  # fmt: skip


def vlm_config(bench: Bench, addresses: Sequence[str] = ()) -> Config:
    """A VLM of 0.5 B (0.36 B in language layers, 0.09 B in vision), frames of 224 x 224, 32 a step; made where it is missing."""
    model, data = bench.folder / "vlm", bench.folder / "data"
    size = 64 if bench.tiny else 224
    if not model.exists():
        build_tiny("llava", model, image_size=size)
        if not bench.tiny:
            enlarge(model)
    if not data.exists():
        number, length = (4, 12) if bench.tiny else (64, 50)
        write_trajectories(data, num=number, length=length, size=size, deflated=False)
    rows = 4 if bench.tiny else 32
    return Config(
        model=ModelConfig(base_model_path=str(model), precision="bf16"),
        data=DataConfig(
            dataset_type="mani_openpi", train_data_paths=(str(data / "train.jsonl"),), max_seq_len=256,
            action=ActionConfig(codec="bins"), image=ImageConfig(transport="base64"),
            dialogue=DialogueConfig(template="stoker"), cache_dir=str(bench.folder / "cache"),
        ),
        trainer=TrainerConfig(
            micro_batch_size=rows, global_batch_size=rows, lr=1e-5, epochs=10, max_steps=bench.steps, zero_stage=1,
            eval_interval=0, export=False, output_dir=str(bench.folder / f"run-{len(addresses)}"),
            logger=LoggerConfig(tensorboard=False), checkpoint=CheckpointConfig(interval=0, resume=None),
        ),
        cluster=ClusterConfig(loader_addresses=tuple(addresses)),
    )  # fmt: skip


def enlarge(folder: Path) -> None:
    """Replace the weights of a tiny LLaVA by random ones of the size of Qwen2-0.5B with a CLIP-B tower."""
    config = transformers.AutoConfig.from_pretrained(folder)
    wide = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    for name, value in {**wide, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32_000}.items():
        setattr(config.text_config, name, value)
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    for name, value in tower.items():
        setattr(config.vision_config, name, value)
    make_weights(transformers.LlavaForConditionalGeneration, config).save_pretrained(folder)


def make_weights(kind: Any, config: Any) -> Any:
    """A random bf16 model, made on the GPU if there is one: on a CPU a 7 B takes minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def loaders(bench: Bench, count: int) -> Iterator[list[str]]:
    """Addresses of so many real `loader-serve`."""
    config = vlm_config(bench)
    file = bench.folder / "loaders.yaml"
    tree = {
        "model": {"base_model_path": config.model.base_model_path},
        "data": {
            "dataset_type": "mani_openpi", "train_data_paths": list(config.data.train_data_paths), "max_seq_len": 256,
            "action": {"codec": "bins"}, "image": {"transport": "base64"}, "dialogue": {"template": "stoker"},
            "cache_dir": config.data.cache_dir,
        },
        "trainer": {"micro_batch_size": config.trainer.micro_batch_size, "lr": 1e-5,
                    "global_batch_size": config.trainer.global_batch_size},
    }  # fmt: skip
    file.write_text(json.dumps(tree))  # JSON is YAML
    command = [sys.executable, "-m", "loader_service.cli"]
    subprocess.run([*command, "prepare", "--config", str(file)], check=True, stdout=sys.stderr)
    serve = [*command, "serve", "--config", str(file), "--bind", "tcp://127.0.0.1:*"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = [
        subprocess.Popen(serve, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(count)
    ]
    try:
        lines = [process.stdout.readline() for process in running if process.stdout]
        if not all(line.startswith("loader-serve ready") for line in lines):
            raise SystemExit(f"a loader did not start: {lines}")
        yield [line.split()[2] for line in lines]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.communicate(timeout=30)


def from_loaders(bench: Bench, count: int) -> dict[str, Any]:
    """The whole trainer on real loaders."""
    with loaders(bench, count) as addresses:
        trainer = build_trainer(vlm_config(bench, addresses))
        return run_recorded(trainer, bench)


def run_recorded(trainer: Trainer, bench: Bench) -> dict[str, Any]:
    """The figures of a run."""
    recorder = Recorder()
    trainer.trackers = recorder  # type: ignore[assignment]
    forget_peak()
    trainer.run()
    trainer.close()
    return {**recorder.summary(bench.warm_up), **memory(trainer.ranks.device)}


def cached(bench: Bench) -> dict[str, Any]:
    """The same from one batch on the device, and a profile of 3 more steps."""
    config = vlm_config(bench)
    with loaders(bench, 1) as addresses:  # one real step's batch
        source = build_trainer(dataclasses.replace(vlm_config(bench, addresses)))
        step = next(iter(source.train.feed.steps(0, 0)))
        processor, ranks = source.processor, source.ranks
        source.train.feed.close()
        source.stepper.engine.destroy()
        del source
    config = dataclasses.replace(
        config, trainer=dataclasses.replace(config.trainer, output_dir=str(bench.folder / "cached"))
    )
    trainer = assembled(config, ranks, processor, step.micro_batches, bench.steps)
    recorder = Recorder()
    trainer.trackers = recorder  # type: ignore[assignment]
    forget_peak()
    trainer.run()
    found = {**recorder.summary(bench.warm_up), **memory(ranks.device)}
    return {**found, "profile": profiled(trainer, step.micro_batches), "waits": waits(trainer, step.micro_batches)}


def assembled(config: Config, ranks: Ranks, processor: Processor, batches: Sequence[MicroBatch], steps: int) -> Trainer:
    """A trainer that gets the same batches in each of `steps` steps."""
    feed = CachedFeed(batches, steps)
    rows = sum(batch.num_rows for batch in batches)
    split = Split(feed=feed, num_samples=rows * steps, sources=ONE_SOURCE)
    checkpoints = Checkpoints(config, ranks)
    checkpoint = checkpoints.find()
    connected = Connected(train=split, val=None, processor=processor, fingerprints={})
    return assemble(config, ranks, connected, checkpoints, checkpoint)


def profiled(trainer: Trainer, batches: Sequence[MicroBatch]) -> list[dict[str, Any]]:
    """The 15 operators that take longest, over 3 steps."""
    on_gpu = trainer.ranks.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as found:
        for number in range(3):
            trainer.stepper.step(batches, 100_000 + number)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -float(getattr(row, key)))
    return [{"name": row.key, "calls": row.count, "self_ms": float(getattr(row, key)) / 1e3} for row in rows[:15]]


def waits(trainer: Trainer, batches: Sequence[MicroBatch]) -> dict[str, int]:
    """Where the host waits for the GPU in the middle of a step: file and line -> times. Nothing on a CPU."""
    if trainer.ranks.device.type != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        begun = trainer.stepper.begin(batches, 200_000)
        torch.cuda.set_sync_debug_mode("default")
    begun.result()
    return dict(Counter(f"{Path(one.filename).name}:{one.lineno}" for one in caught))


def text_config(bench: Bench, name: str, length: int, **keys: Any) -> Config:
    """Of rows of tokens, `length` long, with the tokenizer of the tiny text model."""
    model = bench.folder / "tiny-causal"
    if not model.exists():
        build_tiny("causal", model)
    model_keys = {key: keys.pop(key) for key in ("lora", "gradient_checkpointing") if key in keys}
    rows = keys.pop("rows")
    return Config(
        model=ModelConfig(base_model_path=str(keys.pop("model", model)), precision="bf16", **model_keys),
        data=DataConfig(
            dataset_type="chat", train_data_paths=("memory",), max_seq_len=length, dialogue=DialogueConfig(template="stoker")
        ),
        trainer=TrainerConfig(
            micro_batch_size=rows, global_batch_size=rows, lr=1e-5, eval_interval=0, output_dir=str(bench.folder / name),
            logger=LoggerConfig(tensorboard=False), **keys,
        ),
    )  # fmt: skip


def text_batch(processor: Processor, rows: int, length: int) -> MicroBatch:
    """Rows of random tokens, all of them labels."""
    ids = np.random.default_rng(0).integers(10, 1000, rows * length).astype(np.int32)
    piece = Piece(
        ticket=0, loader="", keys=np.zeros((rows, 3), np.int64), lengths=np.full(rows, length, np.int32), input_ids=ids,
        supervised=np.ones(len(ids), np.uint8), image_counts=np.zeros(rows, np.uint8), images=[],
        actions=np.zeros((rows, 0, 0), np.float32),
    )  # fmt: skip
    allocate = pinned_memory if torch.cuda.is_available() else reused_memory
    return BatchBuilder(decoder=processor, num_rows=rows, max_tokens=length, allocate=allocate)([piece])


def llama(bench: Bench, billions: float) -> Any:
    """The config of a text model: 7 (Llama's shape), 3 or 1.35; tiny where the run is."""
    shapes = {7: (4096, 11008, 32, 32), 3: (2560, 6912, 32, 20), 1.35: (2048, 5504, 24, 16)}
    width, inner, layers, heads = (64, 128, 2, 4) if bench.tiny else shapes[billions]
    return transformers.LlamaConfig(
        vocab_size=2048 if bench.tiny else 32_000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def in_memory(bench: Bench, name: str, **keys: Any) -> dict[str, Any]:
    """Steps of a 7 B shape that never was a file: tokens/s, MFU, peak memory."""
    rows, length = (2, 64) if bench.tiny else (4, 2048)
    config = text_config(
        bench, name, length, rows=rows, gradient_checkpointing=True, zero_stage=keys.pop("stage"), **keys
    )
    ranks, processor = join_ranks(), Processor.build(text_config(bench, name, length, rows=rows), None)
    forget_peak()
    model = make_weights(transformers.LlamaForCausalLM, llama(bench, 7))
    choose_trained(model, config, grown=False)
    recompute_layers(model)
    flops = count_flops(model, model.config)
    figures = {"parameters": count_parameters(model), "trained": count_parameters(model, trained=True)}
    engine = wrap(model, config, deepspeed_settings(config, world_size=1, hidden_size=model.config.hidden_size))
    stepper = build_stepper(engine, config, processor, ranks, ONE_SOURCE)
    batch = text_batch(processor, rows, length)
    batch.on_device = stepper.make_inputs.copy(batch)
    times, losses = [], []
    for number in range(3 if bench.tiny else 8):
        began = time.monotonic()
        losses.append(stepper.step([batch], number).loss)
        times.append(time.monotonic() - began)
    step_s = statistics.median(times[1 if bench.tiny else 3 :])
    peak = peak_flops(ranks.device)
    mfu = None if peak is None else flops(rows * length, batch.num_supervised, 0) / (step_s * peak)
    return {
        **figures, "rows": rows, "length": length, "median_step_s": step_s, "tokens_per_s": rows * length / step_s, "mfu": mfu,
        "losses": losses, **memory(ranks.device),
    }  # fmt: skip


def lora_7b(bench: Bench) -> dict[str, Any]:
    """LoRA on a 7 B shape."""
    if importlib.util.find_spec("peft") is None:
        return {"skipped": "the package peft is not installed"}
    return in_memory(bench, "lora", stage=1, lora=LoraConfig(rank=16, alpha=32.0))


def full_7b(bench: Bench) -> dict[str, Any]:
    """All weights of a 7 B shape, about 121 GB without activations."""
    try:
        return in_memory(bench, "full", stage=3)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).partition("\n")[0], **memory(torch.device("cuda", 0))}


def zero3(bench: Bench) -> dict[str, Any]:
    """A folder -> ZeRO-3 -> steps -> checkpoint -> resume -> steps -> export that loads."""
    rows, length, steps = (2, 64, 3) if bench.tiny else (4, 2048, 12)
    model = bench.folder / "large"
    plain = text_config(bench, "zero3", length, rows=rows)
    if not model.exists():
        shape = llama(bench, 1.35)
        build_tiny("causal", model)  # its tokenizer
        weights = make_weights(transformers.LlamaForCausalLM, shape)
        weights.save_pretrained(model)
        del weights
    keys = {"model": model, "zero_stage": 3, "gradient_checkpointing": True, "rows": rows}
    ranks, processor, found = join_ranks(), Processor.build(plain, None), dict[str, Any]()
    for part, last in (("first", steps), ("resumed", 2 * steps)):
        checkpoint = CheckpointConfig(interval=0, keep=1)
        config = text_config(
            bench, "zero3", length, max_steps=last, checkpoint=checkpoint, export=part == "resumed", **keys
        )
        forget_peak()
        trainer = assembled(config, ranks, processor, [text_batch(processor, rows, length)], 2 * steps)
        recorder, began = Recorder(), time.monotonic()
        trainer.trackers = recorder  # type: ignore[assignment]
        trainer.run()
        whole = time.monotonic() - began
        summary = recorder.summary(1 if bench.tiny else 4)
        saving = whole - sum(step["train/step_s"] for step in recorder.steps)
        found[part] = {**summary, "first_step": last - len(recorder.steps), "saving_s": saving, **memory(ranks.device)}
        trainer.stepper.engine.destroy()
        del trainer
    export = bench.folder / "zero3" / "export"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16)
    found["export_parameters"] = count_parameters(loaded)
    return found


def forget_peak() -> None:
    """Count the peak of memory from now on."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(device: torch.device) -> dict[str, Any]:
    """Peak of the GPU's memory, in GB, and its name."""
    if device.type != "cuda":
        return {"device": "cpu"}
    name = torch.cuda.get_device_name(device)
    return {"device": name, "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "cpu-fp32": lambda bench: same_steps(bench, "fp32"),
    "fp32": lambda bench: same_steps(bench, "fp32"),
    "bf16": lambda bench: same_steps(bench, "bf16"),
    "cached": cached,
    "loaders-1": lambda bench: from_loaders(bench, 1),
    "loaders-2": lambda bench: from_loaders(bench, 2),
    "lora-7b": lora_7b,
    "zero3": zero3,
    "full-7b": full_7b,
}


def main() -> None:
    """Run one part and write its figures."""
    parser = argparse.ArgumentParser(description="one part of gpu.py, which starts it")
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny and arguments.part != "cpu-fp32":
        found: dict[str, Any] = {"skipped": "there is no GPU"}
    else:
        found = PARTS[arguments.part](Bench(folder=arguments.folder, tiny=arguments.tiny))
    arguments.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
