"""The LSTM on a GPU: from the formulas of a step (gates.py, scale.py) over the loops through time to a stack of layers."""
