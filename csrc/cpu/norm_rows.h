// Rows of LayerNorm (Ba, Kiros and Hinton 2016), shared by layer_norm and add_layer_norm.
//   x_hat = (x - mean) rstd,  y = x_hat weight + bias
//   g = dy weight,  dx = rstd (g - sum(g) / N - x_hat sum(g x_hat) / N) [+ dresidual],  dweight = sum_M(dy x_hat),  dbias =
//   sum_M(dy)
// Included inside namespace gk::GK_ISA after measure.h, once per instruction set; no include guard.
// One program owns a contiguous range of rows and walks them ROWS at a time, so that the column accumulators are read
// and written once for ROWS rows. weight, bias and the accumulators are float (double for double tensors).
// TX is the dtype of x and dx, TY that of y and dy; they differ only for a float32 residual stream.

constexpr int64_t ROWS = GK_VECTOR_BYTES == 64 ? 2 : 1;

// One row forward: x[0 .. N) -> y, mean, rstd. The mean is corrected by the mean of x - mean, so that a large offset costs
// nothing; the variance is the second pass over x - mean.
template <typename TX, typename TY, int R>
static GK_INLINE void norm_fwd_rows(const TX* x, TY* y, const Acc<TX>* weight, const Acc<TX>* bias, Acc<TX> eps, int64_t N,
                                    Acc<TX>* mean, Acc<TX>* rstd) {
  using A = Acc<TX>;
  const int64_t whole = N - N % STEP<TX>, tail = N - whole;
  Pair<A> total[R]{}, first[R]{}, second[R]{}, centre[R], shift[R], scale[R];
  for (int64_t k = 0; k < whole; k += STEP<TX>) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) total[r] += load_pair(x + r * N + k);
  }
  for (int r = 0; r < R; ++r) {
    if (tail) total[r] += load_tail(x + r * N + whole, tail);
    centre[r] = pair<A>(sum<A>(total[r]) / A(N));
  }
  for (int64_t k = 0; k < whole; k += STEP<TX>) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const Pair<A> d = load_pair(x + r * N + k) - centre[r];
      first[r] += d;
      second[r] += d * d;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t k = whole; k < N; ++k) {
      const A d = static_cast<A>(x[r * N + k]) - centre[r].a[0];
      first[r].a[0] += d;
      second[r].a[0] += d * d;
    }
    const A correction = sum<A>(first[r]) / A(N);
    const A variance = sum<A>(second[r]) / A(N) - correction * correction;
    rstd[r] = A(1) / std::sqrt((variance > 0 ? variance : variance - variance) + eps);
    mean[r] = centre[r].a[0] + correction;
    shift[r] = pair<A>(correction);
    scale[r] = pair<A>(rstd[r]);
  }
  for (int64_t k = 0; k < whole; k += STEP<TX>) {
    const Pair<A> w = load_pair(weight + k), b = load_pair(bias + k);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      store_pair(y + r * N + k, ((load_pair(x + r * N + k) - centre[r]) - shift[r]) * scale[r] * w + b);
  }
  if (tail) {
    const Pair<A> w = load_tail(weight + whole, tail), b = load_tail(bias + whole, tail);
    for (int r = 0; r < R; ++r) {
      const Pair<A> x_hat = ((load_tail(x + r * N + whole, tail) - centre[r]) - shift[r]) * scale[r];
      store_tail(y + r * N + whole, x_hat * w + b, tail);
    }
  }
}

template <typename TX, typename TY>
struct NormMeasures {
  Measure<TY> dy;
  Measure<TX> dresidual, dx;
};

