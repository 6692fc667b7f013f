"""OpenVLA's forward: two towers, a projector, and Llama, which sees the image behind the begin-of-sequence token.

    input_ids            <s>  In : What ...  Out : _              [B, T]
    what Llama sees      <s>  patch x 256  In : What ...  Out : _   [B, 256 + T]

There are two ways to say where an image is. The published one is `pixel_values`: the patches of image b are put behind the first
token of row b, and the output has 256 positions more than the input. Rows of Stoker's loaders hold the place of each patch
already, as the id IMAGE_TOKEN_ID, which no vocabulary has; with `placed_pixel_values` the patches are written there. Nothing is
looked up on the device to find out which of the two it is: that would make the host wait for it in every step.

`generate` writes the places down before it starts, so that cache, positions and masks are those of an ordinary language model,
and the image goes into the first forward only.
Source: openvla `prismatic/extern/hf/modeling_prismatic.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_outputs import CausalLMOutputWithPast

from stoker_proto.images.openvla import IMAGE_TOKEN_ID
from trainer.models.openvla import actions
from trainer.models.openvla.configuration import OpenVLAConfig
from trainer.models.openvla.vision import LayerScale, VisionTower


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP side by side."""

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        dino, siglip = config.tower_shapes()
        self.featurizer = VisionTower(dino, config.image_sizes[0])
        self.fused_featurizer = VisionTower(siglip, config.image_sizes[1])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """float[I, 6, H, H], the image as DINOv2 and then as SigLIP wants it -> float[I, N, both widths]."""
        dino, siglip = torch.split(pixels, [3, 3], dim=1)
        return torch.cat([self.featurizer(dino), self.fused_featurizer(siglip)], dim=2)


class Projector(nn.Module):
    """Features of the towers -> embeddings of the language model."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, text_width)
        self.fc3 = nn.Linear(text_width, text_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float[I, N, vision width] -> float[I, N, text width]."""
        result: torch.Tensor = self.fc3(functional.gelu(self.fc2(functional.gelu(self.fc1(features)))))
        return result


class OpenVLAForActionPrediction(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers comes without types
    """The published model. Letters: B rows, T tokens, I images, N patches of an image, H pixels of its side."""

    config_class = OpenVLAConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["LlamaDecoderLayer", "Block"]  # noqa: RUF012  (transformers reads it from the class)
    _skip_keys_device_placement = "past_key_values"

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        self.vision_backbone = VisionBackbone(config)
        width = sum(shape.width for shape in config.tower_shapes())
        self.projector = Projector(width, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        placed_pixel_values: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the language model.

        input_ids, attention_mask, position_ids, labels: int64[B, T].
        pixel_values: float[B, 6, H, H], the image of each row, put behind its first token: logits float[B, N + T, V].
        placed_pixel_values: float[I, 6, H, H], the images of all rows in order, whose places stand in input_ids as
        IMAGE_TOKEN_ID, N for each image: logits float[B, T, V].

        Raises ValueError for both of them together, and for `pixel_values` with position_ids or another number of rows.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("neither input_ids nor inputs_embeds is given")
            inputs_embeds = self._embed(input_ids, placed_pixel_values)
        if pixel_values is not None:
            if placed_pixel_values is not None or position_ids is not None or len(pixel_values) != len(inputs_embeds):
                raise ValueError(
                    f"pixel_values of {len(pixel_values)} images for {len(inputs_embeds)} rows: one image per row is "
                    "expected, and neither placed_pixel_values nor position_ids beside it"
                )
            features = self.image_features(pixel_values).to(inputs_embeds.dtype)
            inputs_embeds = _behind_first(inputs_embeds, features)
            patches = features.shape[:2]
            attention_mask = (
                None if attention_mask is None else _behind_first(attention_mask, attention_mask.new_ones(patches))
            )
            labels = None if labels is None else _behind_first(labels, labels.new_full(patches, -100))
        output: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **others,
        )
        return output

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[I, 6, H, H] -> float[I, N, text width]: what the language model sees of images."""
        features: torch.Tensor = self.projector(self.vision_backbone(pixel_values.to(self.projector.fc1.weight.dtype)))
        return features

    def _embed(self, input_ids: torch.Tensor, placed_pixel_values: torch.Tensor | None) -> torch.Tensor:
        """float[B, T, text width]: embeddings of tokens, features of images in their places."""
        is_image = input_ids == IMAGE_TOKEN_ID  # [B, T]
        embeddings: torch.Tensor = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if placed_pixel_values is None:
            return embeddings
        features = self.image_features(placed_pixel_values).to(embeddings.dtype)
        return embeddings.masked_scatter(is_image[..., None], features)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *arguments: Any,
        pixel_values: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        """As `GenerationMixin.generate`, with the image of each row; what comes back holds no places of patches.

        inputs, or input_ids: int64[B, T]; pixel_values: float[B, 6, H, H]. `max_length` counts the patches, so use
        `max_new_tokens`.
        """
        ids = others.pop("input_ids", inputs)
        if pixel_values is None or ids is None:
            return super().generate(ids, *arguments, pixel_values=pixel_values, **others)
        patches = (len(ids), self.config.num_patches)
        mask = others.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        result: Any = super().generate(
            _behind_first(ids, ids.new_full(patches, IMAGE_TOKEN_ID)),
            *arguments,
            attention_mask=_behind_first(mask, mask.new_ones(patches)),
            placed_pixel_values=pixel_values,
            **others,
        )
        if isinstance(result, torch.Tensor):
            return _without_places(result, patches[1])
        result.sequences = _without_places(result.sequences, patches[1])
        return result

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """The image goes into the first forward only. A cache may be there already then, an empty one.

        transformers reads the name `kwargs` as leave to give forward its own arguments.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            for name in ("pixel_values", "placed_pixel_values"):
                inputs.pop(name, None)
        return inputs

    def predict_action(
        self, input_ids: torch.Tensor, unnorm_key: str | None = None, **others: Any
    ) -> NDArray[np.float64]:
        """float64[D]: one action in the units of `norm_stats[unnorm_key]`; see `actions.predict`."""
        return actions.predict(self, input_ids, unnorm_key, **others)

    def freeze_unused(self) -> None:
        """Take parameters that no forward touches out of training: weight decay would shrink what gets no gradient."""
        for tower in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            for parameter in tower.unused_parameters():
                parameter.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        """Of the language model."""
        module: nn.Module = self.language_model.get_input_embeddings()
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Of the language model."""
        module: nn.Module = self.language_model.get_output_embeddings()
        return module

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Of the language model."""
        self.language_model.set_output_embeddings(value)

    def _init_weights(self, module: nn.Module) -> None:
        """For models made at random; transformers knows linear layers and norms."""
        super()._init_weights(module)
        if isinstance(module, LayerScale):
            initialization.ones_(module.scale_factor)
        for name in ("cls_token", "reg_token", "pos_embed", "latent"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                initialization.normal_(getattr(module, name), mean=0.0, std=0.02)


def _behind_first(rows: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """[B, T, ...] and [B, N, ...] -> [B, N + T, ...]: `more` behind the first token, which is the begin of the sequence."""
    return torch.cat([rows[:, :1], more, rows[:, 1:]], dim=1)


def _without_places(rows: torch.Tensor, num_patches: int) -> torch.Tensor:
    """The inverse, for token ids."""
    return torch.cat([rows[:, :1], rows[:, 1 + num_patches :]], dim=1)
