"""What a tensor is drawn as, a few numbers that hypothesis can shrink, and the tensor that is built from them.

Everything is built as integers that hold the bits, because any conversion of a float makes a signalling NaN a quiet one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from gradkernels.testing import DTYPES

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by bytes an element
MANTISSA = {"float32": 23, "float64": 52, "bfloat16": 7, "float16": 10}
EXPONENTS = {"float32": (-44, 38), "float64": (-320, 300), "bfloat16": (-40, 38), "float16": (-7, 4)}  # of 10
# Exponents of 10 around which the square of a number, or a sum of them, leaves its accumulator's range.
FLOAT_EDGES = (-23, -22, -19, 17, 18, 19)
EDGES = {"float32": FLOAT_EDGES, "bfloat16": FLOAT_EDGES, "float64": (-162, -154, -145, 144, 152, 153, 154), "float16": (-4, 2)}
# mixed: those before it, singly or in runs
MODERATE = ("zero", "infinity", "nan", "signalling", "subnormal", "smallest", "mixed")
SPECIALS = (*MODERATE, "largest")
LAYOUTS = ("contiguous", "offset", "transposed", "sliced", "expanded", "expanded rows", "negative")
WIDTHS = (4, 8, 16, 32, 64)  # elements of a vector, or of a pair of them, on some instruction set
BLOCKS = (512, 1024, 4096, 8192)  # elements between two folds of the statistics, or two threads
GUARD = 64  # elements around every tensor in its memory, which nobody may touch


@dataclass(frozen=True)
class Values:
    """(normal + mean) * 10^exponent, of which `special` ones take a share; exponent None: another exponent for each element.

    share 0: none, 1: all, "first" and "last": one element.
    """

    exponent: int | None = 0
    mean: float = 0.0
    special: str = "zero"
    share: float | str = 0.0


@dataclass(frozen=True)
class Drawn:
    """A tensor: its values, how it lies in memory, and the seed of its random numbers."""

    values: Values = Values()
    layout: str = "contiguous"
    seed: int = 0

    def build(self, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor."""
        repeated = {"expanded": len(shape) - 1, "expanded rows": 0}.get(self.layout)
        distinct = tuple(min(size, 1) if k == repeated else size for k, size in enumerate(shape))
        bits = lay_out(bits_of(self.values, dtype, distinct, np.random.default_rng(self.seed)), self.layout).expand(shape)
        if self.layout != "negative":
            return bits.view(NAMES[dtype])
        sign = torch.iinfo(bits.dtype).min
        return torch._neg_view(bits.bitwise_xor_(sign).view(NAMES[dtype]))


