// The backward pass through time. A thread owns units (with a projection, also outputs): it turns dh and dc of its units into
// dG, meets the others, and multiplies all of dG by W_hh into its columns of the dh that the step before receives.
//
// A gradient that vanishes would leave float32 after some hundred steps, and with it every norm. So dh and dc are carried
// times a power of two, chosen anew at each step from the largest magnitude of the step after; what is written to memory is
// scaled back. Within float32's range that changes no bit, with or without statistics.
// Included inside namespace gk::GK_ISA after gates.h, once per instruction set; no include guard.

template <typename A>
struct Scale {
  static constexpr int MAX_EXPONENT = sizeof(A) == 4 ? MAX_EXPONENT_FLOAT : MAX_EXPONENT_DOUBLE;

  int64_t exponent = 0;
  A carried = 1, external_max = 1,
    unscale = 1;  // factors of what this scale's predecessor carried, of dy, and of what is written

  void choose(A max_abs, A max_abs_external) {
    int64_t wanted = exponent;
    if (!(max_abs > 0 && max_abs <= std::numeric_limits<A>::max())) {
      wanted = 0;
    } else if (const int power = std::ilogb(max_abs); power < -EXPONENT_RANGE || power > EXPONENT_RANGE) {
      wanted = std::max<int64_t>(0, std::min<int64_t>(exponent - power, exponent + MAX_EXPONENT));
    }
    if (max_abs_external != 0) {
      const bool finite = max_abs_external <= std::numeric_limits<A>::max();
      const int64_t most = finite ? std::min<int64_t>(MAX_EXPONENT, EXPONENT_RANGE - std::ilogb(max_abs_external)) : 0;
      wanted = std::max<int64_t>(0, std::min(wanted, most));
    }
    carried = std::ldexp(A(1), static_cast<int>(wanted - exponent));
    external_max = wanted <= MAX_EXPONENT ? std::ldexp(A(1), static_cast<int>(wanted)) : A(0);
    unscale = std::ldexp(A(1), static_cast<int>(-wanted));
    exponent = wanted;
  }
};

template <typename A>
static A largest_of(const A* p, int64_t count, A max_abs) {
  for (int64_t k = 0; k < count; ++k) max_abs = std::fabs(p[k]) > max_abs || p[k] != p[k] ? std::fabs(p[k]) : max_abs;
  return max_abs;
}

// The largest magnitude that step t receives from outside: dy, and dh_n and dc_n of the sequences that end there, which dh and
// dc still hold.
template <typename A>
static A max_abs_external(const LstmBackward<A>& p, int64_t t, int64_t active_rows) {
  const int64_t size = p.steps.size[t], joined = std::max<int64_t>(0, size - active_rows);
  A max_abs = p.dy ? largest_of(p.dy + p.steps.offset[t] * p.P, size * p.P, A(0)) : A(0);
  max_abs = largest_of(p.dh + active_rows * p.P, joined * p.P, max_abs);
  return largest_of(p.dc + active_rows * p.H, joined * p.H, max_abs);
}

// Sums of squares in float64. No float32 is too small or too large for it; of float64 there are three, see SquareSum.
template <typename A>
struct Squares;
template <>
struct Squares<float> {
  Vec<double> even{}, odd{};  // two sums, for one alone would wait for itself

  GK_INLINE void add_row(const float* values, int64_t count) {
    typedef float Half __attribute__((vector_size(sizeof(float) * WIDTH<double>)));
    int64_t j = 0;
    for (; j + 2 * WIDTH<double> <= count; j += 2 * WIDTH<double>) {
      Half halves[2];
      __builtin_memcpy(halves, values + j, sizeof(halves));
      const auto first = __builtin_convertvector(halves[0], Vec<double>),
                 second = __builtin_convertvector(halves[1], Vec<double>);
      even += first * first;
      odd += second * second;
    }
    for (; j < count; ++j) even[0] += static_cast<double>(values[j]) * static_cast<double>(values[j]);
  }
  GK_INLINE SquareSum total() const { return {sum<double>(even + odd)}; }
};
template <>
struct Squares<double> {
  Vec<double> ordinary{}, tiny{}, huge{};

  GK_INLINE void add_row(const double* values, int64_t count) {
    for (int64_t j = 0; j < count; j += WIDTH<double>) {
      const Vec<double> v = load_first(values + j, count - j), size = magnitude<double>(v), zero{};
      const Vec<double> up = size < SMALLEST_SQUARED ? v * SCALE : zero, down = size > LARGEST_SQUARED ? v * (1 / SCALE) : zero;
      const Vec<double> rest = size < SMALLEST_SQUARED ? zero : size > LARGEST_SQUARED ? zero : v;  // NaN among them
      ordinary += rest * rest;
      tiny += up * up;
      huge += down * down;
    }
  }
  GK_INLINE SquareSum total() const { return {sum<double>(ordinary), sum<double>(tiny), sum<double>(huge)}; }
};

