// The backward recurrence: one block owns `units` units of one group of batch rows. It forms their dG, which all blocks of the group
// then multiply by their columns of W_hh.
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
  double* partials;    // (T, programs, NUM_SUMS); null without telemetry
  int32_t* exponents;  // (groups, T) of each step's scale; null without telemetry
  // A recurrence may be cut into spans of steps of B rows, a launch each. (groups, 2) or longer: the exponent of the scale in which
  // dh and dc pass from one to the next, and the code of the largest magnitude, so that bits are those of one recurrence.
  int32_t* carry;
  bool resumes, pauses;  // dh and dc are so passed on entry, on return
};

// Largest magnitudes from 2^(MIDDLE - SPAN) to 2^(MIDDLE + SPAN) are left as they are, others are brought to 2^MIDDLE. A
// bfloat16 has float32's exponents. Half has five bits: a step may grow a gradient 500-fold until it is infinite, and what is a
// millionth of the largest keeps half of its digits.
template <typename T>
struct Range {
  static constexpr int MIDDLE = 0, SPAN = EXPONENT_RANGE;
};
template <>
struct Range<Half> {
  static constexpr int MIDDLE = 4, SPAN = 3;
};
constexpr int LARGEST_EXPONENT = 126;  // whose power of two, and its reciprocal, float32 still holds

struct Scale {
  int exponent = 0, jump = 0;                 // jump: from the scale before
  float carried = 1, incoming = 1, back = 1;  // factors of what the scale before carried, of dy, and of what is written

  // From the codes of the largest magnitude of the step after, in its scale, and of what comes in.
  template <typename T>
  GK_DEVICE void choose(uint32_t largest, uint32_t largest_incoming) {
    constexpr int SPAN = Range<T>::SPAN, MIDDLE = Range<T>::MIDDLE;
    const int power = static_cast<int>(largest) - ONE - MIDDLE, before = exponent;
    if (largest == 0 || largest == NOT_FINITE) {
      exponent = 0;
    } else if (power < -SPAN || power > SPAN) {
      exponent -= power < -LARGEST_EXPONENT ? -LARGEST_EXPONENT : power;
    }
    if (largest_incoming != 0) {
      const int most = largest_incoming == NOT_FINITE ? 0 : MIDDLE + SPAN + ONE - static_cast<int>(largest_incoming);
      exponent = exponent < most ? exponent : most;
      exponent = exponent < LARGEST_EXPONENT ? exponent : LARGEST_EXPONENT;
    }
    exponent = exponent > -LARGEST_EXPONENT ? exponent : -LARGEST_EXPONENT;
    jump = exponent - before;
    carried = device::power_of_two(jump);
    incoming = exponent <= LARGEST_EXPONENT ? device::power_of_two(exponent) : 0.0f;
    back = device::power_of_two(-exponent);
  }
};

// A thread's cells: what is carried, what a step reads, what it leaves.
template <typename T, int CELLS>
struct BackwardCells {
  float dh[CELLS], dc[CELLS];  // dh: of the sequence's end, until the cell is alive
  float gates[CELLS][4], c[CELLS], c_before[CELLS], dy[CELLS], dy_next[CELLS];
  float total[CELLS], total_dc[CELLS], recurrent[CELLS], dg[CELLS][4];

  GK_DEVICE void load_dy(const Backward& p, const Place& place, const Step& next) {
    GK_UNROLL
    for (int i = 0; i < CELLS; ++i) {
      const Cell cell(p.recurrence, place, i, true);
      dy[i] = dy_next[i];
      dy_next[i] = 0;
      if (!p.dy || !cell.there || cell.row >= next.rows) continue;
      dy_next[i] = device::widen(T{p.dy[(next.first + cell.row) * p.recurrence.H + cell.unit]});
    }
  }

