// The backward recurrence: one block owns `units` units of one group of batch rows. It forms their dG, which all blocks of the
// group then multiply by their columns of W_hh.
//
// dh and dc are carried times a power of two, chosen at each step from the largest magnitude of the step after, so that a
// gradient which vanishes stays a number, and dG stays inside the 16 bits in which it is exchanged. What is written is scaled
// back. A group of rows has a scale of its own.
#pragma once

#include "lstm_recurrence.h"

namespace gk {

constexpr int NOTHING = 1 << 30;  // the exponent of a step at which a group of rows had only zeros

struct Backward {
  Recurrence recurrence;
  const uint16_t *weight_hh, *dy;  // dy: null where none came
  const float *c0, *gates, *cells;
  float *dh, *dc;  // (B, H): dh_n and dc_n on entry, dh0 and dc0 on return
  uint16_t* dgates;
  double* partials;    // (T, blocks, NUM_SUMS); null without telemetry
  int32_t* exponents;  // (groups, T) of each step's scale; null without telemetry
  // A recurrence may be cut into chunks of steps of B rows, a launch each. (groups, 2) or longer: the exponent of the scale in
  // which dh and dc pass from one to the next, and the code of the largest magnitude, so that bits are those of one recurrence.
  int32_t* carried_state;
  bool continues_from, continues_to;  // dh and dc are so passed on entry, on return
};

// Largest magnitudes from 2^(MIDDLE - RANGE) to 2^(MIDDLE + RANGE) are left as they are, others are brought to 2^MIDDLE. A
// bfloat16 has float32's exponents. Half has five bits: a step may grow a gradient 500-fold until it is infinite, and what is a
// millionth of the largest keeps half of its digits.
template <typename T>
struct Range {
  static constexpr int MIDDLE = 0, RANGE = EXPONENT_RANGE;
};
template <>
struct Range<Half> {
  static constexpr int MIDDLE = 4, RANGE = 3;
};
constexpr int LARGEST_EXPONENT = 126;  // whose power of two, and its reciprocal, float32 still holds

struct Scale {
  int exponent = 0, exponent_delta = 0;          // exponent_delta: from the scale before
  float carried = 1, scale_in = 1, unscale = 1;  // factors of what the scale before carried, of dy, and of what is written

  // From the codes of the largest magnitude of the step after, in its scale, and of what comes in.
  template <typename T>
  GK_DEVICE void choose(uint32_t max_abs, uint32_t max_abs_external) {
    constexpr int RANGE = Range<T>::RANGE, MIDDLE = Range<T>::MIDDLE;
    const int power = static_cast<int>(max_abs) - ONE - MIDDLE, before = exponent;
    if (max_abs == 0 || max_abs == NOT_FINITE) {
      exponent = 0;
    } else if (power < -RANGE || power > RANGE) {
      exponent -= power < -LARGEST_EXPONENT ? -LARGEST_EXPONENT : power;
    }
    if (max_abs_external != 0) {
      const int most = max_abs_external == NOT_FINITE ? 0 : MIDDLE + RANGE + ONE - static_cast<int>(max_abs_external);
      exponent = exponent < most ? exponent : most;
      exponent = exponent < LARGEST_EXPONENT ? exponent : LARGEST_EXPONENT;
    }
    exponent = exponent > -LARGEST_EXPONENT ? exponent : -LARGEST_EXPONENT;
    exponent_delta = exponent - before;
    carried = device::power_of_two(exponent_delta);
    scale_in = exponent <= LARGEST_EXPONENT ? device::power_of_two(exponent) : 0.0f;
    unscale = device::power_of_two(-exponent);
  }
};

// A thread's cells: what is carried, what a step reads, what it leaves.
template <typename T, int UNIT_ROWS>
struct BackwardCells {
  float dh[UNIT_ROWS], dc[UNIT_ROWS];  // dh: of the sequence's end, until the cell is alive
  float gates[UNIT_ROWS][4], c[UNIT_ROWS], c_before[UNIT_ROWS], dy[UNIT_ROWS], dy_next[UNIT_ROWS];
  float total[UNIT_ROWS], total_dc[UNIT_ROWS], recurrent[UNIT_ROWS], dg[UNIT_ROWS][4];

  GK_DEVICE void load_dy(const Backward& p, const ThreadCoordinates& place, const Step& next) {
    GK_UNROLL
    for (int i = 0; i < UNIT_ROWS; ++i) {
      const UnitRow unit_row(p.recurrence, place, i, true);
      dy[i] = dy_next[i];
      dy_next[i] = 0;
      if (!p.dy || !unit_row.there || unit_row.row >= next.rows) continue;
      dy_next[i] = device::upcast(T{p.dy[(next.first + unit_row.row) * p.recurrence.H + unit_row.unit]});
    }
  }

