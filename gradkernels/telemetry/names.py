"""The names of sites: module paths with numbers in them."""

from __future__ import annotations

import re

NUMBER = re.compile(r"\d+")


def without_numbers(name: str) -> str:
    """What names that differ in numbers alone share: `layers.*.norm`."""
    return NUMBER.sub("*", name)
