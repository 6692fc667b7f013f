"""A language-conditioned policy of about a million parameters, for `AutoModelForImageTextToText`.

    prompt   <s><|User|> <image>x4 <image>x4 Task: push the cube, State: 12 200 128; <|Assistant|>
    prefix   4 tokens of each view, the words, the state, the estimated positions     -> transformer <- answer queries

Each view has its own convolutional tower, which ends in soft-argmax keypoints: where each feature is in the picture. The numbers
of the state are read back from their tokens. An auxiliary head estimates the positions of objects from all of these; the
estimate goes in again as a token (training may supervise it, see `auxiliary` in the output).
Position i of the answer is a learned query. It never reads the answer's earlier tokens, so one pass gives the logits of the
whole answer, and they are the same if the tokens are fed one by one.

This file imports nothing of Stoker: an export carries a copy of it, so that it loads without Stoker (trust_remote_code).

Letters: B rows, T tokens, V views, H x W pixels, S numbers of the state, A estimated numbers, Q answer positions, D width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class RobotConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of a `RobotPolicy`, and the ids by which it reads its prompt."""

    model_type = "stoker_robot"

    def __init__(
        self,
        *,
        vocab_size: int = 1344,
        hidden_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        word_size: int = 64,
        word_window: int = 0,
        image_size: int = 72,
        num_views: int = 2,
        tokens_per_view: int = 4,
        channels: tuple[int, int, int] = (32, 64, 64),
        num_keypoints: int = 64,
        state_width: int = 9,
        auxiliary_width: int = 8,
        auxiliary_scale: float = 8.0,
        num_positions: int = 2,
        answer_tokens: int = 16,
        image_token_id: int = 0,
        assistant_token_id: int = 0,
        number_ids: tuple[int, ...] = (),
        half_precision_towers: bool = True,
        **kwargs: Any,
    ) -> None:
        """auxiliary_width: A, of which the first 3 x num_positions are positions in metres; 0: no auxiliary head.

        auxiliary_scale: the head computes in units of 1 / auxiliary_scale. number_ids: the tokens of " 0", " 1", ...
        word_window: tokens that are read together before the words' mean is taken (odd); 0: each by itself. Without it the order
        of words is hardly learned, and "red on green" and "green on red" are the same words.
        half_precision_towers: convolutions compute in bfloat16. A CPU with AMX takes half of the time, one without
        instructions for it (AVX2 alone) nine times as long.
        """
        self.vocab_size, self.hidden_size, self.word_size = vocab_size, hidden_size, word_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.word_window = word_window
        self.image_size, self.num_views, self.tokens_per_view = image_size, num_views, tokens_per_view
        self.channels, self.num_keypoints = list(channels), num_keypoints
        self.state_width, self.auxiliary_width, self.auxiliary_scale = state_width, auxiliary_width, auxiliary_scale
        self.num_positions, self.answer_tokens = num_positions, answer_tokens
        self.image_token_id, self.assistant_token_id = image_token_id, assistant_token_id
        self.number_ids = list(number_ids)
        self.half_precision_towers = half_precision_towers
        self.vision_config = {
            "image_size": image_size,
            "patch_size": image_size // 2,
            "model_type": "stoker_robot_towers",
        }
        kwargs.pop("vision_config", None)
        if kwargs.pop("word_position_scale", 0.1) != 0.1:
            raise ValueError(
                "word_position_scale is gone, so this model would read its words differently: build it anew"
            )
        super().__init__(**kwargs)


@dataclass
class RobotOutput(ModelOutput):  # type: ignore[misc]  # transformers' own class is untyped
    """What one forward gives."""

    logits: Tensor | None = None
    """float[B, P, vocabulary]: position t predicts token t + 1. Zeros where no answer stands."""
    past_key_values: Any = None
    auxiliary: Tensor | None = None
    """float32[B, A]: estimated positions, in the units of the data (metres)."""


@dataclass
class AnswerCache:
    """The logits of the whole answer, from which later tokens are answered without another pass."""

    logits: Tensor
    """float[B, Q, vocabulary]."""
    position: Tensor
    """int64[B]: the next answer position of each row."""