// What one thread measures of one step, a row at a time, after the row has been computed and while it is in the first-level
// cache: beside the counters there would be no registers left for the formulas. Counters are vectors of -1 for every lane that
// counts.
template <typename A>
struct StepMeasure {
  typedef typename Lanes<A>::integer Integer;
  Squares<A> dh, dc, dh_recurrent;
  Integer counts[NUM_COUNTS] = {};
  Vec<A> forget{};
  int64_t empty = 0;  // lanes beyond the last unit, which are zeros: low, all of them

  // `count` units from `gates` on, the activated i; f, g and o follow H units apart.
  GK_INLINE void add_gates(const A* gates, int64_t H, int64_t count) {
    for (int64_t j = 0; j < count; j += WIDTH<A>) {
      const auto [i, f, g, o] = load_gates(gates + j, H, count - j);
      counts[0] += (Integer)(i < A(LOW_GATE));
      counts[1] += (Integer)(i > A(HIGH_GATE));
      counts[2] += (Integer)(f < A(LOW_GATE));
      counts[3] += (Integer)(f > A(HIGH_GATE));
      counts[4] += (Integer)(magnitude<A>(g) > A(HIGH_GATE));
      counts[5] += (Integer)(o < A(LOW_GATE));
      counts[6] += (Integer)(o > A(HIGH_GATE));
      forget += f;
      empty += std::max<int64_t>(0, WIDTH<A> - (count - j));
    }
  }
  void finish(StepSums& sums) const {
    sums.dh = dh.total();
    sums.dc = dc.total();
    sums.dh_recurrent = dh_recurrent.total();
    for (int c = 0; c < NUM_COUNTS; ++c) {
      int64_t total = c == 0 || c == 2 || c == 5 ? -empty : 0;
      for (int64_t lane = 0; lane < WIDTH<A>; ++lane) total -= counts[c][lane];
      sums.counts[c] = static_cast<double>(total);
    }
    for (int64_t lane = 0; lane < WIDTH<A>; ++lane) sums.forget += static_cast<double>(forget[lane]);
  }
};

// The total dh of a step: what is carried, and dy. `active_rows` rows have been carried; the others hold dh_n.
template <typename A>
static GK_INLINE Vec<A> total_dh(const LstmBackward<A>& p, const Scale<A>& scale, int64_t t, int64_t b, int64_t active_rows,
                                 int64_t j) {
  const int64_t count = p.P - j;
  Vec<A> total = load_first(p.dh + b * p.P + j, count) * (b < active_rows ? scale.carried : scale.external_max);
  if (p.dy) total += load_first(p.dy + (p.steps.offset[t] + b) * p.P + j, count) * scale.external_max;
  return total;
}

// The squares of the total dh of row b, and of what came to it from the step after.
template <typename A>
static GK_INLINE void measure_dh(const LstmBackward<A>& p, const A* total, int64_t b, int64_t active_rows, Share outputs,
                                 StepMeasure<A>& measure) {
  measure.dh.add_row(total, outputs.end - outputs.begin);
  if (b < active_rows) measure.dh_recurrent.add_row(p.dh + b * p.P + outputs.begin, outputs.end - outputs.begin);
}

// With a projection: the total dh of a step, and through W_hr the gradient dm of o tanh(c).
template <typename A, bool TELEMETRY>
static void project(const LstmBackward<A>& p, const Scale<A>& scale, int64_t t, int64_t active_rows, Share outputs,
                    StepMeasure<A>& measure) {
  for (int64_t b = 0; b < p.steps.size[t]; ++b) {
    for (int64_t j = outputs.begin; j < outputs.end; j += WIDTH<A>) {
      const Vec<A> total = total_dh(p, scale, t, b, active_rows, j);
      store_first(p.dh_scaled + b * p.P + j, total, p.P - j);
      store_first(p.dh_total + (p.steps.offset[t] + b) * p.P + j, total * scale.unscale, p.P - j);
    }
    if (TELEMETRY) measure_dh(p, p.dh_scaled + b * p.P + outputs.begin, b, active_rows, outputs, measure);
  }
}

