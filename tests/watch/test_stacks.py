"""Depth is a graph: healthy models of many shapes stay silent; what is wrong is found in the right stack and place."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from watched import trained

from gradkernels.diagnose import Severity

IDS = torch.arange(48).reshape(4, 12) * 7 % 50


def alarms(watch):
    return [finding for finding in watch.diagnose() if finding.severity > Severity.NOTE]


def language(y, ids=IDS):
    return F.cross_entropy(y.flatten(0, 1), ids.flatten())


class Block(nn.Module):
    def __init__(self, width=32, post=False):
        super().__init__()
        self.norm1, self.norm2, self.post = nn.LayerNorm(width), nn.LayerNorm(width), post
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        if self.post:
            x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
            return self.norm2(x + self.mlp(x))
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """skip: the share of layers left out at random; aux: the layer behind which there is a second head."""

    def __init__(self, depth=6, skip=0.0, aux=None):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(50, 32), nn.ModuleList(Block() for _ in range(depth))
        self.head, self.aux_head, self.skip, self.aux = nn.Linear(32, 50), nn.Linear(32, 50), skip, aux

    def forward(self, ids):
        x, aux = self.embedding(ids), None
        for index, block in enumerate(self.blocks):
            if not self.skip or torch.rand(()) > self.skip:
                x = block(x)
            if index == self.aux:
                aux = self.aux_head(x)
        return self.head(x) if aux is None else (self.head(x), aux)


def with_aux(model):
    y, aux = model(IDS)
    return language(y) + 1e-3 * language(aux)


def whisper():
    transformers = pytest.importorskip("transformers")
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in SIZES.items()}
    config = transformers.WhisperConfig(
        vocab_size=50, d_model=32, num_mel_bins=8, max_source_positions=6, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **sizes,
    )  # fmt: skip
    sound = torch.randn(4, 8, 12)
    return transformers.WhisperForConditionalGeneration(config), lambda model: model(input_features=sound, labels=IDS).loss


SIZES = {"layers": 4, "attention_heads": 2, "ffn_dim": 64}


def t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_decoder_layers=4, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), lambda model: model(input_ids=IDS, labels=IDS).loss


def clip():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 16}
    text, vision = {"vocab_size": 50, "eos_token_id": 2, **sizes}, {"image_size": 16, "patch_size": 4, **sizes}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    pixels = torch.randn(4, 3, 16, 16)
    return model, lambda model: model(input_ids=IDS, pixel_values=pixels, return_loss=True).loss


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(112, 4)
        self.layers = nn.ModuleList(self.layer(16 + 8 * index) for index in range(12))

    @staticmethod
    def layer(channels):
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 8, 3, padding=1, bias=False))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x.mean((2, 3)))


class Convolutions(nn.Sequential):
    def __init__(self, before, after):
        super().__init__(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
        )  # fmt: skip


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = Convolutions(3, 8), Convolutions(8, 16), Convolutions(16, 32)
        self.up2, self.up1, self.out = Convolutions(48, 16), Convolutions(24, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.middle(F.max_pool2d(second, 2))
        y = self.up2(torch.cat([F.interpolate(y, scale_factor=2), second], 1))
        return self.out(self.up1(torch.cat([F.interpolate(y, scale_factor=2), first], 1)))


class Recurrent(nn.Module):
    def __init__(self, stacked):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 50)
        self.lstm = nn.LSTM(32, 32, 3) if stacked else nn.ModuleList(nn.LSTM(32, 32) for _ in range(4))

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.lstm if isinstance(self.lstm, nn.ModuleList) else [self.lstm]:
            x = layer(x)[0]
        return self.head(self.norm(x))


def gan():
    discriminator = nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 2),
    )  # fmt: skip
    generator = nn.Sequential(
        nn.ConvTranspose2d(16, 64, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1),
    )  # fmt: skip
    model = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
    real = torch.randn(8, 3, 16, 16)

    def loss(model):
        fake = model["generator"](torch.randn(8, 16, 1, 1))
        values = [model["discriminator"](images).flatten() for images in (real, fake.detach(), fake)]
        targets = [torch.ones(8), torch.zeros(8), torch.ones(8)]
        return sum(F.binary_cross_entropy_with_logits(*pair) for pair in zip(values, targets, strict=True))

    return model, loss


def images(model):
    torch.manual_seed(1)
    x, y = torch.randn(8, 3, 16, 16), torch.randint(0, 2, (8, 16, 16))
    return model, lambda model: F.cross_entropy(model(x), y if isinstance(model, UNet) else y[:, 0, 0])


HEALTHY = {
    "encoder and decoder (Whisper)": (whisper, {"model.encoder.layers.0…3": 4, "model.decoder.layers.0…3": 4}),
    "encoder and decoder (T5)": (t5, {"encoder.block.0…3": 4, "decoder.block.0…3": 4}),
    "two towers (CLIP)": (clip, {"vision_model.encoder.layers.0…3": 4, "text_model.encoder.layers.0…3": 4}),
    "a head of small weight": (lambda: (Transformer(aux=2), with_aux), {"blocks.0…5": 6}),
    "layers skipped at random": (lambda: (Transformer(8, 0.3), lambda m: language(m(IDS))), {"blocks.0…7": 8}),
    "concatenation": (lambda: images(Dense()), {"layers.0…11.2": 12}),
    "skips": (lambda: images(UNet()), {"down1…2": 2, "up2…1": 2}),
    "a stacked LSTM": (lambda: (Recurrent(True), lambda m: language(m(IDS))), {"lstm.l0…2": 3}),
    "LSTMs": (lambda: (Recurrent(False), lambda m: language(m(IDS))), {"lstm.0…3.l0": 4}),
    "a GAN": (gan, {"generator.0…9": 4, "discriminator.0…8": 4}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy(name):
    torch.manual_seed(0)
    (model, loss), stacks = HEALTHY[name][0](), HEALTHY[name][1]
    watch = trained(model, loss, steps=14 if "random" in name else 6)
    assert not alarms(watch)
    assert not {"encoder", "decoder"} & {site.name for site in watch.sites}
    found = {stack.name: len(stack.sites) for stack in watch.history.stacks}
    assert {name: found.get(name) for name in stacks} == stacks


class PostLN(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(50, 32), nn.Sequential(*[Block(32, post=True) for _ in range(18)]))
        self.head = nn.Linear(32, 50)

    def forward(self, ids):
        return self.head(self.body(ids))


class TanhInTheMiddle(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(16, 64), nn.LayerNorm(64)
        self.middle = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.Tanh())])
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x):
        return self.head(self.middle(self.norm(self.stem(x))))


class DyingEncoder(Transformer):
    def __init__(self):
        super().__init__(depth=4)
        self.encoder = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Sigmoid()) for _ in range(8)])

    def forward(self, ids):
        x = self.embedding(ids)
        memory = self.encoder(x)
        for block in self.blocks:
            x = block(x) + memory
        return self.head(x)


class DeadMiddle(nn.Module):
    """A U of blocks in one list: the skips feed the first ones, and the middle gets little."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 32)) for _ in range(9))

    def forward(self, x):
        skips = []
        for block in self.blocks[:4]:
            x = block(x)
            skips.append(x)
        x = self.blocks[4](x)
        for block in self.blocks[5:]:
            x = block(x) + skips.pop()
        return x


