"""Trains in children that are killed at random moments: `python killed_runs.py FOLDER COUNT`.

Child k trains with the run directory FOLDER/k. Printed is a line a child: the last step that it reported as written, 0 where
there was none.
"""

import os
import random
import signal
import sys
import time

import torch
from torch import nn

import gradkernels as gk

LONGEST = 0.1  # seconds that a child runs, at most


def train(folder, pipe):
    """Reports each step to `pipe` when the host has read it."""
    report = os.write

    def slowly(file, data):
        time.sleep(1e-5)
        return report(file, data[:8])

    if int(os.path.basename(folder)) % 2:  # in every second child, so that a kill often tears a line
        os.write = slowly
    watch = gk.watch(model := nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), run_dir=folder)
    while True:
        loss = model(torch.randn(2, 4)).square().sum()
        loss.backward()
        watch.step(loss)
        report(pipe, b"%d\n" % watch.history.steps[-1])


def last_report(folder, seconds):
    """Of a child that is killed after so many seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train(folder, writing)
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with open(reading) as pipe:
        return int(([0, *pipe.read().split()])[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    nn.Linear(4, 4)(torch.randn(2, 4)).sum().backward()
    moments = random.Random(0)
    for index in range(int(sys.argv[2])):
        print(last_report(os.path.join(sys.argv[1], str(index)), moments.uniform(0, LONGEST)))
