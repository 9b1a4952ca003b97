"""What is measured: the fields of a row. csrc/fields.h says the same to the kernels in C++, and is compared when it is loaded.

A statistics tensor, called `stats` everywhere, is float64 of shape (ports, slots, len(FIELDS)). A port is one gradient at
a site: `dy` comes in, `dx` goes out, and so on in the order of the op's PORTS. Each program of a kernel adds to a slot of
its own; a row is the merge of its slots. Rows merge by + and max, so micro-batches, a module used twice and several
ranks combine exactly.
"""

FIELDS = (
    "numel",  # elements seen
    "observation_count",  # backward calls that added to the row
    "square_sum",  # sum of squares of the finite elements, less what the next two hold
    "square_sum_tiny",  # float64 tensors: sum of (SCALE v)^2 over elements below SMALLEST_SQUARED whose squares would underflow
    "square_sum_huge",  # float64 tensors: sum of (v / SCALE)^2 over blocks with elements above LARGEST_SQUARED
    "abs_max",  # largest magnitude among the finite elements; merges by max, every other field by +
    "nonfinite_count",  # elements that are NaN or infinite
    "zero_count",  # elements that are exactly zero
)
NUMEL = FIELDS.index("numel")
OBSERVATIONS = FIELDS.index("observation_count")
SQUARE_SUMS = slice(FIELDS.index("square_sum"), FIELDS.index("square_sum_huge") + 1)
ABS_MAX = FIELDS.index("abs_max")
NONFINITE = FIELDS.index("nonfinite_count")
COUNTS = ("numel", "observation_count", "nonfinite_count", "zero_count")  # whole numbers
SPARSE = ("square_sum_tiny", "square_sum_huge", "nonfinite_count", "zero_count")  # 0 in most rows
# float64 square sums: elements below and above these are squared times SCALE, or divided by it.
SMALLEST_SQUARED, LARGEST_SQUARED, SCALE = 2.0**-480, 2.0**480, 2.0**537
NUM_SLOTS = 1024  # of a row on a GPU, one for each program that may run: four an SM and more
TIME_FIELDS = (  # of one time step of one direction of an LSTM layer; norms merge by hypot, the rest by +
    "dh",  # norm of dL/dh_t: dy_t, what comes through W_hh from the step after, and dL/dh_n where t is a sequence's last step
    "dc",  # norm of dL/dc_t: through c_{t+1}, through h_t, and dL/dc_n
    "dh_recurrent",  # norm of dG_{t+1} W_hh, the part of dh that comes from the step after
    "gate_count",  # live rows times H: what the counts and the sum below are out of
    "input_low",  # elements of i below LOW_GATE
    "input_high",  # elements of i above HIGH_GATE
    "forget_low",
    "forget_high",
    "candidate_high",  # elements of |g| above HIGH_GATE
    "output_low",
    "output_high",
    "forget_sum",  # sum of f
)
NUM_NORMS = TIME_FIELDS.index("gate_count")  # they come first
TIME_COUNTS = TIME_FIELDS[NUM_NORMS : TIME_FIELDS.index("forget_sum")]
LOW_GATE, HIGH_GATE = 0.1, 0.9  # a gate below, above: saturated
# A gradient on its way back through time: magnitudes from 2^-EXPONENT_RANGE to 2^EXPONENT_RANGE are carried as they are;
# MAX_EXPONENT is that of a scale in which what comes from outside can still be represented.
EXPONENT_RANGE, MAX_EXPONENT_FLOAT, MAX_EXPONENT_DOUBLE = 32, 100, 900
