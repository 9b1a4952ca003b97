"""Layers derived from those of torch.nn: some compute the same, as timm's, torchvision's and open_clip's do; some do not."""

import torch
from torch import nn


class Exp(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight.exp()


class Plain(nn.LayerNorm):
    """Another constructor, another name for the argument, an attribute more."""

    def __init__(self, channels, eps=1e-6, affine=True, **kwargs):
        super().__init__(channels, eps, affine, **kwargs)
        self.note = ["kept"]

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class Inherits(nn.LayerNorm):
    pass


class Channels(nn.LayerNorm):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Channels1d(nn.LayerNorm):
    """As SqueezeBERT's."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 1)).permute(0, 2, 1)


class Casts(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).to(x.dtype)


class Single(nn.LayerNorm):
    def forward(self, x):
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Gelu(nn.GELU):
    def forward(self, x):
        return nn.functional.gelu(x, approximate=self.approximate)


class Gain(nn.LayerNorm):
    """The same at first, while its gain is one."""

    def __init__(self, channels):
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.gain


class Running(nn.LayerNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


class Absolute(nn.LayerNorm):
    """The same while its weight is positive."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight.abs(), self.bias, self.eps)


class InEval(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x) * 1.001


class OwnEps(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-6)


class Detached(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias.detach(), self.eps)


class Straight(nn.LayerNorm):
    """y of a LayerNorm, dx of the identity."""

    def forward(self, x):
        return super().forward(x).detach() + x - x.detach()


class ByRank(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if x.dim() == 4 else super().forward(x)


class Upcasts(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).float()


class Downcasts(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.bfloat16().to(x.dtype))


class Dense(nn.LayerNorm):
    """The numbers of Channels in another layout."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class RootMeanSquare(nn.LayerNorm):
    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class ByHand(nn.LayerNorm):
    """A LayerNorm, to which autocast does something else."""

    def forward(self, input):
        x = input.float() - input.float().mean(-1, keepdim=True)
        y = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (y * self.weight + self.bias).to(input.dtype)


class Two(nn.LayerNorm):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Holds(nn.LayerNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.after = nn.Identity()

    def forward(self, x):
        return self.after(super().forward(x))


class Pair(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x), x


class Stats(nn.LayerNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.stats = []


class Fast(nn.LayerNorm):
    """In the dtype of an autocast region."""

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class Quick(nn.GELU):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class OtherFormula(nn.GELU):
    """What its approximate says is not what it does."""

    def forward(self, x):
        return nn.functional.gelu(x, approximate="tanh")


class Formula(nn.GELU):
    def forward(self, x):
        return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))


class Clipped(nn.GELU):
    def forward(self, x):
        return super().forward(x).clamp(-10, 10)


class Noisy(nn.GELU):
    def forward(self, x):
        return super().forward(x) + torch.rand_like(x)


class Counting(nn.LayerNorm):
    """Writes wherever a forward can: buffers, attributes, random numbers."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen, self.number = [], 0

    def forward(self, input):
        self.calls += 1
        self.number += 1
        self.seen.append(input.shape)
        torch.rand(1)
        return super().forward(input)


class Drawing(nn.LayerNorm):
    """Draws a random number that nothing depends on."""

    def forward(self, input):
        torch.rand(1)
        return super().forward(input)


def train(net, shape, steps=3):
    """The outputs of some training steps, and the parameters after them."""
    generator, outputs = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True), *net.parameters()], 0.1)
    for _ in range(steps):
        x = torch.randn(shape, generator=generator).to(next(net.parameters(), torch.zeros(())).dtype).requires_grad_()
        y = net(x)
        y = y[0] if isinstance(y, tuple) else y
        optimizer.zero_grad()
        y.backward(torch.randn(y.shape, generator=generator).to(y))
        optimizer.step()
        outputs += [y.detach(), x.grad]
    return outputs, dict(net.named_parameters())
