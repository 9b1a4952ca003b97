"""The ops, one file each, all in the same order: schema, reference, fake, Function, public function."""

from gradkernels.ops import add_layer_norm, gelu, layer_norm, lstm_cell, lstm_layer, probe, residual

OPS = {
    module.__name__.rsplit(".", 1)[1]: module
    for module in (gelu, layer_norm, add_layer_norm, residual, lstm_layer, lstm_cell, probe)
}
