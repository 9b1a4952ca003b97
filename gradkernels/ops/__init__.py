"""The ops, one file each, all in the same order: schema, reference, fake, Function, public function."""

from importlib import import_module

NAMES = ("gelu", "layer_norm", "add_layer_norm", "residual", "lstm_layer", "lstm_cell", "probe")  # of those with kernels
OPS = {name: import_module(f"gradkernels.ops.{name}") for name in NAMES}
