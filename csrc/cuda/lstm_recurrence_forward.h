// The forward recurrence: one block owns `units` units of one group of batch rows, all four gates of them, for all steps.
#pragma once

#include "lstm_recurrence.h"

namespace gk {

struct Forward {
  Recurrence recurrence;
  const uint16_t *weight_hh, *h0;
  const float* c0;
  float *gates, *cells;  // gates: preactivations of x with biases on entry, activated i f g o on return
  uint16_t* y;
};

GK_DEVICE float sigmoid(float x) { return device::reciprocal(1.0f + device::exponential(-x)); }

// A thread's cells: state, what the next step takes, and what the last one left to be stored.
template <int UNIT_ROWS>
struct ForwardCells {
  float c[UNIT_ROWS], x[UNIT_ROWS][4];
  uint16_t h[UNIT_ROWS];

  GK_DEVICE void load(const Forward& p, const ThreadCoordinates& place, const Step& step) {
    GK_UNROLL
    for (int i = 0; i < UNIT_ROWS; ++i) {
      const UnitRow unit_row(p.recurrence, place, i, false);
      if (!unit_row.there || unit_row.row >= step.rows) continue;
      const float* source = p.gates + (step.first + unit_row.row) * 4 * p.recurrence.H + unit_row.unit;
      GK_UNROLL
      for (int gate = 0; gate < 4; ++gate) x[i][gate] = source[gate * p.recurrence.H];
    }
  }

  GK_DEVICE void store(const Forward& p, const ThreadCoordinates& place, const Step& step) const {
    GK_UNROLL
    for (int i = 0; i < UNIT_ROWS; ++i) {
      const UnitRow unit_row(p.recurrence, place, i, false);
      if (!unit_row.there || unit_row.row >= step.rows) continue;
      const int64_t row = step.first + unit_row.row;
      GK_UNROLL
      for (int gate = 0; gate < 4; ++gate) p.gates[(row * 4 + gate) * p.recurrence.H + unit_row.unit] = x[i][gate];
      p.cells[row * p.recurrence.H + unit_row.unit] = c[i];
      p.y[row * p.recurrence.H + unit_row.unit] = h[i];
    }
  }
};

// One step of one cell: x becomes the activated gates, c and h the new state.
template <typename T>
GK_DEVICE void forward_cell(const Tiling& tiling, const float* sums, const UnitRow& unit_row, float (&x)[4], float& c,
                            uint16_t& h) {
  GK_UNROLL
  for (int gate = 0; gate < 4; ++gate) x[gate] += sum_at(tiling, sums, unit_row, 8 * gate);
  x[0] = sigmoid(x[0]);
  x[1] = sigmoid(x[1]);
  x[2] = device::hyperbolic_tangent(x[2]);
  x[3] = sigmoid(x[3]);
  c = x[1] * c + x[0] * x[2];
  T out;
  device::downcast(x[3] * device::hyperbolic_tangent(c), out);
  h = out.bits;
}

// Rows that are not alive at a step keep their state: h0 and c0 before they begin (reverse), the last one after they end.
template <typename T, int M, bool LOCAL>
GK_DEVICE void recurrence_forward(const Forward& p) {
  constexpr int UNIT_ROWS = LOCAL ? CELLS_LOCAL : CELLS_GRID, TURNS = LOCAL ? 2 : 1;
  const Recurrence& w = p.recurrence;
  const Tiling& tiling = w.tiling;
  const ThreadCoordinates place(tiling);
  const Memory memory(tiling);
  const GridBarrier<LOCAL> barrier{w, place, memory.head};
  const bool aligned = w.H % 8 == 0 && reinterpret_cast<uintptr_t>(p.weight_hh) % 16 == 0;
  const Stationary<T, M, TURNS, RESIDENT_FWD> weights(tiling, place, memory, ForwardWeights{p.weight_hh, w.H, aligned});
  const auto double_buffer = [&](int64_t round) {
    const int64_t buffer = round % 2;
    return LOCAL ? memory.double_buffer + buffer * tiling.buffer_vectors
                 : w.double_buffer + (buffer * tiling.groups + place.group) * tiling.buffer_vectors;
  };
  if (LOCAL) {
    for (int i = device::thread(); i < 2 * tiling.buffer_vectors; i += THREADS) memory.double_buffer[i] = {0, 0, 0, 0};
    device::sync();
  }

  ForwardCells<UNIT_ROWS> cells;
  Step step = step_at(w, w.reverse ? w.T - 1 : 0);
  GK_UNROLL
  for (int i = 0; i < UNIT_ROWS; ++i) {
    const UnitRow unit_row(w, place, i, false);
    cells.c[i] = unit_row.there ? p.c0[unit_row.row * w.H + unit_row.unit] : 0.0f;
    cells.h[i] = unit_row.there ? p.h0[unit_row.row * w.H + unit_row.unit] : 0;
    if (unit_row.there) reinterpret_cast<uint16_t*>(double_buffer(0))[unit_row.double_buffer] = cells.h[i];
  }
  uint32_t unused[2];
  barrier.arrive(0);
  cells.load(p, place, step);
  barrier.wait(0, unused[0], unused[1]);

  for (int64_t n = 0; n < w.T; ++n) {
    const Step next = step_at(w, w.reverse ? w.T - 2 - n : n + 1);
    weights.template multiply<LOCAL>(tiling, place, double_buffer(n), memory.sums);
    device::sync();
    GK_UNROLL
    for (int i = 0; i < UNIT_ROWS; ++i) {
      const UnitRow unit_row(w, place, i, false);
      if (!unit_row.there) continue;
      if (unit_row.row < step.rows) forward_cell<T>(tiling, memory.sums, unit_row, cells.x[i], cells.c[i], cells.h[i]);
      reinterpret_cast<uint16_t*>(double_buffer(n + 1))[unit_row.double_buffer] = cells.h[i];
    }
    if (n + 1 < w.T) barrier.arrive(n + 1);
    cells.store(p, place, step);
    step = next;
    if (n + 1 == w.T) break;
    cells.load(p, place, step);
    barrier.wait(n + 1, unused[0], unused[1]);
  }
}

}  // namespace gk
