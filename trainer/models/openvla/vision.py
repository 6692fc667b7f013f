"""A vision transformer with timm's parameter names, as far as OpenVLA's two towers need it.

    pixels [I, 3, H, W] -> patches [I, N, W'] -> blocks 0 ... L-2 -> features [I, N, W'], without prefix tokens and final norm

The weights hold more than is run: block L-1, the final norm and SigLIP's pooling head. They are carried so that what is saved
has the names of what was loaded.

DINOv2 puts [class token, registers] in front of the patches, after the patches have their position embedding; it scales each
branch (`ls1`, `ls2`). SigLIP has neither. GELU is the exact one (erf) in both, and eps of LayerNorm is 1e-6.
Source: timm 0.9.10 `models/vision_transformer.py`, `layers/attention_pool.py`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.models.openvla.configuration import TowerShape

EPS = 1e-6


class VisionTower(nn.Module):
    """One tower. Letters: I images, N patches, W width."""

    def __init__(self, shape: TowerShape, image_size: int) -> None:
        super().__init__()
        self.num_prefix = int(shape.has_class_token) + shape.num_registers
        num_patches = (image_size // shape.patch_size) ** 2
        self.patch_embed = PatchEmbedding(shape)
        if shape.has_class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        if shape.num_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, shape.num_registers, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=EPS)
        if shape.has_attention_pool:
            self.attn_pool = AttentionPool(shape)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels: float[I, 3, H, H] -> float[I, N, W]: the second-to-last block's patch tokens."""
        hidden = self.patch_embed(pixels) + self.pos_embed
        prefix = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        if prefix:
            hidden = torch.cat([*(token.expand(len(hidden), -1, -1) for token in prefix), hidden], dim=1)
        for block in self.blocks[:-1]:
            hidden = block(hidden)
        patches: torch.Tensor = hidden[:, self.num_prefix :]
        return patches

    def unused_parameters(self) -> list[nn.Parameter]:
        """Those that the file holds and `forward` never touches."""
        modules = [self.blocks[-1], self.norm, getattr(self, "attn_pool", None)]
        return [parameter for module in modules if module is not None for parameter in module.parameters()]


class PatchEmbedding(nn.Module):
    """Patches -> tokens."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, shape.width, kernel_size=shape.patch_size, stride=shape.patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """float[I, 3, H, H] -> float[I, N, W]."""
        tokens: torch.Tensor = self.proj(pixels).flatten(2).transpose(1, 2)
        return tokens


class Block(GradientCheckpointingLayer):  # type: ignore[misc]  # transformers comes without types
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=EPS)
        self.attn = Attention(shape)
        self.ls1 = LayerScale(shape.width) if shape.has_layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(shape.width, eps=EPS)
        self.mlp = Mlp(shape)
        self.ls2 = LayerScale(shape.width) if shape.has_layer_scale else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """float[I, T, W] -> the same shape."""
        hidden = hidden + self.ls1(self.attn(self.norm1(hidden)))
        result: torch.Tensor = hidden + self.ls2(self.mlp(self.norm2(hidden)))
        return result


class Attention(nn.Module):
    """Every token attends to every token of its image."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """float[I, T, W] -> the same shape."""
        images, tokens, width = hidden.shape
        qkv = self.qkv(hidden).view(images, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [I, heads, T, W / heads] each
        mixed = functional.scaled_dot_product_attention(query, key, value)
        result: torch.Tensor = self.proj(mixed.transpose(1, 2).reshape(images, tokens, width))
        return result


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.mlp_width)
        self.fc2 = nn.Linear(shape.mlp_width, shape.width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """float[..., W] -> the same shape."""
        result: torch.Tensor = self.fc2(functional.gelu(self.fc1(hidden)))
        return result


class LayerScale(nn.Module):
    """A factor per channel. timm calls it `gamma`, a name that transformers used to rewrite; hence OpenVLA's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """float[..., W] -> the same shape."""
        return hidden * self.scale_factor


class AttentionPool(nn.Module):
    """SigLIP's pooling head: names and shapes only, as OpenVLA never runs it."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.q = nn.Linear(shape.width, shape.width)
        self.kv = nn.Linear(shape.width, 2 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=EPS)
        self.mlp = Mlp(shape)