class Tower(nn.Module):
    """Picture float[B, 3, H, W] -> float32[B, 3 K]: column and row in [-1, 1] and strength of each of K keypoints."""

    def __init__(self, config: RobotConfig) -> None:
        super().__init__()
        first, second, third = config.channels
        self.in_bfloat16 = config.half_precision_towers
        self.conv1 = nn.Conv2d(14, first, 3, 1, 1)  # 2 x 2 pixels of 3 colours, and where they are
        self.conv2 = nn.Conv2d(first, second, 3, 2, 1)
        self.conv3 = nn.Conv2d(second, third, 3, 1, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in config.channels)
        self.keypoints = nn.Conv2d(third, config.num_keypoints, 1)
        self.sharpness = nn.Parameter(torch.ones(1))

    def forward(self, pixels: Tensor) -> Tensor:
        """One feature vector for each picture."""
        cells = functional.pixel_unshuffle(pixels, 2)
        places = _grid(cells.shape[2], cells.shape[3], cells)[None].expand(len(cells), -1, -1, -1)
        x = torch.cat([cells, places], 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            for layer, norm in zip((self.conv1, self.conv2, self.conv3), self.norms, strict=True):
                x = functional.relu(norm(layer(x)))
            found = self.keypoints(x)
        maps = found.float().flatten(2) * self.sharpness.float()  # [B, K, h w]
        where = _grid(found.shape[2], found.shape[3], maps).flatten(1).T  # [h w, 2]
        middle = maps.softmax(-1) @ where  # [B, K, 2]
        return torch.cat([middle.flatten(1), (0.2 * maps.amax(-1)).tanh()], 1)


class Layers(nn.Module):
    """`nn.TransformerEncoder` copies one layer. A copy of parameters that ZeRO-3 divides is empty, so each is made by itself."""

    def __init__(self, width: int, num_heads: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(count)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """float[B, T, D] -> float[B, T, D]."""
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class RobotPolicy(PreTrainedModel):  # type: ignore[misc]
    """The policy; see the module."""

    config_class = RobotConfig
    main_input_name = "input_ids"
    _no_split_modules = ("Tower",)

    def __init__(self, config: RobotConfig) -> None:
        super().__init__(config)
        width, words = config.hidden_size, config.word_size
        features = 3 * config.num_keypoints
        self.towers = nn.ModuleList(Tower(config) for _ in range(config.num_views))
        self.views = nn.ModuleList(nn.Linear(features, config.tokens_per_view * width) for _ in range(config.num_views))
        self.words = nn.Embedding(config.vocab_size, words)
        if config.word_window:
            self.word_convolution = nn.Conv1d(words, words, config.word_window, padding=config.word_window // 2)
        self.word_layer = nn.TransformerEncoderLayer(
            words, 4, 2 * words, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.word_out = nn.Linear(words, width)
        known = config.num_views * features + config.state_width + width
        self.state = _mlp(max(1, config.state_width), width, width)
        if config.auxiliary_width:
            self.auxiliary = _mlp(known, 256, 256, config.auxiliary_width)
            self.hand = nn.Linear(max(1, config.state_width), 3)
            pairs = config.num_positions * (config.num_positions + 1) // 2
            self.estimate = _mlp(config.auxiliary_width + 3 * pairs + config.state_width, 256, width)
        num_prefix = config.num_views * config.tokens_per_view + 2 + bool(config.auxiliary_width)
        self.places = nn.Parameter(torch.zeros(1, num_prefix, width))
        self.queries = nn.Parameter(torch.zeros(1, config.answer_tokens, width))
        self.layers = Layers(width, config.num_attention_heads, config.num_hidden_layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.vocab_size)
        self.prior = nn.Parameter(torch.zeros(config.answer_tokens, config.vocab_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation is kept; it is repeated here only for modules that were made without memory."""
        if isinstance(module, RobotPolicy):
            nn.init.normal_(module.places, std=0.02)
            nn.init.normal_(module.queries, std=0.02)
            nn.init.zeros_(module.prior)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]

    def get_input_embeddings(self) -> nn.Module:
        """The words' embedding."""
        return self.words

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the words' embedding."""
        self.words = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_key_values: AnswerCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> RobotOutput:
        """input_ids: int64[B, T], padded on the right; pixel_values: float[I, 3, H, W], the views of row after row.

        logits_to_keep: int64[P], positions whose logits are wanted; n > 0: the last n; 0: all. Raises ValueError for rows that
        this model cannot read.
        """
        if past_key_values is not None:
            past_key_values.position = past_key_values.position + input_ids.shape[1]
            logits = _pick(past_key_values.logits, past_key_values.position[:, None])
            return RobotOutput(logits=logits, past_key_values=past_key_values)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_assistant = (input_ids == self.config.assistant_token_id) & mask.bool()
        has_answer = is_assistant.any(1)  # [B]
        begins = torch.where(has_answer, is_assistant.int().argmax(1), input_ids.shape[1])  # [B]
        self._check_length(mask, begins, has_answer)
        answers, auxiliary = self._answers(input_ids, mask, begins, has_answer, pixel_values)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if isinstance(logits_to_keep, Tensor):
            positions = positions[logits_to_keep]
        elif logits_to_keep:
            positions = positions[-logits_to_keep:]
        logits = _pick(answers, positions[None] - begins[:, None])
        cache = AnswerCache(answers, input_ids.shape[1] - 1 - begins) if use_cache else None
        return RobotOutput(logits=logits, past_key_values=cache, auxiliary=auxiliary)

    def _answers(
        self, ids: Tensor, mask: Tensor, begins: Tensor, has_answer: Tensor, pixels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(logits of all answer positions, float[B, Q, vocabulary]; estimate float32[B, A])."""
        before = torch.arange(ids.shape[1], device=ids.device)[None] < begins[:, None]  # [B, T]
        state, is_state = self._read_state(ids, before & mask.bool(), has_answer)
        pictures = self._place_pictures(ids, has_answer, pixels)  # [B, V, 3, H, W]
        found = [tower(pictures[:, view]) for view, tower in enumerate(self.towers)]
        found = [features.to(self.dtype) for features in found]
        text = self._read_words(ids, before & mask.bool() & ~is_state & (ids != self.config.image_token_id))
        shape = (len(ids), self.config.tokens_per_view, self.config.hidden_size)
        tokens = [layer(features).view(shape) for layer, features in zip(self.views, found, strict=True)]
        tokens += [
            text[:, None],
            self.state(state if self.config.state_width else state.new_zeros(len(ids), 1))[:, None],
        ]
        auxiliary = None
        if self.config.auxiliary_width:
            raw = self.auxiliary(torch.cat([*found, state, text], 1))
            tokens.append(self.estimate(torch.cat([raw, self._differences(raw, state), state], 1))[:, None])
            auxiliary = raw.float() / self.config.auxiliary_scale
        prefix = torch.cat(tokens, 1) + self.places
        hidden = self.layers(torch.cat([prefix, self.queries.expand(len(ids), -1, -1)], 1))[:, prefix.shape[1] :]
        return self.head(self.norm(hidden)) + self.prior[None], auxiliary

    def _differences(self, raw: Tensor, state: Tensor) -> Tensor:
        """Between the hand and each position, and between positions: float[B, 3 x pairs]."""
        hand = self.hand(state if self.config.state_width else state.new_zeros(len(state), 1))
        places = [hand, *torch.split(raw[:, : 3 * self.config.num_positions], 3, dim=1)]
        return torch.cat([second - first for i, first in enumerate(places) for second in places[i + 1 :]], 1)

    def _read_words(self, ids: Tensor, is_word: Tensor) -> Tensor:
        """float[B, D]: the mean of the words after one layer; rows without words give the mean of nothing, zero."""
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if not self.config.word_window:  # only the words, first: most of a prompt is pictures, state and padding
            order = is_word.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(is_word.sum(1).max()))]
            ids, is_word, places = (values.gather(1, order) for values in (ids, is_word, places))
        hidden = self.words(ids)
        if self.config.word_window:
            alone = hidden * is_word.to(hidden.dtype)[..., None]
            hidden = functional.gelu(self.word_convolution(alone.mT)).mT
        rates = torch.exp(torch.arange(0, hidden.shape[2], 2, device=ids.device, dtype=hidden.dtype) * -0.15)
        angles = places.to(hidden.dtype)[..., None] * rates
        hidden = hidden + 0.1 * torch.cat([angles.sin(), angles.cos()], -1)
        padding = ~is_word
        padding = padding & is_word.any(1, keepdim=True)  # a row of padding alone would have no softmax
        hidden = self.word_layer(hidden, src_key_padding_mask=padding)
        weights = is_word.to(hidden.dtype)[..., None]
        pooled: Tensor = self.word_out((hidden * weights).sum(1) / weights.sum(1).clamp(min=1))
        return pooled

    def _read_state(self, ids: Tensor, before: Tensor, has_answer: Tensor) -> tuple[Tensor, Tensor]:
        """(float[B, S] in [-1, 1], bool[B, T] of its tokens): the last S numbers before the answer."""
        width = self.config.state_width
        if not width:
            return torch.zeros(len(ids), 0, dtype=self.dtype, device=ids.device), torch.zeros_like(before)
        table = ids.new_full((self.config.vocab_size,), -1)
        table[torch.tensor(self.config.number_ids, device=ids.device)] = torch.arange(
            len(self.config.number_ids), device=ids.device
        )
        numbers = table[ids.clamp(max=self.config.vocab_size - 1)]
        is_number = (numbers >= 0) & before
        from_right = is_number.flip(1).cumsum(1).flip(1)  # 1 at the last number
        is_state = is_number & (from_right <= width)
        longer = is_number[:, :-1] & is_number[:, 1:] & (from_right[:, 1:] == width)
        if bool(((is_state.sum(1) != width) & has_answer).any()) or bool((longer.any(1) & has_answer).any()):
            raise ValueError(
                f"a prompt does not end with a state of {width} numbers, which this model takes (config.state_width): set "
                f"data.state to text, with a dataset whose state has {width} numbers, or build the model for another width"
            )
        column = torch.where(is_state, width - from_right, width)
        scale = 2.0 / len(self.config.number_ids)
        values = torch.zeros(len(ids), width + 1, dtype=torch.float32, device=ids.device)
        values = values.scatter(1, column, (numbers.float() + 0.5) * scale - 1.0)
        return values[:, :width].to(self.dtype), is_state

    def _place_pictures(self, ids: Tensor, has_answer: Tensor, pixels: Tensor | None) -> Tensor:
        """float[B, V, 3, H, W]: the pictures of each row; black where a row (of padding) has none."""
        views, size = self.config.num_views, self.config.image_size
        placed = torch.zeros(len(ids) * views, 3, size, size, dtype=self.dtype, device=ids.device)
        counts = (ids == self.config.image_token_id).sum(1) // self.config.tokens_per_view  # [B]
        if bool(((counts != views) & has_answer).any()) or int(counts.max()) > views:
            raise ValueError(
                f"rows have {sorted(set(counts[has_answer].tolist()))} images each: this model takes {views} (config.num_views); "
                "set data.options.views to as many, or build the model for another number"
            )
        if pixels is not None:
            rows = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
            firsts = (counts.cumsum(0) - counts)[rows]
            places = rows * views + torch.arange(len(rows), device=ids.device) - firsts
            placed = placed.index_copy(0, places, pixels.to(self.dtype))
        return placed.view(len(ids), views, 3, size, size)

    def _check_length(self, mask: Tensor, begins: Tensor, has_answer: Tensor) -> None:
        longest = int(torch.where(has_answer, mask.sum(1) - begins, 0).max())
        if longest > self.config.answer_tokens + 1:
            raise ValueError(
                f"an answer of {longest - 1} tokens: this model has {self.config.answer_tokens} answer positions "
                "(config.answer_tokens); build it with more, or use a shorter chunk"
            )


def _pick(answers: Tensor, positions: Tensor) -> Tensor:
    """Logits float[B, P, vocabulary] at answer positions int64[B or 1, P]; zeros outside of the answer."""
    inside = (positions >= 0) & (positions < answers.shape[1])
    index = positions.clamp(0, answers.shape[1] - 1)[..., None].expand(len(answers), -1, answers.shape[2])
    return answers.gather(1, index) * inside[..., None].to(answers.dtype)


def _grid(height: int, width: int, like: Tensor) -> Tensor:
    """float[2, height, width]: column and row in [-1, 1]."""
    rows, columns = (torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in (height, width))
    return torch.stack([columns[None].expand(height, -1), rows[:, None].expand(-1, width)])


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


AutoConfig.register(RobotConfig.model_type, RobotConfig, exist_ok=True)
AutoModelForImageTextToText.register(RobotConfig, RobotPolicy, exist_ok=True)
RobotConfig.register_for_auto_class()
RobotPolicy.register_for_auto_class("AutoModelForImageTextToText")
