"""The models of `gradkernels demo`: a small character transformer and a character LSTM, fused or of plain PyTorch layers."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gradkernels.nn import GELU, LSTM, LayerNorm, Residual

LAYERS, WIDTH, HEADS, CONTEXT = 6, 128, 4, 128
LSTM_LAYERS, LSTM_WIDTH = 2, 192
WEIGHT_STD, EMBEDDING_STD = 0.08, 0.8


class PlainResidual(nn.Module):
    """x + branch(x) in plain PyTorch."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


@dataclass(frozen=True)
class Layers:
    """The kinds of layer in which the fused model and its plain twin differ; parameters and names are the same."""

    layer_norm: Callable[[int], nn.Module]
    gelu: Callable[[], nn.Module]
    residual: Callable[[nn.Module], nn.Module]
    lstm: Callable[..., nn.Module]


FUSED = Layers(LayerNorm, GELU, Residual, LSTM)
PLAIN = Layers(nn.LayerNorm, nn.GELU, PlainResidual, nn.LSTM)


class Attention(nn.Module):
    """Causal multi-head attention of the normalised input: (batch, time, WIDTH) to the same shape."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.norm = layers.layer_norm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(heads.transpose(1, 2).flatten(2))


def block(layers: Layers) -> nn.Sequential:
    """An attention branch and an MLP branch, each around a residual connection."""
    mlp = OrderedDict(
        norm=layers.layer_norm(WIDTH), up=nn.Linear(WIDTH, 4 * WIDTH), gelu=layers.gelu(), down=nn.Linear(4 * WIDTH, WIDTH)
    )
    return nn.Sequential(OrderedDict(attention=layers.residual(Attention(layers)), mlp=layers.residual(nn.Sequential(mlp))))


class CharacterTransformer(nn.Module):
    """Logits of the next character: (batch, time) of ids to (batch, time, vocabulary), time at most CONTEXT.

    Weights are normal, those that write into the residual stream smaller by sqrt(2 LAYERS) as in GPT-2. The standard
    deviations are larger than GPT-2's 0.02, with which this small stream starts so low that its gradient grows by 1.7 to 2.1
    decades toward the input: such a run learns too, and the slope rule warns about it.
    """

    DESCRIPTION = f"pre-LN character transformer, {LAYERS} layers"

    def __init__(self, vocabulary: int, layers: Layers = FUSED) -> None:
        super().__init__()
        self.character = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(block(layers) for _ in range(LAYERS)))
        self.norm = layers.layer_norm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
            elif isinstance(module, nn.Linear):
                into_stream = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=WEIGHT_STD / math.sqrt(2 * LAYERS) if into_stream else WEIGHT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        position = self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(self.character(ids) + position)))


class CharacterLSTM(nn.Module):
    """Logits of the next character: (batch, time) of ids to (batch, time, vocabulary), any time; torch's initialisation."""

    DESCRIPTION = f"character LSTM, {LSTM_LAYERS} layers of {LSTM_WIDTH} units"

    def __init__(self, vocabulary: int, layers: Layers = FUSED) -> None:
        super().__init__()
        self.character = nn.Embedding(vocabulary, WIDTH)
        self.lstm = layers.lstm(WIDTH, LSTM_WIDTH, LSTM_LAYERS, batch_first=True)
        self.head = nn.Linear(LSTM_WIDTH, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.character(ids))[0])


MODELS = {"transformer": CharacterTransformer, "lstm": CharacterLSTM}


def cross_entropy(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss in nats a character over windows of CONTEXT + 1 ids, each predicted from those before it."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def generate(model: nn.Module, start: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """`length` ids that continue the ids `start`, drawn at temperature 0.8."""
    ids = start
    for _ in range(length):
        probabilities = (model(ids[None, -CONTEXT:])[0, -1] / 0.8).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)])
    return ids[len(start) :]
