"""Where the files of an op are."""

HOMES = {  # many files: a folder of their own
    "csrc/cpu/lstm_": "csrc/cpu/lstm/",
    "gradkernels/triton/lstm_": "gradkernels/triton/lstm/",
    "tests/ops/test_lstm_": "tests/lstm/test_lstm_",
}


def place_of(pattern, op):
    """The path that a pattern like csrc/cpu/<op>.cpp stands for."""
    path = pattern.replace("<op>", op)
    for start, home in HOMES.items():
        path = path.replace(start, home)
    return path
