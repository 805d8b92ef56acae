# SPDX-License-Identifier: Apache-2.0
"""A small decoder-only transformer on bytes.

Pre-norm blocks, rotary positions, causal attention, one matrix for the embedding and the output head.
Independent of data, optimizers and ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # every byte is a token


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model. `width` is divisible by `heads`, and `width // heads` is even (rotary pairs)."""

    layers: int
    width: int
    heads: int
    context: int


class Decoder(nn.Module):
    """Bytes (batch, time) int64 -> logits (batch, time, 256) in the parameters' dtype; time <= config.context."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.rotary = Rotary(config)
        self._initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        cos_sin = self.rotary(tokens.shape[1])
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos_sin)
        return self.head(self.norm(x))

    def _initialise(self) -> None:
        # As GPT-2: scales outputs into the residual stream by 1 / sqrt(number of summands).
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02)


def next_byte_loss(logits: Tensor, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats a byte and fp32 of logits (batch, time, 256) against tokens (batch, time + 1)[:, 1:]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos_sin)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal multi-head self-attention over (batch, time, width)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width of a head)
        y = F.scaled_dot_product_attention(rotate(q, cos_sin), rotate(k, cos_sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    """Linear to four times the width, GELU, linear back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Rotary(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021, RoFormer, eq. 34), each (time, width of a head / 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        half = config.width // config.heads // 2
        frequency = 10_000.0 ** (-torch.arange(half) / half)
        angle = torch.arange(config.context)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, time: int) -> tuple[Tensor, Tensor]:
        return self.cos[:time], self.sin[:time]


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates each pair (x[..., i], x[..., i + half]) by the angle of its position."""
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@torch.no_grad()
def generate(model: Decoder, prompt: bytes, count: int, *, seed: int, temperature: float = 0.8) -> bytes:
    """Returns `count` bytes that continue `prompt` (not empty), sampled on the CPU so that all devices draw alike."""
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    text = list(prompt)
    for _ in range(count):
        tokens = torch.tensor([text[-model.config.context :]], device=device)
        logits = model(tokens)[0, -1].float().cpu()
        text.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
    return bytes(text[len(prompt) :])