  GK_DEVICE void load(const Backward& p, const Place& place, const Step& step, const Step& earlier) {
    const int64_t H = p.recurrence.H;
    GK_UNROLL
    for (int i = 0; i < CELLS; ++i) {
      const Cell cell(p.recurrence, place, i, true);
      if (!cell.there || cell.row >= step.rows) continue;
      const int64_t row = step.first + cell.row;
      GK_UNROLL
      for (int gate = 0; gate < 4; ++gate) gates[i][gate] = p.gates[(row * 4 + gate) * H + cell.unit];
      c[i] = p.cells[row * H + cell.unit];
      const bool continued = cell.row < earlier.rows;
      c_before[i] = (continued ? p.cells + (earlier.first + cell.row) * H : p.c0 + cell.row * H)[cell.unit];
    }
  }

  // The largest magnitude that `next` receives from outside: dy, and dh_n and dc_n of the rows that it is the first to see.
  GK_DEVICE uint32_t incoming(const Backward& p, const Place& place, const Step& next, int64_t live) const {
    uint32_t result = 0;
    GK_UNROLL
    for (int i = 0; i < CELLS; ++i) {
      const Cell cell(p.recurrence, place, i, true);
      if (!cell.there || cell.row >= next.rows) continue;
      result = larger(result, dy_next[i]);
      if (cell.row >= live) result = larger(larger(result, dh[i]), dc[i]);
    }
    return result;
  }

  // NaN above infinity above all numbers: magnitudes compare as the integers that their bits are.
  GK_DEVICE static uint32_t larger(uint32_t bits, float v) {
    const uint32_t other = device::bits_of(v) & 0x7fffffffu;
    return other > bits ? other : bits;
  }

  // dG of one step, from dh and dc, which moves on to the step before. Returns the largest magnitude of both.
  GK_DEVICE uint32_t step_back(const Backward& p, const Place& place, const Memory& memory, const Scale& scale, float last_back,
                               const Step& step, int64_t live, Words* exchange) {
    uint32_t largest = 0;
    GK_UNROLL
    for (int i = 0; i < CELLS; ++i) {
      const Cell cell(p.recurrence, place, i, true);
      if (!cell.there) continue;
      const bool carried = cell.row < live;
      const float before = carried ? sum_at(p.recurrence.tiling, memory.sums, cell, 0) : dh[i];
      if (cell.row >= step.rows) {
        if (carried) leave(p, cell, i, before, last_back);
        continue;
      }
      const float factor = carried ? scale.carried : scale.incoming;
      recurrent[i] = carried ? before : 0.0f;
      const float dh_total = before * factor + dy[i] * scale.incoming;
      constexpr float LOW = LOW_GATE, HIGH = HIGH_GATE;
      const float in = gates[i][0], f = gates[i][1], g = gates[i][2], o = gates[i][3];
      const float m = device::hyperbolic_tangent(c[i]);
      const float dc_total = dc[i] * factor + dh_total * o * (1.0f - m * m);
      largest = larger(larger(largest, dh_total), dc_total);
      total[i] = dh_total;
      total_dc[i] = dc_total;
      dg[i][0] = dc_total * g * (in * (1.0f - in));
      dg[i][1] = dc_total * c_before[i] * (f * (1.0f - f));
      dg[i][2] = dc_total * in * (1.0f - g * g);
      dg[i][3] = dh_total * m * (o * (1.0f - o));
      dc[i] = dc_total * f;
      T v[4];
      GK_UNROLL
      for (int gate = 0; gate < 4; ++gate) device::narrow(dg[i][gate], v[gate]);
      const Pairs pairs = {v[0].bits | uint32_t{v[1].bits} << 16, v[2].bits | uint32_t{v[3].bits} << 16};
      *reinterpret_cast<Pairs*>(reinterpret_cast<uint16_t*>(exchange) + cell.exchange) = pairs;
    }
    return largest;
  }

