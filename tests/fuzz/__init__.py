"""A fuzzer of the CPU kernels. `python -m fuzz --help` in tests/; how to repeat a failure is in CONTRIBUTING.md.

tensors.py: what a tensor is drawn as, and how it is built. pointwise.py, norms.py, recurrent.py: an Example an op, with its
truth (the LSTM's in lstm_truth.py), compared by compare.py. check.py: what must hold for every example. process.py: examples
in a process of one instruction set. __main__.py: one such process for each.
"""