  GK_DEVICE void load(const Backward& p, const ThreadCoordinates& place, const Step& step, const Step& earlier) {
    const int64_t H = p.recurrence.H;
    GK_UNROLL
    for (int i = 0; i < UNIT_ROWS; ++i) {
      const UnitRow unit_row(p.recurrence, place, i, true);
      if (!unit_row.there || unit_row.row >= step.rows) continue;
      const int64_t row = step.first + unit_row.row;
      GK_UNROLL
      for (int gate = 0; gate < 4; ++gate) gates[i][gate] = p.gates[(row * 4 + gate) * H + unit_row.unit];
      c[i] = p.cells[row * H + unit_row.unit];
      const bool rows_with_predecessor = unit_row.row < earlier.rows;
      c_before[i] =
          (rows_with_predecessor ? p.cells + (earlier.first + unit_row.row) * H : p.c0 + unit_row.row * H)[unit_row.unit];
    }
  }

  // The largest magnitude that `next` receives from outside: dy, and dh_n and dc_n of the rows that it is the first to see.
  GK_DEVICE uint32_t external_max(const Backward& p, const ThreadCoordinates& place, const Step& next,
                                  int64_t active_rows) const {
    uint32_t result = 0;
    GK_UNROLL
    for (int i = 0; i < UNIT_ROWS; ++i) {
      const UnitRow unit_row(p.recurrence, place, i, true);
      if (!unit_row.there || unit_row.row >= next.rows) continue;
      result = larger(result, dy_next[i]);
      if (unit_row.row >= active_rows) result = larger(larger(result, dh[i]), dc[i]);
    }
    return result;
  }

  // NaN above infinity above all numbers: magnitudes compare as the integers that their bits are.
  GK_DEVICE static uint32_t larger(uint32_t bits, float v) {
    const uint32_t other = device::bits_of(v) & 0x7fffffffu;
    return other > bits ? other : bits;
  }

  // dG of one step, from dh and dc, which moves on to the step before. Returns the largest magnitude of both.
  GK_DEVICE uint32_t step_back(const Backward& p, const ThreadCoordinates& place, const Memory& memory, const Scale& scale,
                               float last_back, const Step& step, int64_t active_rows, Vector16* double_buffer) {
    uint32_t max_abs = 0;
    GK_UNROLL
    for (int i = 0; i < UNIT_ROWS; ++i) {
      const UnitRow unit_row(p.recurrence, place, i, true);
      if (!unit_row.there) continue;
      const bool carried = unit_row.row < active_rows;
      const float before = carried ? sum_at(p.recurrence.tiling, memory.sums, unit_row, 0) : dh[i];
      if (unit_row.row >= step.rows) {
        if (carried) leave_loop(p, unit_row, i, before, last_back);
        continue;
      }
      const float factor = carried ? scale.carried : scale.scale_in;
      recurrent[i] = carried ? before : 0.0f;
      const float dh_total = before * factor + dy[i] * scale.scale_in;
      const float in = gates[i][0], f = gates[i][1], g = gates[i][2], o = gates[i][3];
      const float m = device::hyperbolic_tangent(c[i]);
      const float dc_total = dc[i] * factor + dh_total * o * (1.0f - m * m);
      max_abs = larger(larger(max_abs, dh_total), dc_total);
      total[i] = dh_total;
      total_dc[i] = dc_total;
      dg[i][0] = dc_total * g * (in * (1.0f - in));
      dg[i][1] = dc_total * c_before[i] * (f * (1.0f - f));
      dg[i][2] = dc_total * in * (1.0f - g * g);
      dg[i][3] = dh_total * m * (o * (1.0f - o));
      dc[i] = dc_total * f;
      T v[4];
      GK_UNROLL
      for (int gate = 0; gate < 4; ++gate) device::downcast(dg[i][gate], v[gate]);
      const Pairs pairs = {v[0].bits | uint32_t{v[1].bits} << 16, v[2].bits | uint32_t{v[3].bits} << 16};
      *reinterpret_cast<Pairs*>(reinterpret_cast<uint16_t*>(double_buffer) + unit_row.double_buffer) = pairs;
    }
    return max_abs;
  }

  // What comes from the step after lies where the product would have left it.
  GK_DEVICE void resume(const Backward& p, const ThreadCoordinates& place, float* sums) const {
    const Tiling& tiling = p.recurrence.tiling;
    GK_UNROLL
    for (int i = 0; i < UNIT_ROWS; ++i) {
      const UnitRow unit_row(p.recurrence, place, i, true);
      for (int k = 0; unit_row.there && k < tiling.k_warps; ++k) {
        sums[k * (tiling.sum_bytes / (4 * tiling.k_warps)) + unit_row.sums] = k == 0 ? dh[i] : 0.0f;
      }
    }
  }

