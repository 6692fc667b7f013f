"""The model without its weights: names and shapes on PyTorch's meta device, so 7 billion parameters take a second."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError
from trainer.engine.optimizer import parameter_groups
from trainer.models.families import family_of
from trainer.models.loading import choose_trained, grow_embeddings, text_width
from trainer.training.chunks import chunkable


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model's parameters."""

    trained: tuple[tuple[int, ...], ...]
    """Numbers in each trained parameter, for each group of the optimizer: DeepSpeed pads groups, not parameters, below ZeRO-3."""
    frozen: tuple[int, ...]
    """Numbers in each parameter that is not trained."""
    buffer_bytes: int
    """Bytes of what is neither trained nor saved, such as the frequencies of rotary positions."""
    width: int
    """Of the language model's hidden states."""
    vocabulary: int
    """Tokens of which the head makes logits."""
    has_linear_head: bool = True
    """Whether the logits of some labels can be made at a time (`trainer.loss.chunk_labels`)."""

    @property
    def num_trained(self) -> int:
        """Trained parameters."""
        return sum(map(sum, self.trained))

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.num_trained + sum(self.frozen)


def empty_model(config: Config, model_config: PretrainedConfig, vocab_size_needed: int = 0) -> PreTrainedModel:
    """The model that would be trained, on the meta device. Raises ConfigError."""
    dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
    try:
        with torch.device("meta"):
            model: PreTrainedModel = family_of(model_config).auto_class.from_config(
                model_config, dtype=dtype, trust_remote_code=config.model.trust_remote_code
            )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model.base_model_path is {config.model.base_model_path!r}: this model cannot be built without its weights "
            f"({first_line}), so nothing is known of its memory: --plan cannot be used with it"
        ) from error
    model.tie_weights()
    old_size = len(model.get_input_embeddings().weight)
    with torch.device("meta"):
        grow_embeddings(model, vocab_size_needed)
        if hasattr(model, "freeze_unused"):
            model.freeze_unused()
        choose_trained(model, config, grown=old_size < len(model.get_input_embeddings().weight))
    return model


def shape_of(model: PreTrainedModel, config: Config) -> ModelShape:
    """The sizes of `empty_model`'s parameters, in the optimizer's groups. Raises ConfigError."""
    trainer = config.trainer
    groups = parameter_groups(model, trainer.weight_decay, trainer.parameter_groups, trainer.lr)
    if not groups:
        raise ConfigError("model.freeze leaves no parameter to train: take a pattern out")
    head = model.get_output_embeddings()
    return ModelShape(
        trained=tuple(tuple(parameter.numel() for parameter in group["params"]) for group in groups),
        frozen=tuple(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        width=text_width(model.config),
        vocabulary=len(head.weight if head is not None else model.get_input_embeddings().weight),
        has_linear_head=chunkable(head),
    )


def parts_of(model: PreTrainedModel) -> dict[str, int]:
    """First parts of the parameters' names -> number of parameters, largest first."""
    sizes: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        sizes[".".join(name.split(".")[:2])] += parameter.numel()
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def without_adapters(config: Config) -> Config:
    """The config that trains the model's own weights."""
    return replace(config, model=replace(config.model, lora=None))
