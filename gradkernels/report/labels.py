"""How sites and numbers are written wherever people read them."""

from __future__ import annotations

import textwrap

COLUMNS = 80


def short_name(path: str, width: int) -> str:
    """A module path that fits: names cut to their first letter from the left, then the end alone; numbers stay whole."""
    parts = path.split(".")
    for index, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= width:
            break
        parts[index] = part if part.isdigit() else part[0]
    name = ".".join(parts)
    return name if len(name) <= width else "…" + name[1 - width :]


def site_label(name: str, layer: str) -> str:
    """A site's name, with its layer where the name alone is a number."""
    return f"[{name}] {layer}" if name.isdigit() else name


def wrap(text: str, indent: str = "  ") -> list[str]:
    """Text in lines of at most COLUMNS, broken at spaces, the second and later ones indented."""
    return textwrap.wrap(text, COLUMNS, subsequent_indent=indent, break_on_hyphens=False) or [""]