  // A row leaves the time loop: what it carries is the gradient of its initial state.
  GK_DEVICE void leave_loop(const Backward& p, const UnitRow& unit_row, int i, float before, float unscale) const {
    p.dh[unit_row.row * p.recurrence.H + unit_row.unit] = before * unscale;
    p.dc[unit_row.row * p.recurrence.H + unit_row.unit] = dc[i] * unscale;
  }

  GK_DEVICE void store(const Backward& p, const ThreadCoordinates& place, const Step& step, float unscale) const {
    GK_UNROLL
    for (int i = 0; i < UNIT_ROWS; ++i) {
      const UnitRow unit_row(p.recurrence, place, i, true);
      if (!unit_row.there || unit_row.row >= step.rows) continue;
      GK_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        T v;
        device::downcast(dg[i][gate] * unscale, v);
        p.dgates[((step.first + unit_row.row) * 4 + gate) * p.recurrence.H + unit_row.unit] = v.bits;
      }
    }
  }

  // The sums of this warp over its pairs of one step, into the head. Squares in float64: no float32 is too small for it, nor is
  // what has come through W_hh, in its own scale, beside a dy that is 1e150 times as large.
  GK_DEVICE void measure(const Backward& p, const ThreadCoordinates& place, const Step& step, int exponent_delta,
                         SharedHeader* head) const {
    double squares[3] = {0, 0, 0};
    float forget = 0;
    uint32_t counts[2] = {0, 0};  // a byte a count: a warp has at most 32 x 4 cells
    GK_UNROLL
    for (int i = 0; i < UNIT_ROWS; ++i) {
      const UnitRow unit_row(p.recurrence, place, i, true);
      if (!unit_row.there || unit_row.row >= step.rows) continue;
      squares[0] += static_cast<double>(total[i]) * total[i];
      squares[1] += static_cast<double>(total_dc[i]) * total_dc[i];
      squares[2] += static_cast<double>(recurrent[i]) * recurrent[i];
      constexpr float LOW = LOW_GATE, HIGH = HIGH_GATE;
      const float in = gates[i][0], f = gates[i][1], g = gates[i][2], o = gates[i][3];
      forget += f;
      counts[0] += (in < LOW) + (uint32_t{in > HIGH} << 8) + (uint32_t{f < LOW} << 16) + (uint32_t{f > HIGH} << 24);
      counts[1] += (g > HIGH || g < -HIGH) + (uint32_t{o < LOW} << 8) + (uint32_t{o > HIGH} << 16);
    }
    GK_UNROLL
    for (int k = 0; k < NUM_NORMS; ++k) squares[k] = device::warp_sum(squares[k]);
    forget = device::warp_sum(forget);
    GK_UNROLL
    for (int k = 0; k < 2; ++k) counts[k] = device::warp_add(counts[k]);
    if (place.lane != 0) return;
    squares[2] *= ldexp(1.0, 2 * exponent_delta);
    GK_UNROLL
    for (int k = 0; k < NUM_NORMS; ++k) head->squares[k][place.warp] = squares[k];
    head->forget[place.warp] = forget;
    GK_UNROLL
    for (int k = 0; k < 2; ++k) head->counts[k][place.warp] = counts[k];
  }
};

// The block's sums of step t: one store by each of NUM_SUMS threads, in the order of the warps.
GK_DEVICE void store_sums(const Backward& p, int64_t t, const SharedHeader* head) {
  const int k = device::thread() - (THREADS - 32);
  if (k < 0 || k >= NUM_SUMS) return;
  double total = 0;
  for (int warp = 0; warp < WARPS; ++warp) {
    if (k < NUM_NORMS) {
      total += head->squares[k][warp];
    } else if (k < NUM_NORMS + NUM_COUNTS) {
      total += head->counts[(k - NUM_NORMS) / 4][warp] >> (k - NUM_NORMS) % 4 * 8 & 0xff;
    } else {
      total += head->forget[warp];
    }
  }
  p.partials[(t * p.recurrence.tiling.num_blocks() + device::block()) * NUM_SUMS + k] = total;
}

