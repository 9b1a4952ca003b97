"""A pytest plugin (-p without_extension) that hides gradkernels._C as if it had never been built."""

import sys


class Absent:
    """Says of gradkernels._C what the import system says of a module that is nowhere."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "gradkernels._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent)
