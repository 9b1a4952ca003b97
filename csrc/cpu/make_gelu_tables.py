"""Writes gelu_tables.h: python csrc/cpu/make_gelu_tables.py > csrc/cpu/gelu_tables.h

GELU is x for x > 0 and 0 elsewhere, less an even function that dies out quickly: y = max(x, 0) - r(|x|), and its slope is
1 - s(|x|) for x > 0 and s(|x|) elsewhere. r and s are tabulated in 32 segments of width 1/4 centred on 0, 1/4, ..., 31/4, each
a polynomial of degree 5 (for bfloat16: 3) in f = |x| - segment / 4, f in [-1/8, 1/8], through Chebyshev nodes. The last segment
is zero. In the first, where |x| is small, the polynomial of r has no constant term, so that y keeps its relative accuracy
around zero.
"""

import math

import numpy as np

SEGMENTS, WIDTH = 32, 0.25


def exact(a: float) -> tuple[float, float]:
    """r and s of GELU at a = |x|."""
    tail = 0.5 * math.erfc(a / math.sqrt(2))
    return a * tail, tail - a * math.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


def tanh(a: float) -> tuple[float, float]:
    """r and s of GELU's tanh form at a = |x|."""
    scale = 2 * math.sqrt(2 / math.pi)
    tail = 1 / (1 + math.exp(scale * (a + 0.044715 * a**3)))
    return a * tail, tail - a * tail * (1 - tail) * scale * (1 + 3 * 0.044715 * a * a)


def segment(function, index: int, part: int, degree: int) -> np.ndarray:
    """Coefficients of 1, f, ..., f^degree of one segment of r (part 0) or s (part 1)."""
    if index == SEGMENTS - 1:
        return np.zeros(degree + 1)
    nodes = 0.5 * np.cos((np.arange(degree + 1) + 0.5) * np.pi / (degree + 1))
    if index == 0:
        nodes = 0.25 + nodes / 2  # |x| is never negative
    nodes *= WIDTH
    values = np.array([function(index * WIDTH + node)[part] for node in nodes])
    if index == 0 and part == 0:
        return np.append(0.0, np.linalg.solve(np.vander(nodes, degree + 1, increasing=True)[:-1, 1:], values[:-1]))
    return np.linalg.solve(np.vander(nodes, degree + 1, increasing=True), values)


def main() -> None:
    """Prints the header."""
    print("// Written by make_gelu_tables.py, which says what these are: [power of f][segment].")
    print("#pragma once")
    for name, function in (("EXACT", exact), ("TANH", tanh)):
        for part, what, degree in ((0, "R", 5), (1, "S", 5), (0, "R", 3), (1, "S", 3)):
            rows = np.array([segment(function, index, part, degree) for index in range(SEGMENTS)], dtype=np.float32).T
            print(f"\nalignas(64) constexpr float GELU_{name}_{what}{degree}[{degree + 1}][{SEGMENTS}] = {{")
            for row in rows:
                numbers = [f"{value:.9g}" for value in row]
                numbers = [f"{number}f" if "." in number or "e" in number else f"{number}.0f" for number in numbers]
                print("    {" + ",\n     ".join(", ".join(numbers[k : k + 8]) for k in range(0, SEGMENTS, 8)) + "},")
            print("};")


if __name__ == "__main__":
    main()
