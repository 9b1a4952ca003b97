// The forward pass through time. A thread owns units: it computes their gates, cells and outputs at every step, and meets the
// others once a step (twice with a projection, whose columns it owns likewise).
// Included inside namespace gk::GK_ISA after gates.h, once per instruction set; no include guard.

// Blocks of WIDTH units, each with its four gates side by side: packed[block][k][gate][lane] = weight_hh[gate, unit][k].
template <typename A>
static void pack_gates(const A* weight_hh, int64_t H, int64_t P, Share share, A* packed) {
  for (int64_t j = share.begin; j < share.end; j += WIDTH<A>) {
    A* block = packed + j * 4 * P;
    const int64_t count = std::min(WIDTH<A>, H - j);
    for (int64_t gate = 0; gate < 4; ++gate) {
      const A* rows = weight_hh + (gate * H + j) * P;
      for (int64_t k = 0; k < P; ++k) {
        A* target = block + (4 * k + gate) * WIDTH<A>;
        for (int64_t lane = 0; lane < WIDTH<A>; ++lane) target[lane] = lane < count ? rows[lane * P + k] : A(0);
      }
    }
  }
}

// One step of ROWS rows, from row `row` of all rows on, and of the units from j on. h, c: the state before, H or P wide.
template <typename A, int ROWS>
static GK_INLINE void gates_tile(const LstmForward<A>& p, const A* h, const A* c, int64_t row, int64_t j, A* out) {
  const int64_t count = p.H - j, H = p.H;
  Vec<A> sums[ROWS][4];
  A* gates = p.gates + row * 4 * H + j;
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) sums[r][gate] = load_first(gates + (4 * r + gate) * H, count);
  }
  multiply<A>(h, p.P, p.packed_hh + j * 4 * p.P, WIDTH<A>, 4 * WIDTH<A>, p.P, sums);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    const Gates<A> active = activate<A>(sums[r]);
    const Vec<A> cell = active.f * load_first(c + r * H + j, count) + active.i * active.g;
    store_gates(gates + 4 * r * H, active, H, count);
    store_first(p.cells + (row + r) * H + j, cell, count);
    store_first(out + r * H + j, active.o * hyperbolic_tangent<A>(cell), count);
  }
}

template <typename A>
static void lstm_forward(const LstmForward<A>& p, int thread, int threads, Barrier& barrier) {
  const Steps& steps = p.steps;
  const Share units = share_of<A>(p.H, thread, threads), outputs = share_of<A>(p.P, thread, threads);
  pack_gates(p.weight_hh, p.H, p.P, units, p.packed_hh);
  if (p.weight_hr) pack_columns(p.weight_hr, 1, p.H, p.H, p.P, outputs, p.packed_hr);
  for (const int64_t t : steps.order) {
    const int64_t first = steps.offset[t], rows_with_predecessor = steps.rows_with_predecessor(t);
    const auto rows_of = [&](int64_t begin, int64_t end, const A* h, const A* c) {
      for (int64_t j = units.begin; j < units.end; j += WIDTH<A>) {
        for_each_tile(end - begin, [&](auto rows, int64_t b0) {
          const int64_t b = begin + b0;
          A* out = p.weight_hr ? p.m + b * p.H : p.y + (first + b) * p.H;
          gates_tile<A, rows()>(p, h + b * p.P, c + b * p.H, first + b, j, out);
        });
      }
    };
    if (rows_with_predecessor > 0) {
      const int64_t last = steps.offset[steps.before[t]];
      rows_of(0, rows_with_predecessor, p.y + last * p.P, p.cells + last * p.H);
    }
    if (rows_with_predecessor < steps.size[t]) rows_of(rows_with_predecessor, steps.size[t], p.h0, p.c0);
    barrier.wait(threads);
    if (!p.weight_hr) continue;
    multiply_columns(p.m, p.H, p.packed_hr, p.H, steps.size[t], p.P, outputs, p.y + first * p.P);
    barrier.wait(threads);
  }
}
