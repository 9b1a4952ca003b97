// What is measured, as gradkernels/telemetry/fields.py defines it: the two are compared when the extension is loaded. Neither
// PyTorch nor CUDA is included here.
#pragma once

namespace gk {

// The columns of a statistics table.
inline constexpr const char* FIELDS[] = {"numel",           "observation_count", "square_sum",      "square_sum_tiny",
                                         "square_sum_huge", "abs_max",           "nonfinite_count", "zero_count"};
constexpr int NUM_FIELDS = sizeof(FIELDS) / sizeof(*FIELDS);

// The columns of a table of time steps: norms, the number of gates, counts of gates, and the sum of f.
inline constexpr const char* TIME_FIELDS[] = {"dh",          "dc",         "dh_recurrent", "gate_count",     "input_low",
                                              "input_high",  "forget_low", "forget_high",  "candidate_high", "output_low",
                                              "output_high", "forget_sum"};
constexpr int NUM_TIME_FIELDS = sizeof(TIME_FIELDS) / sizeof(*TIME_FIELDS);
constexpr int NUM_NORMS = 3, GATE_COUNT = NUM_NORMS, FIRST_COUNT = GATE_COUNT + 1, FORGET_SUM = NUM_TIME_FIELDS - 1;
constexpr int NUM_COUNTS = FORGET_SUM - FIRST_COUNT;
constexpr int NUM_SUMS = NUM_TIME_FIELDS - 1;  // of a step in a kernel's partials: all but gate_count

constexpr double LOW_GATE = 0.1, HIGH_GATE = 0.9;  // a gate below, above: saturated

// float64 square sums: elements below and above these are squared times SCALE, or divided by it.
constexpr double SMALLEST_SQUARED = 0x1p-480, LARGEST_SQUARED = 0x1p480, SCALE = 0x1p537;

// A gradient on its way back through time: magnitudes from 2^-EXPONENT_RANGE to 2^EXPONENT_RANGE are carried as they are;
// MAX_EXPONENT is that of a scale in which what comes from outside can still be represented.
constexpr int EXPONENT_RANGE = 32, MAX_EXPONENT_FLOAT = 100, MAX_EXPONENT_DOUBLE = 900;

}  // namespace gk