  // What comes from the step after lies where the product would have left it.
  GK_DEVICE void resume(const Backward& p, const Place& place, float* sums) const {
    const Tiling& tiling = p.recurrence.tiling;
    GK_UNROLL
    for (int i = 0; i < CELLS; ++i) {
      const Cell cell(p.recurrence, place, i, true);
      for (int k = 0; cell.there && k < tiling.k_warps; ++k) {
        sums[k * (tiling.sum_bytes / (4 * tiling.k_warps)) + cell.sums] = k == 0 ? dh[i] : 0.0f;
      }
    }
  }

  // A row leaves the time loop: what it carries is the gradient of its initial state.
  GK_DEVICE void leave(const Backward& p, const Cell& cell, int i, float before, float back) const {
    p.dh[cell.row * p.recurrence.H + cell.unit] = before * back;
    p.dc[cell.row * p.recurrence.H + cell.unit] = dc[i] * back;
  }

  GK_DEVICE void store(const Backward& p, const Place& place, const Step& step, float back) const {
    GK_UNROLL
    for (int i = 0; i < CELLS; ++i) {
      const Cell cell(p.recurrence, place, i, true);
      if (!cell.there || cell.row >= step.rows) continue;
      GK_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        T v;
        device::narrow(dg[i][gate] * back, v);
        p.dgates[((step.first + cell.row) * 4 + gate) * p.recurrence.H + cell.unit] = v.bits;
      }
    }
  }

  // The sums of this warp over its cells of one step, into the head. Squares in float64: no float32 is too small for it, nor is
  // what has come through W_hh, in its own scale, beside a dy that is 1e150 times as large.
  GK_DEVICE void measure(const Backward& p, const Place& place, const Step& step, int jump, Head* head) const {
    double squares[3] = {0, 0, 0};
    float forget = 0;
    uint32_t counts[2] = {0, 0};  // a byte a count: a warp has at most 32 x 4 cells
    GK_UNROLL
    for (int i = 0; i < CELLS; ++i) {
      const Cell cell(p.recurrence, place, i, true);
      if (!cell.there || cell.row >= step.rows) continue;
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
    squares[2] *= ldexp(1.0, 2 * jump);
    GK_UNROLL
    for (int k = 0; k < NUM_NORMS; ++k) head->squares[k][place.warp] = squares[k];
    head->forget[place.warp] = forget;
    GK_UNROLL
    for (int k = 0; k < 2; ++k) head->counts[k][place.warp] = counts[k];
  }
};

// The block's sums of step t: one store by each of NUM_SUMS threads, in the order of the warps.
GK_DEVICE void store_sums(const Backward& p, int64_t t, const Head* head) {
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
  p.partials[(t * p.recurrence.tiling.programs() + device::block()) * NUM_SUMS + k] = total;
}