def test_post_norm_without_warm_up():
    """It begins uniform, and vanishes once the large first steps have been taken."""
    torch.manual_seed(0)
    watch = trained(PostLN(), lambda model: language(model(torch.randint(50, (4, 12)))), steps=90, lr=1e-2)
    (finding,) = alarms(watch)
    assert (finding.code, finding.stack) == ("VANISHING", "body.1.0…17")
    assert finding.site in ("body.1.0", "body.1.1")
    assert finding.since_step > 1
    assert "pre-LN" in finding.advice


def test_tanh_in_the_middle():
    torch.manual_seed(0)
    x, y = torch.randn(32, 16), torch.randint(0, 4, (32,))
    (finding,) = alarms(trained(TanhInTheMiddle(), lambda model: F.cross_entropy(model(x), y)))
    assert (finding.code, finding.stack, finding.site) == ("VANISHING", "middle.0…38", "middle.0")


def test_an_encoder_that_dies_while_the_decoder_learns():
    torch.manual_seed(0)
    (finding,) = alarms(trained(DyingEncoder(), lambda model: language(model(IDS))))
    assert (finding.code, finding.stack, finding.severity) == ("VANISHING", "encoder.0…7.0", Severity.ERROR)


def test_a_dead_middle_behind_skips():
    torch.manual_seed(0)
    (finding,) = alarms(trained(DeadMiddle(), lambda model: model(torch.randn(16, 32)).square().mean()))
    assert (finding.code, finding.site) == ("VANISHING", "blocks.4.0")
