"""The command `gradkernels`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn, TextIO

from gradkernels.implementations import implementations

LARGEST_SEED = 2**63 - 1


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command with `arguments` (those of the process where None); bad ones raise SystemExit(2)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parser = _Parser(prog="gradkernels", description="Fused layers that measure the gradients flowing through them.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="watch a deep net fail, be told why, and learn; or train a model on a text, or on a task of long lags"
    )
    demo.add_argument(
        "--model", choices=("transformer", "lstm"), help="train this one instead of a net that fails, then one that learns"
    )
    demo.add_argument("--task", choices=("adding", "temporal_order"), help="a task for an LSTM instead of a text")
    demo.add_argument("--length", metavar="T", type=_length, default=400, help="time steps of the task (default: %(default)s)")
    demo.add_argument(
        "--init",
        choices=("default", "forget1", "chrono"),
        default="chrono",
        help="initialisation of the task's LSTM (default: %(default)s)",
    )
    demo.add_argument("--text", metavar="FILE", help="UTF-8 text to learn (default: Python's own documentation)")
    demo.add_argument("--steps", metavar="N", type=_steps, help="training steps (default: 400; of a task at most 3000)")
    demo.add_argument("--out", metavar="DIR", default="run/demo", help="where files go (default: %(default)s)")
    demo.add_argument("--seed", metavar="S", type=_seed, default=0, help="of weights, batches, sample (default: %(default)s)")
    demo.set_defaults(run=_demo, parser=demo)
    shown = commands.add_parser("implementations", help="print what will run where")
    shown.set_defaults(run=_implementations)
    options = parser.parse_args(arguments)
    if "run" not in options:
        parser.print_help()
        return 0
    return options.run(options)


def _steps(value: str) -> int:
    return _integer(value, 1, sys.maxsize, "a positive integer")


def _length(value: str) -> int:
    return _integer(value, 10, 1_000_000, "an integer from 10 to 1000000")


def _seed(value: str) -> int:
    return _integer(value, 0, LARGEST_SEED, "an integer from 0 to 2^63 - 1")


def _integer(value: str, least: int, largest: int, expected: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = None
    if number is None or not least <= number <= largest:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {value!r}")
    return number


def _implementations(options: argparse.Namespace) -> int:
    for op, implementation in implementations().items():
        print(f"{op}: {implementation}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    fail = options.parser.error
    missing = [package for package in ("rich", "matplotlib") if find_spec(package) is None]
    if missing:
        fail(f'{" and ".join(missing)} not installed: pip install "gradkernels[demo]"')
    from gradkernels.demo import text as learning

    try:
        text = learning.read_text(options.text) if options.task is None else None
    except ValueError as error:
        fail(f"argument --text: {error}")
    try:
        steps_file = learning.open_output(options.out)
    except OSError as error:
        fail(f"argument --out: expected a folder that can be written, got {options.out!r}: {error.strerror}")
    source = options.text or "Python's own documentation"
    try:
        with steps_file:
            if options.task is not None:
                _task(options, steps_file)
            elif options.model is not None:
                learning.run(text, source, options.steps or 400, steps_file, options.seed, options.model)
            else:
                from gradkernels.demo import story

                story.run(text, source, options.steps or story.STEPS, steps_file, options.seed)
    except KeyboardInterrupt:
        print("gradkernels demo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output is gone; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        fail(f"argument --out: expected a folder that can be written, got {options.out!r}: {error.strerror}")
    return 0


def _task(options: argparse.Namespace, steps_file: TextIO) -> None:
    from gradkernels.demo import task

    steps = options.steps or task.STEPS
    task.run(options.task, options.length, options.init, steps, steps_file, options.seed)
