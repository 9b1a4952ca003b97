"""What the examples train: a small character transformer, on the documentation that Python ships with."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn

TEXT = "\n".join(topics.values())
CHARACTERS = sorted(set(TEXT))
IDS = torch.tensor([*map({character: index for index, character in enumerate(CHARACTERS)}.get, TEXT)])
LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 4, 64, 4, 64, 16


class Block(nn.Module):
    """Pre-LN attention and MLP, each around a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """The mean loss, in nats a character, over windows of CONTEXT + 1 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.character, self.position = nn.Embedding(len(CHARACTERS), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CHARACTERS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.character(ids[:, :-1]) + self.position(torch.arange(CONTEXT, device=ids.device).expand(len(ids), -1))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids[:, 1:].flatten())


def batch_of(step: int) -> torch.Tensor:
    """The whole batch of a step, (BATCH, CONTEXT + 1): the same wherever it is asked for."""
    starts = torch.randint(len(IDS) - CONTEXT, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    return IDS[starts + torch.arange(CONTEXT + 1)]
