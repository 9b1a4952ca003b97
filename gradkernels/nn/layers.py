"""GELU, LayerNorm, AddLayerNorm, Residual."""

from __future__ import annotations

import torch
from torch import nn

from gradkernels.nn.fused_module import FusedModule
from gradkernels.ops import add_layer_norm as add_layer_norm_op
from gradkernels.ops import gelu as gelu_op
from gradkernels.ops import layer_norm as layer_norm_op
from gradkernels.ops import residual as residual_op


class GELU(FusedModule, nn.GELU):
    """torch.nn.GELU whose backward measures dy and dx. Shapes: any; dtypes and errors as `gk.gelu`."""

    PORTS, TWIN = gelu_op.PORTS, nn.GELU

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, FusedModule):  # kept by somebody from before `revert`
            return type(self).forward(self, input)
        self.enter(input)
        return gelu_op.gelu(input, self.approximate, stats=self.table())


class LayerNorm(FusedModule, nn.LayerNorm):
    """torch.nn.LayerNorm whose backward measures dy, dx, dweight and dbias. Shapes, dtypes and errors as `gk.layer_norm`."""

    PORTS, TWIN = layer_norm_op.PORTS, nn.LayerNorm

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, FusedModule):
            return type(self).forward(self, input)
        self.enter(input)
        return layer_norm_op.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, stats=self.table())


class AddLayerNorm(FusedModule, nn.LayerNorm):
    """(LayerNorm(residual + x), residual + x) with torch.nn.LayerNorm's constructor and parameters.

    The step of a pre-norm residual stream: `y, residual = norm(x, residual)`. Its dx is the gradient of the stream. Shapes,
    dtypes and errors as `gk.add_layer_norm`.
    """

    PORTS = add_layer_norm_op.PORTS

    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.enter(input)
        return add_layer_norm_op.add_layer_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps, stats=self.table()
        )


class Residual(FusedModule):
    """x + branch(x), whose backward measures dskip, dbranch and their sum dx in the kernel that adds them.

    branch: a module from x to a tensor of x's shape and dtype that does not write into its input in place. Errors as
    `gk.residual`.
    """

    PORTS = residual_op.PORTS

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.enter(input)
        return residual_op.residual(input, self.branch, stats=self.table())