template <typename T, int M, bool LOCAL, bool TELEMETRY>
GK_DEVICE void recurrence_backward(const Backward& p) {
  constexpr int CELLS = LOCAL ? CELLS_LOCAL : CELLS_GRID;
  const Recurrence& w = p.recurrence;
  const Tiling& tiling = w.tiling;
  const Place place(tiling);
  const Memory memory(tiling);
  const Meeting<LOCAL> meeting{w, place, memory.head};
  const Stationary<T, M, 1, RESIDENT_BWD> weights(tiling, place, memory, BackwardWeights{p.weight_hh, w.H});
  const auto exchange = [&](int64_t round) {
    const int64_t buffer = round % 2;
    return LOCAL ? memory.exchange + buffer * tiling.exchange_words
                 : w.exchange + (buffer * tiling.groups + place.group) * tiling.exchange_words;
  };
  if (LOCAL) {
    for (int i = device::thread(); i < 2 * tiling.exchange_words; i += THREADS) memory.exchange[i] = {0, 0, 0, 0};
  }
  const auto step_back_at = [&](int64_t n) { return step_at(w, w.reverse ? n : w.T - 1 - n); };

  BackwardCells<T, CELLS> cells;
  GK_UNROLL
  for (int i = 0; i < CELLS; ++i) {
    const Cell cell(w, place, i, true);
    cells.dh[i] = cell.there ? p.dh[cell.row * w.H + cell.unit] : 0.0f;
    cells.dc[i] = cell.there ? p.dc[cell.row * w.H + cell.unit] : 0.0f;
    cells.dy_next[i] = 0;
  }
  Step step = step_back_at(0), next = step_back_at(1);
  int64_t live = p.resumes ? step.rows : 0;
  Scale scale;
  uint32_t largest, incoming;
  cells.load_dy(p, place, step);
  const uint32_t first = cells.incoming(p, place, step, live);
  meeting.arrive(0, first, first);
  cells.load_dy(p, place, next);
  cells.load(p, place, step, next);
  meeting.wait(0, largest, incoming);
  if (p.resumes) {
    scale.exponent = p.carry[2 * place.group];
    largest = static_cast<uint32_t>(p.carry[2 * place.group + 1]);
    cells.resume(p, place, memory.sums);
  }

  for (int64_t n = 0; n < w.T; ++n) {
    const int64_t t = w.reverse ? n : w.T - 1 - n;
    const float last_back = scale.back;
    scale.choose<T>(largest, incoming);
    if (n > 0) weights.template multiply<LOCAL>(tiling, place, exchange(n + 1), memory.sums);
    device::sync();
    if (TELEMETRY && n > 0) store_sums(p, w.reverse ? t - 1 : t + 1, memory.head);
    const uint32_t own = cells.step_back(p, place, memory, scale, last_back, step, live, exchange(n));
    meeting.arrive(n + 1, own, cells.incoming(p, place, next, step.rows));
    cells.store(p, place, step, scale.back);
    if (TELEMETRY) cells.measure(p, place, step, scale.jump, memory.head);
    live = step.rows;
    step = next;
    next = step_back_at(n + 2);
    cells.load_dy(p, place, next);
    cells.load(p, place, step, next);
    meeting.wait(n + 1, largest, incoming);
    if (TELEMETRY && device::thread() == 0 && place.slice == 0) {
      p.exponents[place.group * w.T + t] = largest == 0 && tiling.groups > 1 ? NOTHING : scale.exponent;
    }
  }
  weights.template multiply<LOCAL>(tiling, place, exchange(w.T + 1), memory.sums);
  device::sync();
  if (TELEMETRY) store_sums(p, w.reverse ? w.T - 1 : 0, memory.head);
  if (p.pauses && device::thread() == 0 && place.slice == 0) {
    p.carry[2 * place.group] = scale.exponent;
    p.carry[2 * place.group + 1] = static_cast<int32_t>(largest);
  }
  const float back = p.pauses ? 1.0f : scale.back;
  GK_UNROLL
  for (int i = 0; i < CELLS; ++i) {
    const Cell cell(w, place, i, true);
    if (cell.there && cell.row < live) cells.leave(p, cell, i, sum_at(tiling, memory.sums, cell, 0), back);
  }
}

// The groups' statistics of one step in one scale, the least of them: what would be lost is nothing beside the largest.
// One call a (step, program).
GK_DEVICE void align_sums(const Backward& p, int64_t t, int program, int32_t* exponents) {
  const int groups = p.recurrence.tiling.groups, group = program / p.recurrence.tiling.slices;
  int least = NOTHING;
  for (int other = 0; other < groups; ++other) {
    const int exponent = p.exponents[other * p.recurrence.T + t];
    least = exponent < least ? exponent : least;
  }
  const int own = p.exponents[group * p.recurrence.T + t];
  if (program == 0) exponents[t] = least == NOTHING ? 0 : least;
  if (own == NOTHING || own == least) return;
  const double factor = ldexp(1.0, 2 * (least - own));
  for (int k = 0; k < NUM_NORMS; ++k) p.partials[(t * p.recurrence.tiling.programs() + program) * NUM_SUMS + k] *= factor;
}

}  // namespace gk
