"""Activation modules of Hugging Face transformers that compute GELU, by class name; transformers is never imported."""

# Class -> the `approximate` of the same formula. GELUActivation may be told to use a Python formula instead of
# torch.nn.functional.gelu; both are the exact form. QuickGELUActivation, ClippedGELUActivation and others are not GELU.
GELU_CLASSES = {
    "transformers.activations.GELUActivation": "none",
    "transformers.activations.NewGELUActivation": "tanh",
    "transformers.activations.GELUTanh": "tanh",
    "transformers.activations.PytorchGELUTanh": "tanh",
    "transformers.activations.FastGELUActivation": "tanh",
    "transformers.activations.AccurateGELUActivation": "tanh",
}
