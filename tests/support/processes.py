"""Python and pytest in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SHARED = ("test_every_op.py", "test_every_op_transformed.py")  # by every op
PATHS = (TESTS / "support", TESTS)  # from which tests import what they share


def environment_of(**more):
    """The environment of a process that imports what tests do."""
    path = os.pathsep.join([*map(str, PATHS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **more}


def run(*arguments, **environment):
    """Standard output of a Python process, which must succeed."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=TESTS, env=environment_of(**environment), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}", pytrace=False)
    return done.stdout


def selection_of(op, ops):
    """(files, -k): the files of an op's tests, its own and those that all `ops` share, and what picks its tests out of them."""
    longer = [other for other in ops if op in other and other != op]
    return (f"test_{op}.py", *SHARED), " and not ".join([op, *longer])


def run_tests(*arguments, **environment):
    """Runs test files, given by their names, in a process of their own, which says in a line each what failed."""
    paths = [str(next(TESTS.rglob(word))) if word.startswith("test_") and word.endswith(".py") else word for word in arguments]
    run("-m", "pytest", "-p", "no:cacheprovider", "--tb=line", *paths, **environment)