// The sums over columns of ROWS rows: adds to dweight, dbias and `measure`, returns the row means of g and g x_hat.
template <typename TX, typename TY, int R, bool TELEMETRY, bool COLUMNS>
static GK_INLINE void norm_bwd_sums(const TY* dy_ptr, const TX* x_ptr, const Acc<TX>* weight, const Pair<Acc<TX>>* mean,
                                    const Pair<Acc<TX>>* rstd, int64_t N, const NormGradients<TX>& out, Measure<TY>& measure,
                                    Pair<Acc<TX>>* mean_g, Pair<Acc<TX>>* mean_gx) {
  using A = Acc<TX>;
  const int64_t whole = N - N % STEP<TX>, tail = N - whole;
  Pair<A> sum_g[R]{}, sum_gx[R]{};
  Measure<TY> local = measure;
  for (int64_t k = 0; k < whole; k += STEP<TX>) {
    const Pair<A> w = load_pair(weight + k);
    Pair<A> column_dy{}, column_dyx{};
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const Pair<A> dy = load_pair(dy_ptr + r * N + k);
      const Pair<A> x_hat = (load_pair(x_ptr + r * N + k) - mean[r]) * rstd[r];
      const Pair<A> g = dy * w;
      sum_g[r] += g;
      sum_gx[r] += g * x_hat;
      if (COLUMNS) {
        column_dy += dy;
        column_dyx += dy * x_hat;
      }
      if (TELEMETRY) add(local, dy_ptr + r * N + k);
    }
    if (COLUMNS) {
      store_pair(out.dweight + k, load_pair(out.dweight + k) + column_dyx);
      store_pair(out.dbias + k, load_pair(out.dbias + k) + column_dy);
    }
  }
  for (int r = 0; r < R; ++r) {
    if (tail) {
      const Pair<A> dy = load_tail(dy_ptr + r * N + whole, tail);
      const Pair<A> x_hat = (load_tail(x_ptr + r * N + whole, tail) - mean[r]) * rstd[r];
      const Pair<A> g = dy * load_tail(weight + whole, tail);
      sum_g[r] += g;  // the lanes beyond the row hold dy = 0
      sum_gx[r] += g * x_hat;
      if (COLUMNS) {
        store_tail(out.dweight + whole, load_tail(out.dweight + whole, tail) + dy * x_hat, tail);
        store_tail(out.dbias + whole, load_tail(out.dbias + whole, tail) + dy, tail);
      }
      if (TELEMETRY) add_tail(local, dy_ptr + r * N + whole, tail);
    }
    mean_g[r] = pair<A>(sum<A>(sum_g[r]) / A(N));
    mean_gx[r] = pair<A>(sum<A>(sum_gx[r]) / A(N));
  }
  measure = local;
}

template <typename TX, typename TY, int R, bool TELEMETRY, bool RESIDUAL, bool COLUMNS>
static GK_INLINE void norm_bwd_rows(const NormBackward<TX, TY>& p, int64_t row, const NormGradients<TX>& out,
                                    NormMeasures<TX, TY>& measure) {
  using A = Acc<TX>;
  const int64_t N = p.N, whole = N - N % STEP<TX>, tail = N - whole;
  const TY* dy_ptr = p.dy + row * N;
  const TX *x_ptr = p.x + row * N, *dresidual_ptr = RESIDUAL ? p.dresidual + row * N : nullptr;
  TX* dx_ptr = p.dx + row * N;
  Pair<A> mean[R], rstd[R], mean_g[R], mean_gx[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = pair<A>(p.mean[row + r]);
    rstd[r] = pair<A>(p.rstd[row + r]);
  }
  norm_bwd_sums<TX, TY, R, TELEMETRY, COLUMNS>(dy_ptr, x_ptr, p.weight, mean, rstd, N, out, measure.dy, mean_g, mean_gx);
  Measure<TX> measure_residual = measure.dresidual, measure_dx = measure.dx;
  const auto gradient = [&](int r, Pair<A> dy, Pair<A> x, Pair<A> w) __attribute__((always_inline)) {
    const Pair<A> x_hat = (x - mean[r]) * rstd[r];
    return rstd[r] * ((dy * w - mean_g[r]) - x_hat * mean_gx[r]);
  };
  for (int64_t k = 0; k < whole; k += STEP<TX>) {
    const Pair<A> w = load_pair(p.weight + k);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * N + k;
      Pair<A> dx = gradient(r, load_pair(dy_ptr + at), load_pair(x_ptr + at), w);
      if (RESIDUAL) {
        dx += load_pair(dresidual_ptr + at);
        if (TELEMETRY) add(measure_residual, dresidual_ptr + at);
      }
      if (p.dx_narrow) store_pair(p.dx_narrow + row * N + at, dx);
      store_pair(dx_ptr + at, dx);
      if (TELEMETRY) add(measure_dx, dx_ptr + at);
    }
  }
  if (tail) {
    const Pair<A> w = load_tail(p.weight + whole, tail);
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * N + whole;
      Pair<A> dx = gradient(r, load_tail(dy_ptr + at, tail), load_tail(x_ptr + at, tail), w);
      if (RESIDUAL) {
        dx += load_tail(dresidual_ptr + at, tail);
        if (TELEMETRY) add_tail(measure_residual, dresidual_ptr + at, tail);
      }
      if (p.dx_narrow) store_tail(p.dx_narrow + row * N + at, dx, tail);
      store_tail(dx_ptr + at, dx, tail);
      if (TELEMETRY) add_tail(measure_dx, dx_ptr + at, tail);
    }
  }
  measure.dresidual = measure_residual;
  measure.dx = measure_dx;
}