def special_bits(special: str, dtype: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` special values as int64, each with a random sign, and random bits where it has any."""
    if special == "mixed":
        kinds, run = [special_bits(kind, dtype, count, rng) for kind in MODERATE[:-1]], rng.choice((1, max(WIDTHS)))
        return np.choose(rng.integers(0, len(kinds), count).repeat(run)[:count], kinds)
    mantissa, size = MANTISSA[dtype], NAMES[dtype].itemsize
    infinity = (1 << (8 * size - 1)) - (1 << mantissa)
    random, quiet = rng.integers(1, 1 << (mantissa - 1), count), 1 << (mantissa - 1)
    bits = {
        "zero": 0 * random,
        "infinity": 0 * random + infinity,
        "nan": infinity + quiet + random - 1,
        "signalling": infinity + random,
        "subnormal": random,
        "smallest": 0 * random + (1 << mantissa),
        "largest": 0 * random + infinity - 1,
    }[special]
    return np.where(rng.random(count) < 0.5, bits, bits | -(1 << (8 * size - 1)))


def bits_of(values: Values, dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    """The values as integers."""
    low, high = EXPONENTS[dtype]
    exponents = rng.integers(low, high, shape) if values.exponent is None else float(np.clip(values.exponent, low, high))
    limit = torch.finfo(NAMES[dtype]).max
    with np.errstate(over="ignore", under="ignore"):
        plain = (rng.standard_normal(shape) + values.mean) * np.power(10.0, exponents)
    numbers = torch.from_numpy(np.asarray(plain)).clamp(-limit, limit).to(NAMES[dtype])
    bits = numbers.view(BITS[numbers.itemsize]).contiguous()
    if values.share in ("first", "last"):
        picked = torch.zeros(shape, dtype=torch.bool)
        picked.view(-1)[: 1 if values.share == "first" else None][-1:] = True
    else:
        picked = torch.from_numpy(np.asarray(rng.random(shape) < values.share))
    special = special_bits(values.special, dtype, int(picked.sum()), rng)
    bits[picked] = torch.from_numpy(special).to(bits.dtype)
    return bits


def lay_out(bits: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another layout, in memory that begins and ends with a guard of NaN.

    A contiguous tensor has no guard, so that AddressSanitizer sees a read beyond its end.
    """
    if layout == "contiguous":
        return bits.clone()
    if layout == "sliced" and bits.dim():
        wide = [*bits.shape[:-1], 2 * bits.shape[-1] + 1]
        return guarded(wide, bits.dtype)[..., 1::2].copy_(bits)
    if layout == "transposed":
        return guarded(bits.shape[::-1], bits.dtype).permute(tuple(range(bits.dim()))[::-1]).copy_(bits)
    return guarded(bits.shape, bits.dtype, 3 if layout == "offset" else 0).copy_(bits)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """A contiguous tensor inside of a larger one, whose bits are ones: NaN. 64-byte aligned but for `offset` elements."""
    count = int(np.prod(shape))
    memory = torch.full((count + 2 * GUARD,), -1, dtype=dtype)
    return memory[GUARD + offset :][:count].view(tuple(shape))


def values(
    dtype: str,
    exponents: tuple[int, int] | None = None,
    specials: tuple[str, ...] = SPECIALS,
    means: tuple[float, ...] = (0.0, 0.0, 10.0, 1000.0),
) -> st.SearchStrategy:
    """Values of a dtype, in `exponents` where not everything that the dtype holds; mostly around 1, mostly nothing special."""
    low, high = exponents or EXPONENTS[dtype]
    around_one, anywhere = st.just(0 if exponents is None else high), st.integers(low, high)
    exponent = around_one | around_one | anywhere
    if exponents is None:
        exponent |= st.none() | st.sampled_from(EDGES[dtype])
    return st.builds(
        Values,
        exponent=exponent,
        mean=st.sampled_from(means),
        special=st.sampled_from(specials) | (st.just("mixed") if "mixed" in specials else st.sampled_from(specials)),
        share=st.sampled_from((0.0, 0.0, "first", "last", 0.01, 0.3, 1.0, 1.0)),
    )


def drawn(values: st.SearchStrategy, layouts: tuple[str, ...] = LAYOUTS) -> st.SearchStrategy:
    """Tensors of these values."""
    return st.builds(Drawn, values, st.one_of(st.just("contiguous"), st.sampled_from(layouts)), st.integers(0, 2**32 - 1))


def sizes(largest: int) -> st.SearchStrategy:
    """Sizes of at most `largest`: small ones, and those around whole vectors and blocks."""
    around = {size + d for width in WIDTHS for size in (width, 2 * width, 3 * width) for d in (-1, 0, 1)}
    around |= {size + d for block in BLOCKS for size in (block, 2 * block) for d in (-1, 0, 1)}
    around = st.sampled_from(sorted(size for size in around if size <= largest))
    return st.one_of(st.integers(0, min(largest, 9)), around, around)


def shapes(num_elements: int = 40000) -> st.SearchStrategy:
    """Shapes of 0 to 4 dimensions; the last one is the longest, and rarely there are enough elements for three threads."""
    rows = st.sampled_from((0, 1, 1, 2, 3, 5, 17))
    vector = st.tuples(sizes(num_elements))
    matrix = st.tuples(rows, sizes(num_elements // 17))
    deep = st.lists(st.integers(0, 5), min_size=1, max_size=3).flatmap(lambda outer: sizes(300).map(lambda n: (*outer, n)))
    threaded = st.sampled_from(((24577,), (4, 8193), (49153,), (7, 7001), (3, 5, 3300), (2049, 24)))
    return st.one_of(st.just(()), vector, vector, matrix, matrix, deep, threaded)


DTYPE_NAMES = st.sampled_from(tuple(NAMES))
THREADS = st.sampled_from((1, 1, 2, 3))
