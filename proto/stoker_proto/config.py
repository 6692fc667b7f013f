"""The one YAML that loaders and trainers read: its keys, their meaning, their defaults, their rules.

    cluster: {num_nodes: 1, component_placement: {trainer: 0-1, dataloader: 0-1}}
    model: {base_model_path: models/tiny-llava, gradient_checkpointing: true}
    data: {dataset_type: mani_openpi, train_data_paths: [demos/train.jsonl], val_data_paths: [demos/val.jsonl], max_seq_len: 512}
    trainer: {micro_batch_size: 4, global_batch_size: 16, lr: 2e-5, epochs: 3, eval_interval: 100, logger: {wandb: false}}

How text becomes these dataclasses (strictly) is in `config_reader.py`. `Config.check` holds the rules between keys.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from stoker_proto.errors import ConfigError
from stoker_proto.placement import Placement
from stoker_proto.remote import RemoteConfig
from stoker_proto.security import SecurityConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Which machines and accelerator slots do what."""

    num_nodes: int = 1
    """Machines that take part."""
    component_placement: Placement = field(default_factory=Placement)
    """`{trainer: 0-3, dataloader: 4-7}`: accelerator slots over the cluster in node order. One trainer rank per `trainer`
    slot, one loader per `dataloader` slot; a CPU loader takes only the count, so the two may overlap."""
    loader_addresses: tuple[str, ...] = ("tcp://127.0.0.1:5555",)
    """Where trainer ranks find the loaders (ZeroMQ addresses). `deploy/launch.py` fills this in."""
    security: SecurityConfig = field(default_factory=SecurityConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is trained."""

    base_model_path: str
    """Folder of a model that transformers' Auto classes load; its `tokenizer.json` is read by the loaders too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the forward and backward pass."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along. Leave it off unless you have read that code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """How a camera frame becomes the model's pixels."""

    transport: Literal["base64", "jpeg", "pixels"] = "base64"
    """What travels: Base64 text of a JPEG, the JPEG's bytes, or raw uint8 pixels (lossless, about ten times the bytes)."""
    quality: int = 95
    """JPEG quality, 1-100; chroma is stored at half resolution (4:2:0)."""
    depth: bool = False
    """Add the depth frame as a second image (see `stoker_proto.images.depth_to_rgb`)."""
    depth_max_mm: int = 2000
    """Depth in mm that maps to white; what is farther is clipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images, the same for a given (seed, epoch, sample); never applied to validation."""

    enabled: bool = False
    """Switch them on."""
    crop_area: float = 0.9
    """Share of the image's area that a random crop keeps (OpenVLA: 0.9); 1 turns cropping off."""
    brightness: float = 0.2
    """Largest relative change of brightness."""
    contrast: float = 0.2
    """Largest relative change of contrast."""
    saturation: float = 0.2
    """Largest relative change of saturation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionConfig:
    """How actions become tokens and tokens become actions."""

    codec: Literal["vq", "bins", "fast"] = "vq"
    """`vq`: k-means codebook with residual levels, fitted by `loader-prepare`; `bins`: OpenVLA's 256 uniform bins; `fast`: cosine
    transform of the whole chunk and byte-pair encoding, a variable number of tokens, fewest for chunks of 5 and more."""
    chunk: int = 1
    """Consecutive actions predicted at each timestep; the last ones of a trajectory repeat its final action."""
    vocabulary: Literal["reuse_last", "added"] = "reuse_last"
    """`reuse_last`: actions take the last ids of the tokenizer's vocabulary, as OpenVLA does; `added`: new tokens."""
    codec_path: str | None = None
    """Take this fitted codec (`loader-prepare --codec-out FILE`) and do not fit: needed where loaders hold different data."""
    codec_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the codec's fit: `{codebook_size: 256, levels: 4}` (vq), `{num_bins: 256}` (bins), `{vocab_size: 1024, scale: 10,
    min_frequency: 2}` (fast)."""
    statistics_path: str | None = None
    """Normalise by the statistics in this file (LeRobot's `meta/stats.json`, OpenVLA's `dataset_statistics.json`) instead of by
    those of the train data."""
    unmasked: tuple[int, ...] = (6,)
    """Dimensions that are not normalised by their quantiles (7-DoF: the gripper, as OpenVLA does)."""
    drop_noops: bool = False
    """Leave out timesteps whose action moves nothing (|dxyz| <= 0.01 and |drot| <= 0.06) and keeps the gripper's state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueConfig:
    """How a sample is written down."""

    template: Literal["stoker", "openvla", "chat_template", "custom"] = "stoker"
    """`stoker`: `<|User|> {image} {instruction} <|Assistant|> {answer}`; `openvla`: `In: What action ...? Out: {answer}`;
    `chat_template`: the model's own; `custom`: the keys below. Dialogues of several turns need `stoker` or `chat_template`."""
    user: str | None = None
    """With `custom`: text before the answer; `{image}`, `{instruction}` and `{state}` are filled in."""
    end: str | None = None
    """Token that ends the answer and is trained; default: the tokenizer's end-of-sequence token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """The epoch's order: a pure function of (manifest, these values, epoch). Changing one makes another order."""

    seed: int = 0
    """Of the permutations and of the augmentation."""
    lanes: int = 32
    """Fixed streams of records per entry of the data paths; more lanes mix better and spread over more loaders."""
    window_records: int = 8
    """Consecutive records of a lane whose samples are shuffled among themselves; they are decoded once, together."""
    cell: int = 8
    """Consecutive rows of one lane before the next lane has its turn."""
    window_rows: int = 128
    """With `data.packing` or `data.group_by_length`: about so many rows are packed, or sorted by length, together, and then
    shuffled among themselves. It takes the place of `window_records`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One of `data.sources`: a dataset, and how much of the mixture it is."""

    dataset_type: str
    """As `data.dataset_type`."""
    paths: tuple[str, ...]
    """As `data.train_data_paths`."""
    val_paths: tuple[str, ...] = ()
    """As `data.val_data_paths`."""
    weight: float | None = None
    """Its part of the mixture, against the weights of the others; all sources have one, or none has."""
    name: str | None = None
    """What its loss is called in the logs; default: its dataset_type, numbered where two have the same."""
    options: dict[str, Any] = field(default_factory=dict)
    """As `data.options`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes rows."""

    dataset_type: str = ""
    """`mani_openpi`, `chat`, `code`, `text`, or `package.module:Class`: a subclass of
    `loader_service.sources.base.BaseSFTDataset`."""
    train_data_paths: tuple[str, ...] = ()
    """Files, folders or globs, here or behind URLs (`s3://bucket/demos/*.jsonl`, extra `stoker[remote]`). Each entry is a
    placement group: a loader holds all of it or nothing of it."""
    val_data_paths: tuple[str, ...] = ()
    """The same, for validation."""
    sources: tuple[SourceConfig, ...] = ()
    """Several datasets in one run, instead of the three keys above and `options`. Without weights every sample of every source
    is trained once per epoch; with weights an epoch is one pass over the source that lasts longest, and the others repeat,
    each pass in a new order."""
    weigh_by: Literal["samples", "tokens"] = "samples"
    """What the weights of `sources` are shares of: rows, or their tokens (of the rows' mean length, source by source)."""
    max_seq_len: int
    """Tokens per row at most, images counted. A row with one answer is never cut: one that cannot fit is an error. Plain text
    is cut into as many rows as it needs."""
    overlong: Literal["error", "truncate", "drop_turns"] = "error"
    """Dialogues of several turns that need more than max_seq_len tokens: `error`: bad samples; `truncate`: cut at the end;
    `drop_turns`: without their oldest exchanges. What would have no label left, or lose an image, is a bad sample even so."""
    packing: bool = False
    """Several samples per row up to max_seq_len, no attention across them; of text whose tokens are counted, not of actions."""
    group_by_length: bool = False
    """Without packing: rows of one cell (`data.order.cell`) are of similar length, so that less of a batch is padding."""
    state: Literal["none", "text"] = "none"
    """`text`: the robot's state (joints, gripper) is told with the instruction, each number as one of 256 bins between its 1st
    and 99th percentile: `Task: push the cube, State: 12 200 128;`; with `custom` it stands where `{state}` does."""
    state_path: str | None = None
    """Take this scale of the states (`loader-prepare --state-out FILE`): needed where loaders hold different data."""
    data_root: str | None = None
    """Nothing outside this folder is read; default: the folder of the shard that names the file. A URL rules data behind URLs, a
    folder data that lies here."""
    cache_dir: str | None = None
    """Where manifests are kept; default: a `.stoker` folder beside the data. Copies of remote files lie in its `remote` folder;
    default: `~/.cache/stoker`."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    task_table: str | None = None
    """YAML file `task id: instruction`, added to (and before) the built-in table."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """`fail`: a bad sample ends the run with its name; `skip`: it keeps its place as a row without labels, and is counted."""
    bad_sample_budget: int = 1000
    """With `skip`: more bad samples than this in a run end it all the same."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the dataset as it stands; the dataset says what it takes."""
    image: ImageConfig = field(default_factory=ImageConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    action: ActionConfig = field(default_factory=ActionConfig)
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)
    order: OrderConfig = field(default_factory=OrderConfig)

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """`sources`, or the one that the short form names."""
        if self.sources:
            return self.sources
        return (
            SourceConfig(
                dataset_type=self.dataset_type,
                paths=self.train_data_paths,
                val_paths=self.val_data_paths,
                options=self.options,
            ),
        )

    def paths(self, split: str) -> tuple[str, ...]:
        """The entries of a split, source after source: entries are numbered by their place here."""
        return tuple(path for source in self.all_sources() for path in _paths_of(source, split))

    def entry_sources(self, split: str) -> tuple[int, ...]:
        """For each entry of a split the number of its source."""
        return tuple(n for n, source in enumerate(self.all_sources()) for _ in _paths_of(source, split))

    def of_source(self, number: int) -> DataConfig:
        """The same settings for one source alone, in the short form."""
        source = self.all_sources()[number]
        return dataclasses.replace(
            self,
            dataset_type=source.dataset_type,
            train_data_paths=source.paths,
            val_data_paths=source.val_paths,
            options=source.options,
            sources=(),
        )

    def path_key(self, split: str, entry: int) -> str:
        """The key of the file that names an entry, for messages."""
        if not self.sources:
            return f"data.{split}_data_paths[{entry}]"
        source = self.entry_sources(split)[entry]
        first = self.entry_sources(split).index(source)
        return f"data.sources[{source}].{'paths' if split == 'train' else 'val_paths'}[{entry - first}]"

    def source_names(self) -> tuple[str, ...]:
        """What each source is called, each name once."""
        names = [source.name or source.dataset_type.rpartition(":")[2] for source in self.all_sources()]
        return tuple(
            name if source.name or names.count(name) == 1 else f"{name}_{number}"
            for number, (name, source) in enumerate(zip(names, self.all_sources(), strict=True))
        )

    def check_sources(self) -> None:
        """Rules between the short form, `sources` and weights. Raises ConfigError."""
        if self.sources:
            short = {
                "dataset_type": self.dataset_type,
                "train_data_paths": self.train_data_paths,
                "val_data_paths": self.val_data_paths,
                "options": self.options,
            }
            for key, value in short.items():
                if value:
                    raise ConfigError(
                        f"data.{key} stands beside data.sources: move it into the source that it belongs to"
                    )
        elif not self.dataset_type:
            raise ConfigError("data.dataset_type is missing: name one, or list several under data.sources")
        for number, source in enumerate(self.all_sources()):
            prefix = f"data.sources[{number}]." if self.sources else "data."
            if not source.paths:
                key = "paths" if self.sources else "train_data_paths"
                raise ConfigError(f"{prefix}{key} is empty: name at least one file, folder or glob")
            if source.weight is not None and not source.weight > 0:
                raise ConfigError(
                    f"{prefix}weight is {source.weight}: it must be above 0; leave out a source not wanted"
                )
        without = [number for number, source in enumerate(self.sources) if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ConfigError(f"data.sources[{without[0]}].weight is missing: give every source a weight, or none")
        names = self.source_names()
        for number, name in enumerate(names):
            if names.index(name) != number:
                raise ConfigError(f"data.sources[{number}].name is {name!r}, as that of another: give each its own")


def _paths_of(source: SourceConfig, split: str) -> tuple[str, ...]:
    return source.paths if split == "train" else source.val_paths


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """How a loader uses its host. Nothing here changes what is in a batch."""

    cores: int = 0
    """Cores to use; 0: all that the process may use, which `deploy/launch.py` shares among a node's loaders."""
    workers: int = 0
    """Processes that build pieces; 0: one per four cores. With one, its threads live in the loader's own process."""
    threads: int = 0
    """Threads in each of them; decoding releases the interpreter lock. 0: the cores, shared among the workers."""
    cache_mb: int = 1024
    """Encoded frames kept in memory over all workers, in MiB."""
    unread_mb: int = 1024
    """Answers that ranks asked for and do not read, over all ranks, in MiB; one rank may leave a quarter of it."""
    read_ahead: bool = True
    """Decode a lane's next records before they are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerConfig:
    """Where figures go."""

    tensorboard: bool = True
    """Write TensorBoard event files to `{output_dir}/tensorboard`."""
    wandb: bool = False
    """Log the same to Weights & Biases (extra `stoker[wandb]`; WANDB_MODE=offline works)."""
    wandb_project: str = "stoker"
    """Project name there."""
    log_interval: int = 1
    """Steps between two lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedConfig:
    """How a rank pulls its micro-batches."""

    prefetch: int = 8
    """Micro-batches asked for ahead of the one that trains: the credit window."""
    ticket_deadline_s: float = 10.0
    """A piece not here after this time is asked from another loader; sooner, down to 1 s, once the loaders' latency is known."""
    hedge_share: float = 0.05
    """Of the tickets, how many may be asked of a second loader because the first is unusually slow; 0: none."""
    hedge_multiple: float = 3.0
    """Unusually slow: so many times the latency to be expected, and 0.2 s at least."""
    takeover_ratio: float = 3.0
    """An idle loader so many times faster takes lanes over from an overloaded one, for a time; 0: never."""
    backoff_s: float = 60.0
    """A loader that comes and goes is home to no lanes for up to this time after it came back; 0: for none."""
    data_deadline_s: float = 120.0
    """A rank without data for this long ends with a message and a non-zero exit."""
    connect_deadline_s: float = 60.0
    """Loaders that together hold all the data must have answered after this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What is kept for a resume."""

    interval: int = 500
    """Optimizer steps between two checkpoints; one is always written at the end. 0: only at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    resume: str | None = "auto"
    """`auto`: the newest in `output_dir`, if there is one; a checkpoint folder; or null to start anew."""
    universal: bool = False
    """Resume on another number of ranks, through DeepSpeed's universal checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """How it is trained."""

    micro_batch_size: int
    """Rows of one forward on one rank."""
    global_batch_size: int
    """Rows of one optimizer step over all ranks: micro_batch_size x ranks x accumulation."""
    lr: float
    """Peak learning rate of AdamW."""
    epochs: int = 1
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, if that is before the last epoch's end."""
    eval_interval: int = 500
    """Optimizer steps between two validations; one is always made at the end. 0: never."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine down to `min_lr_ratio` of lr at the last step, or constant."""
    warmup_ratio: float = 0.03
    """Share of all steps during which the rate rises linearly from 0."""
    min_lr_ratio: float = 0.0
    """Where the cosine ends, as a share of lr."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only (not on biases and norms)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    grad_clip: float = 1.0
    """Largest gradient norm over all parameters; 0: no clipping."""
    max_skipped_steps: int = 20
    """Steps in a row with a non-finite gradient norm (skipped, counted) after which the run ends."""
    seed: int = 0
    """Of dropout and of newly made weights."""
    output_dir: str = "outputs"
    """Checkpoints, logs and the exported model."""
    export: bool = True
    """Write a model that transformers loads to `{output_dir}/export` at the end."""
    zero_stage: Literal[1, 2, 3] = 3
    """DeepSpeed ZeRO stage."""
    offload: bool = False
    """Keep optimizer states in host memory: 2.7-4 times slower, for models that do not fit otherwise."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    feed: FeedConfig = field(default_factory=FeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: ModelConfig
    data: DataConfig
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    trainer: TrainerConfig

    def check(self) -> None:
        """Rules between keys. Raises ConfigError with the values, the rule and the way out."""
        self._check_ranges()
        self.cluster.security.check()
        world_size = len(self.cluster.component_placement.trainer)
        if world_size:
            check_batch_arithmetic(self.trainer.global_batch_size, self.trainer.micro_batch_size, world_size)
        dialogue = self.data.dialogue
        if (dialogue.template == "custom") != (dialogue.user is not None):
            raise ConfigError(
                f"data.dialogue.user is {dialogue.user!r} and data.dialogue.template is {dialogue.template!r}: "
                "`user` goes with `template: custom` and only with it"
            )
        if self.data.packing and self.data.group_by_length:
            raise ConfigError(
                "data.packing and data.group_by_length are both true: packed rows are all about max_seq_len tokens long, take one"
            )
        self._check_state()

    def _check_state(self) -> None:
        state, dialogue = self.data.state, self.data.dialogue
        if state == "text" and dialogue.template == "openvla":
            raise ConfigError(
                "data.state is text and data.dialogue.template is openvla, which has no place for it: use stoker, "
                "chat_template, or custom with {state}"
            )
        if dialogue.user is not None and ("{state}" in dialogue.user) != (state == "text"):
            raise ConfigError(
                f"data.state is {state} and data.dialogue.user is {dialogue.user!r}: {{state}} stands in it with "
                "data.state=text, and only then"
            )

    def _check_ranges(self) -> None:
        data, trainer = self.data, self.trainer
        at_least_one = {
            "cluster.num_nodes": self.cluster.num_nodes,
            "data.max_seq_len": data.max_seq_len,
            "data.action.chunk": data.action.chunk,
            "data.order.lanes": data.order.lanes,
            "data.order.window_records": data.order.window_records,
            "data.order.cell": data.order.cell,
            "data.order.window_rows": data.order.window_rows,
            "data.image.depth_max_mm": data.image.depth_max_mm,
            "loader.cache_mb": self.loader.cache_mb,
            "loader.unread_mb": self.loader.unread_mb,
            "trainer.micro_batch_size": trainer.micro_batch_size,
            "trainer.global_batch_size": trainer.global_batch_size,
            "trainer.epochs": trainer.epochs,
            "trainer.feed.prefetch": trainer.feed.prefetch,
            "trainer.checkpoint.keep": trainer.checkpoint.keep,
            "trainer.logger.log_interval": trainer.logger.log_interval,
        }
        for key, value in at_least_one.items():
            if value < 1:
                raise ConfigError(f"{key} is {value}: it must be at least 1")
        not_negative = {
            "data.order.seed": data.order.seed,
            "data.bad_sample_budget": data.bad_sample_budget,
            "loader.cores": self.loader.cores,
            "loader.workers": self.loader.workers,
            "loader.threads": self.loader.threads,
            "trainer.eval_interval": trainer.eval_interval,
            "trainer.feed.backoff_s": trainer.feed.backoff_s,
            "trainer.checkpoint.interval": trainer.checkpoint.interval,
            "trainer.grad_clip": trainer.grad_clip,
            "trainer.weight_decay": trainer.weight_decay,
            "trainer.max_skipped_steps": trainer.max_skipped_steps,
        }
        for key, number in not_negative.items():
            if number < 0:
                raise ConfigError(f"{key} is {number}: it must not be negative")
        shares = {
            "data.augment.brightness": data.augment.brightness,
            "data.augment.contrast": data.augment.contrast,
            "data.augment.saturation": data.augment.saturation,
            "trainer.feed.hedge_share": trainer.feed.hedge_share,
            "trainer.warmup_ratio": trainer.warmup_ratio,
            "trainer.min_lr_ratio": trainer.min_lr_ratio,
        }
        for key, share in shares.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"{key} is {share}: it must lie in [0, 1]")
        above_zero = {
            "trainer.lr": trainer.lr,
            "data.augment.crop_area": data.augment.crop_area,
            "trainer.feed.ticket_deadline_s": trainer.feed.ticket_deadline_s,
            "trainer.feed.data_deadline_s": trainer.feed.data_deadline_s,
            "trainer.feed.connect_deadline_s": trainer.feed.connect_deadline_s,
        }
        for key, positive in above_zero.items():
            if not positive > 0:
                raise ConfigError(f"{key} is {positive}: it must be above 0")
        feed = trainer.feed
        if not feed.hedge_multiple >= 1:
            raise ConfigError(f"trainer.feed.hedge_multiple is {feed.hedge_multiple}: it must be at least 1")
        if not (feed.takeover_ratio == 0 or feed.takeover_ratio > 1):
            raise ConfigError(
                f"trainer.feed.takeover_ratio is {feed.takeover_ratio}: it must be above 1, or 0 for no takeover"
            )
        if data.augment.crop_area > 1:
            raise ConfigError(f"data.augment.crop_area is {data.augment.crop_area}: a share of the image, at most 1")
        if not 1 <= data.image.quality <= 100:
            raise ConfigError(f"data.image.quality is {data.image.quality}: JPEG quality lies in 1-100")
        data.check_sources()
        data.remote.check()
        if trainer.max_steps is not None and trainer.max_steps < 1:
            raise ConfigError(f"trainer.max_steps is {trainer.max_steps}: at least 1, or null for all epochs")


def check_batch_arithmetic(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches that a rank accumulates per step; ConfigError where the global batch does not divide.

    >>> check_batch_arithmetic(64, 4, 8)
    2
    """
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass == 0:
        return global_batch_size // per_pass
    below, above = global_batch_size // per_pass * per_pass, -(-global_batch_size // per_pass) * per_pass
    nearest = " or ".join(str(size) for size in (below, above) if size)
    raise ConfigError(
        f"trainer.global_batch_size is {global_batch_size}, but micro_batch_size {micro_batch_size} x {world_size} trainer "
        f"ranks = {per_pass} rows a pass: the global batch must be a multiple of that, e.g. {nearest}"
    )