// The rows [first, last), between two folds.
template <typename TX, typename TY, bool TELEMETRY, bool RESIDUAL, bool COLUMNS>
static void norm_bwd_block(const NormBackward<TX, TY>& p, int64_t first, int64_t last, const NormGradients<TX>& out) {
  NormMeasures<TX, TY> measure;
  int64_t row = first;
  for (; row + ROWS <= last; row += ROWS) norm_bwd_rows<TX, TY, ROWS, TELEMETRY, RESIDUAL, COLUMNS>(p, row, out, measure);
  for (; row < last; ++row) norm_bwd_rows<TX, TY, 1, TELEMETRY, RESIDUAL, COLUMNS>(p, row, out, measure);
  if (TELEMETRY) {
    const int64_t offset = first * p.N, count = (last - first) * p.N;
    fold(measure.dy, p.dy + offset, count, out.cells[0]);
    if (RESIDUAL) fold(measure.dresidual, p.dresidual + offset, count, out.cells[1]);
    fold(measure.dx, p.dx + offset, count, out.cells[2]);
  }
}

template <typename TX, typename TY, bool TELEMETRY, bool RESIDUAL, bool COLUMNS>
static void norm_bwd_range(const NormBackward<TX, TY>& p, int64_t begin, int64_t end, const NormGradients<TX>& out) {
  // Rows too long for one sum in float are measured behind the loop, while they are in the second-level cache.
  const bool long_rows = ROWS * p.N > 2 * FOLD;
  const int64_t block = std::max(ROWS, FOLD / std::max<int64_t>(1, p.N) / ROWS * ROWS);  // rows between two folds
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = std::min(end, first + block), offset = first * p.N, count = (last - first) * p.N;
    if (!TELEMETRY || !long_rows) {
      norm_bwd_block<TX, TY, TELEMETRY, RESIDUAL, COLUMNS>(p, first, last, out);
      continue;
    }
    norm_bwd_block<TX, TY, false, RESIDUAL, COLUMNS>(p, first, last, out);
    measure_array(p.dy + offset, count, out.cells[0]);
    if (RESIDUAL) measure_array(p.dresidual + offset, count, out.cells[1]);
    measure_array(p.dx + offset, count, out.cells[2]);
  }
}

template <typename TX, typename TY>
static void norm_bwd(const NormBackward<TX, TY>& p, bool telemetry, int64_t begin, int64_t end, const NormGradients<TX>& out) {
  const auto with_columns = [&](auto columns) {
    constexpr bool COLUMNS = decltype(columns)::value;
    const auto range =
        telemetry
            ? (p.dresidual ? norm_bwd_range<TX, TY, true, true, COLUMNS> : norm_bwd_range<TX, TY, true, false, COLUMNS>)
            : (p.dresidual ? norm_bwd_range<TX, TY, false, true, COLUMNS> : norm_bwd_range<TX, TY, false, false, COLUMNS>);
    range(p, begin, end, out);
  };
  out.dweight ? with_columns(std::true_type{}) : with_columns(std::false_type{});
}

template <typename TX, typename TY>
static void norm_fwd(const TX* x, TY* y, const Acc<TX>* weight, const Acc<TX>* bias, double eps, int64_t N, int64_t begin,
                     int64_t end, Acc<TX>* mean, Acc<TX>* rstd) {
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS)
    norm_fwd_rows<TX, TY, ROWS>(x + row * N, y + row * N, weight, bias, Acc<TX>(eps), N, mean + row, rstd + row);
  for (; row < end; ++row)
    norm_fwd_rows<TX, TY, 1>(x + row * N, y + row * N, weight, bias, Acc<TX>(eps), N, mean + row, rstd + row);
}