template <typename T, int M, bool LOCAL, bool TELEMETRY>
GK_DEVICE void recurrence_backward(const Backward& p) {
  constexpr int UNIT_ROWS = LOCAL ? CELLS_LOCAL : CELLS_GRID;
  const Recurrence& w = p.recurrence;
  const Tiling& tiling = w.tiling;
  const ThreadCoordinates place(tiling);
  const Memory memory(tiling);
  const GridBarrier<LOCAL> barrier{w, place, memory.head};
  const Stationary<T, M, 1, RESIDENT_BWD> weights(tiling, place, memory, BackwardWeights{p.weight_hh, w.H});
  const auto double_buffer = [&](int64_t round) {
    const int64_t buffer = round % 2;
    return LOCAL ? memory.double_buffer + buffer * tiling.buffer_vectors
                 : w.double_buffer + (buffer * tiling.groups + place.group) * tiling.buffer_vectors;
  };
  if (LOCAL) {
    for (int i = device::thread(); i < 2 * tiling.buffer_vectors; i += THREADS) memory.double_buffer[i] = {0, 0, 0, 0};
  }
  const auto step_back_at = [&](int64_t n) { return step_at(w, w.reverse ? n : w.T - 1 - n); };

  BackwardCells<T, UNIT_ROWS> cells;
  GK_UNROLL
  for (int i = 0; i < UNIT_ROWS; ++i) {
    const UnitRow unit_row(w, place, i, true);
    cells.dh[i] = unit_row.there ? p.dh[unit_row.row * w.H + unit_row.unit] : 0.0f;
    cells.dc[i] = unit_row.there ? p.dc[unit_row.row * w.H + unit_row.unit] : 0.0f;
    cells.dy_next[i] = 0;
  }
  Step step = step_back_at(0), next = step_back_at(1);
  int64_t active_rows = p.continues_from ? step.rows : 0;
  Scale scale;
  uint32_t max_abs, external_max;
  cells.load_dy(p, place, step);
  const uint32_t first = cells.external_max(p, place, step, active_rows);
  barrier.arrive(0, first, first);
  cells.load_dy(p, place, next);
  cells.load(p, place, step, next);
  barrier.wait(0, max_abs, external_max);
  if (p.continues_from) {
    scale.exponent = p.carried_state[2 * place.group];
    max_abs = static_cast<uint32_t>(p.carried_state[2 * place.group + 1]);
    cells.resume(p, place, memory.sums);
  }

  for (int64_t n = 0; n < w.T; ++n) {
    const int64_t t = w.reverse ? n : w.T - 1 - n;
    const float last_back = scale.unscale;
    scale.choose<T>(max_abs, external_max);
    if (n > 0) weights.template multiply<LOCAL>(tiling, place, double_buffer(n + 1), memory.sums);
    device::sync();
    if (TELEMETRY && n > 0) store_sums(p, w.reverse ? t - 1 : t + 1, memory.head);
    const uint32_t own = cells.step_back(p, place, memory, scale, last_back, step, active_rows, double_buffer(n));
    barrier.arrive(n + 1, own, cells.external_max(p, place, next, step.rows));
    cells.store(p, place, step, scale.unscale);
    if (TELEMETRY) cells.measure(p, place, step, scale.exponent_delta, memory.head);
    active_rows = step.rows;
    step = next;
    next = step_back_at(n + 2);
    cells.load_dy(p, place, next);
    cells.load(p, place, step, next);
    barrier.wait(n + 1, max_abs, external_max);
    if (TELEMETRY && device::thread() == 0 && place.slice == 0) {
      p.exponents[place.group * w.T + t] = max_abs == 0 && tiling.groups > 1 ? NOTHING : scale.exponent;
    }
  }
  weights.template multiply<LOCAL>(tiling, place, double_buffer(w.T + 1), memory.sums);
  device::sync();
  if (TELEMETRY) store_sums(p, w.reverse ? w.T - 1 : 0, memory.head);
  if (p.continues_to && device::thread() == 0 && place.slice == 0) {
    p.carried_state[2 * place.group] = scale.exponent;
    p.carried_state[2 * place.group + 1] = static_cast<int32_t>(max_abs);
  }
  const float unscale = p.continues_to ? 1.0f : scale.unscale;
  GK_UNROLL
  for (int i = 0; i < UNIT_ROWS; ++i) {
    const UnitRow unit_row(w, place, i, true);
    if (unit_row.there && unit_row.row < active_rows)
      cells.leave_loop(p, unit_row, i, sum_at(tiling, memory.sums, unit_row, 0), unscale);
  }
}

// The groups' statistics of one step in one scale, the least of them: what would be lost is nothing beside the largest.
// One call a (step, block).
GK_DEVICE void align_sums(const Backward& p, int64_t t, int block, int32_t* exponents) {
  const int groups = p.recurrence.tiling.groups, group = block / p.recurrence.tiling.slices;
  int least = NOTHING;
  for (int other = 0; other < groups; ++other) {
    const int exponent = p.exponents[other * p.recurrence.T + t];
    least = exponent < least ? exponent : least;
  }
  const int own = p.exponents[group * p.recurrence.T + t];
  if (block == 0) exponents[t] = least == NOTHING ? 0 : least;
  if (own == NOTHING || own == least) return;
  const double factor = ldexp(1.0, 2 * (least - own));
  for (int k = 0; k < NUM_NORMS; ++k) p.partials[(t * p.recurrence.tiling.num_blocks() + block) * NUM_SUMS + k] *= factor;
}

}  // namespace gk