// dG of one step, from dh (dm with a projection) and dc, which moves on to the step before. Returns the largest magnitude.
// row: with telemetry, two rows of this thread's own, for dh and dc.
template <typename A, bool TELEMETRY>
static A gates_backward(const LstmBackward<A>& p, const Scale<A>& scale, int64_t t, int64_t active_rows, Share units, A* scaled,
                        A* row, StepMeasure<A>& measure) {
  const int64_t H = p.H, first = p.steps.offset[t], last = p.steps.before[t] < 0 ? 0 : p.steps.offset[p.steps.before[t]];
  const int64_t rows_with_predecessor = p.steps.rows_with_predecessor(t), stride = 4 * H + PADDING;
  Vec<A> max_abs{};
  for (int64_t b = 0; b < p.steps.size[t]; ++b) {
    const A* gates = p.gates + (first + b) * 4 * H;
    const A* cells = p.cells + (first + b) * H;
    const A* previous = b < rows_with_predecessor ? p.cells + (last + b) * H : p.c0 + b * H;
    const A carried = b < active_rows ? scale.carried : scale.external_max;
    A* dgates = p.dgates + (first + b) * stride;
    for (int64_t j = units.begin; j < units.end; j += WIDTH<A>) {
      const int64_t count = H - j;
      const Gates<A> active = load_gates(gates + j, H, count);
      const Vec<A> m = hyperbolic_tangent<A>(load_first(cells + j, count));
      const Vec<A> dh = p.weight_hr ? load_first(p.dm + b * H + j, count) : total_dh(p, scale, t, b, active_rows, j);
      const Vec<A> dc_after = load_first(p.dc + b * H + j, count) * carried;
      const StepGradients<A> d = step_backward(dh, dc_after, active, m, load_first(previous + j, count));
      max_abs = higher_magnitude<A>(d.dc_next, higher_magnitude<A>(dh, max_abs));
      if (TELEMETRY) {
        store_first(row + j, dh, count);
        store_first(row + H + j, d.dc_next, count);
      }
      const auto& [di, df, dg, d_o] = d.dgates;
      const A unscale = scale.unscale;
      store_gates(dgates + j, {di * unscale, df * unscale, dg * unscale, d_o * unscale}, H, count);
      if (scale.exponent != 0) store_gates(scaled + b * stride + j, d.dgates, H, count);
      store_first(p.dc + b * H + j, d.dc, count);
      if (p.m) store_first(p.m + (first + b) * H + j, active.o * m, count);
    }
    if (TELEMETRY) {
      if (!p.weight_hr) measure_dh(p, row + units.begin, b, active_rows, units, measure);
      measure.dc.add_row(row + H + units.begin, units.end - units.begin);
      measure.add_gates(gates + units.begin, H, units.end - units.begin);
    }
  }
  return max<A>(max_abs);
}

// Rows [begin, end) of a carried state leave the loop: their scale is taken off.
template <typename A>
static void scale_back(A* state, int64_t columns, Share share, int64_t begin, int64_t end, A unscale) {
  if (unscale == 1) return;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t j = share.begin; j < share.end; ++j) state[b * columns + j] *= unscale;
  }
}

template <typename A, bool TELEMETRY>
static void backward_through_time(const LstmBackward<A>& p, int thread, int threads, Barrier& barrier) {
  const Steps& steps = p.steps;
  const int64_t H = p.H, P = p.P, T = steps.num_steps(), stride = 4 * H + PADDING;
  const Share units = share_of<A>(H, thread, threads), outputs = share_of<A>(P, thread, threads);
  pack_columns(p.weight_hh, P, 1, 4 * H, P, outputs, p.packed_hh);
  if (p.weight_hr) pack_columns(p.weight_hr, H, 1, P, H, units, p.packed_hr);
  Scale<A> scale;
  A max_abs = max_abs_external(p, steps.order[T - 1], 0);
  int64_t active_rows = 0;
  for (int64_t n = 0; n < T; ++n) {
    const int64_t t = steps.order[T - 1 - n], size = steps.size[t];
    if (size < active_rows) {
      scale_back(p.dh, P, outputs, size, active_rows, scale.unscale);
      scale_back(p.dc, H, units, size, active_rows, scale.unscale);
      active_rows = size;
    }
    // Scanning what comes in takes time, and is only needed where something has vanished.
    const bool scaling = n == 0 || scale.exponent != 0 || (max_abs > 0 && std::ilogb(max_abs) < -EXPONENT_RANGE);
    scale.choose(max_abs, scaling ? (n == 0 ? max_abs : max_abs_external(p, t, active_rows)) : A(0));
    if (scaling) barrier.wait(threads);  // nobody writes to dc before all have read it
    StepMeasure<A> measure;
    if (p.weight_hr) {
      project<A, TELEMETRY>(p, scale, t, active_rows, outputs, measure);
      barrier.wait(threads);
      multiply_columns(p.dh_scaled, P, p.packed_hr, P, size, H, units, p.dm);
    }
    A* scaled = p.dgates_scaled + n % 2 * steps.B * stride;
    A* seen = p.max_abs + n % 2 * threads;
    seen[thread] = gates_backward<A, TELEMETRY>(p, scale, t, active_rows, units, scaled, p.rows + thread * 2 * H, measure);
    if (TELEMETRY) measure.finish(p.sums[t * threads + thread]);
    if (TELEMETRY && thread == 0) p.exponent[t] = scale.exponent;
    barrier.wait(threads);
    max_abs = largest_of(seen, threads, A(0));
    const A* dg = scale.exponent != 0 ? scaled : p.dgates + steps.offset[t] * stride;
    multiply_columns(dg, stride, p.packed_hh, 4 * H, size, P, outputs, p.dh);
    active_rows = size;
  }
  scale_back(p.dh, P, outputs, 0, active_rows, scale.unscale);
  scale_back(p.dc, H, units, 0, active_rows, scale.unscale);
}

template <typename A>
static void lstm_backward(const LstmBackward<A>& p, bool telemetry, int thread, int threads, Barrier& barrier) {
  (telemetry ? backward_through_time<A, true> : backward_through_time<A, false>)(p, thread, threads, barrier);
}
