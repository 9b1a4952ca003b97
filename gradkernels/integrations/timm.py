"""Activation modules of timm that compute GELU, by class name; timm is never imported."""

# Class -> the `approximate` of the same formula. QuickGELU is another function.
GELU_CLASSES = {
    "timm.layers.activations.GELU": "none",
    "timm.layers.activations.GELUTanh": "tanh",
}
