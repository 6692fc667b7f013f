"""config.json of an OpenVLA: the published keys, and the shapes of the two vision towers.

    {"model_type": "openvla", "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
     "image_sizes": [224, 224], "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000},
     "pad_to_multiple_of": 64, "n_action_bins": 256, "norm_stats": {"bridge_orig": {"action": {"q01": [...], ...}}}, ...}

The published file names its towers by timm's ids and leaves their shapes to timm; here the shapes stand in `TOWERS`. A tower
that is not in the table (the small ones of tests) has its shape in the key `vision_towers`.
Source: openvla `prismatic/extern/hf/configuration_prismatic.py`, timm 0.9 `models/vision_transformer.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """Sizes of one vision transformer."""

    width: int
    """Of a token."""
    depth: int
    """Blocks in the file; the last one is never run."""
    num_heads: int
    mlp_width: int
    patch_size: int
    """Pixels of a patch's side."""
    num_registers: int = 0
    has_class_token: bool = False
    has_layer_scale: bool = False
    has_attention_pool: bool = False
    """The file holds a pooling head, which is never run."""


TOWERS: dict[str, TowerShape] = {
    "vit_large_patch14_reg4_dinov2": TowerShape(
        width=1024, depth=24, num_heads=16, mlp_width=4096, patch_size=14,
        num_registers=4, has_class_token=True, has_layer_scale=True,
    ),
    "vit_so400m_patch14_siglip_224": TowerShape(
        width=1152, depth=27, num_heads=16, mlp_width=4304, patch_size=14, has_attention_pool=True
    ),
    "vit_so400m_patch14_siglip_384": TowerShape(
        width=1152, depth=27, num_heads=16, mlp_width=4304, patch_size=14, has_attention_pool=True
    ),
}  # fmt: skip
"""timm's id without its tag -> shape."""


class OpenVLAConfig(PretrainedConfig):  # type: ignore[misc]  # transformers comes without types
    """Every key of the published config.json is an attribute; keys that this program does not use are kept."""

    model_type = "openvla"
    sub_configs = {"text_config": PretrainedConfig}  # noqa: RUF012  (transformers reads it from the class)

    def __init__(
        self,
        *,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        timm_model_ids: list[str] | None = None,
        image_sizes: list[int] | None = None,
        vision_towers: list[dict[str, Any]] | None = None,
        norm_stats: dict[str, Any] | None = None,
        n_action_bins: int = 256,
        pad_token_id: int = 32000,
        pad_to_multiple_of: int = 64,
        use_fused_vision_backbone: bool = True,
        **others: Any,
    ) -> None:
        """Raises ValueError for towers that are not two, not known, or give different numbers of patches."""
        if not isinstance(text_config, PretrainedConfig):
            values = dict(text_config or {})
            text_config = CONFIG_MAPPING[values.pop("model_type", "llama")](**values)
        self.text_config: Any = text_config
        self.timm_model_ids = timm_model_ids or ["vit_large_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224"]
        self.image_sizes = image_sizes or [224, 224]
        self.vision_towers = vision_towers
        self.norm_stats, self.n_action_bins = norm_stats, n_action_bins
        self.pad_to_multiple_of, self.use_fused_vision_backbone = pad_to_multiple_of, use_fused_vision_backbone
        super().__init__(pad_token_id=pad_token_id, **others)
        self._check()

    def tower_shapes(self) -> list[TowerShape]:
        """DINOv2's and SigLIP's. Raises ValueError for an id that is not known."""
        if self.vision_towers is not None:
            return [TowerShape(**values) for values in self.vision_towers]
        names = [name.partition(".")[0] for name in self.timm_model_ids]
        for name in names:
            if name not in TOWERS:
                raise ValueError(
                    f"timm_model_ids names {name!r}: known are {', '.join(TOWERS)}; give its shape in vision_towers"
                )
        return [TOWERS[name] for name in names]

    @property
    def num_patches(self) -> int:
        """Positions that one image takes in the language model: 256 for 224 pixels and patches of 14."""
        side = self.image_sizes[0] // self.tower_shapes()[0].patch_size
        return side * side

    def _check(self) -> None:
        shapes = self.tower_shapes()
        if not self.use_fused_vision_backbone or len(shapes) != 2 or len(self.image_sizes) != 2:
            raise ValueError(
                f"an OpenVLA of {len(shapes)} vision towers (use_fused_vision_backbone {self.use_fused_vision_backbone}): "
                "only the form with two, DINOv2 and SigLIP, is supported"
            )
        sides = [size // shape.patch_size for size, shape in zip(self.image_sizes, shapes, strict=True)]
        if self.image_sizes[0] != self.image_sizes[1] or sides[0] != sides[1]:
            raise ValueError(
                f"image_sizes {self.image_sizes} with patches of {[shape.patch_size for shape in shapes]}: both towers "
                "must see images of one size and cut them into the same number of patches"
            )


def tower_values(shape: TowerShape) -> dict[str, Any]:
    """An entry of `vision_towers`."""
    return asdict(shape)
