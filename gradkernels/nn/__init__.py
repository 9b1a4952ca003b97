"""The drop-in modules. Each is its torch.nn twin (constructor, parameters, state_dict, repr) with a measuring backward.

`stats` is a plain attribute, not a buffer: None (nothing is measured) until `gk.watch` or the user sets a statistics
tensor. It is absent from state_dict, and a copy or a pickle of the module does not carry it. An LSTM has one such attribute,
and one of `time_stats`, for every layer and direction, named like its parameters: `stats_l0`, `time_stats_l0_reverse`.
"""

from gradkernels.nn.fused_module import FusedModule
from gradkernels.nn.layers import GELU, AddLayerNorm, LayerNorm, Residual
from gradkernels.nn.recurrent import LSTM, LSTMCell

__all__ = ["GELU", "LSTM", "AddLayerNorm", "FusedModule", "LSTMCell", "LayerNorm", "Residual"]
