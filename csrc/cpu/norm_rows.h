// Rows of LayerNorm (Ba, Kiros and Hinton 2016), shared by layer_norm and add_layer_norm.
//   x_hat = (x - mean) rstd,  y = x_hat weight + bias
//   g = dy weight,  dx = rstd (g - sum(g) / N - x_hat sum(g x_hat) / N) [+ dresidual],  dweight = sum_M(dy x_hat),  dbias = sum_M(dy)
// Included inside namespace gk::GK_ISA after measure.h, once per instruction set; no include guard.
// One program owns a contiguous range of rows and walks them ROWS at a time, so that the column accumulators are read
// and written once for ROWS rows. weight, bias and the accumulators are float (double for double tensors).
// TX is the dtype of x and dx, TY that of y and dy; they differ only for a float32 residual stream.

constexpr int64_t ROWS = GK_VECTOR_BYTES == 64 ? 4 : 2;

// One row forward: x[0 .. N) -> y, mean, rstd. The mean is corrected by the mean of x - mean, so that a large offset costs
// nothing; the variance is the second pass over x - mean.
template <typename TX, typename TY, int R>
static GK_INLINE void norm_fwd_rows(const TX* x, TY* y, const Acc<TX>* weight, const Acc<TX>* bias, Acc<TX> eps, int64_t N,
                                 Acc<TX>* mean, Acc<TX>* rstd) {
  using A = Acc<TX>;
  const int64_t whole = N - N % WIDTH<A>, tail = N - whole;
  Vec<A> total[R]{}, first[R]{}, second[R]{}, centre[R], shift[R], scale[R];
  for (int64_t k = 0; k < whole; k += WIDTH<A>) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[r] += load(x + r * N + k);
  }
  for (int r = 0; r < R; ++r) {
    if (tail) total[r] += load_tail(x + r * N + whole, tail);
    centre[r] = broadcast<A>(sum<A>(total[r]) / A(N));
  }
  for (int64_t k = 0; k < whole; k += WIDTH<A>) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> d = load(x + r * N + k) - centre[r];
      first[r] += d;
      second[r] += d * d;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t k = whole; k < N; ++k) {
      const A d = static_cast<A>(x[r * N + k]) - centre[r][0];
      first[r][0] += d;
      second[r][0] += d * d;
    }
    const A correction = sum<A>(first[r]) / A(N);
    const A variance = sum<A>(second[r]) / A(N) - correction * correction;
    rstd[r] = A(1) / std::sqrt((variance > 0 ? variance : variance - variance) + eps);
    mean[r] = centre[r][0] + correction;
    shift[r] = broadcast<A>(correction);
    scale[r] = broadcast<A>(rstd[r]);
  }
  for (int64_t k = 0; k < whole; k += WIDTH<A>) {
    const Vec<A> w = load(weight + k), b = load(bias + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(y + r * N + k, ((load(x + r * N + k) - centre[r]) - shift[r]) * scale[r] * w + b);
  }
  if (tail) {
    const Vec<A> w = load_tail(weight + whole, tail), b = load_tail(bias + whole, tail);
    for (int r = 0; r < R; ++r) {
      const Vec<A> x_hat = ((load_tail(x + r * N + whole, tail) - centre[r]) - shift[r]) * scale[r];
      store_tail(y + r * N + whole, x_hat * w + b, tail);
    }
  }
}

// The sums over columns of ROWS rows: adds to dweight, dbias and `measure`, returns the row means of g and g x_hat.
template <typename TX, typename TY, int R, bool TELEMETRY, bool COLUMNS>
static GK_INLINE void norm_bwd_sums(const TY* dy_ptr, const TX* x_ptr, const Acc<TX>* weight, const Vec<Acc<TX>>* mean,
                                 const Vec<Acc<TX>>* rstd, int64_t N, const NormGradients<TX>& out,
                                 Measure<Acc<TX>>& measure, Vec<Acc<TX>>* mean_g, Vec<Acc<TX>>* mean_gx) {
  using A = Acc<TX>;
  const int64_t whole = N - N % WIDTH<A>, tail = N - whole;
  Vec<A> sum_g[R]{}, sum_gx[R]{};
  Measure<A> local = measure;
  for (int64_t k = 0; k < whole; k += WIDTH<A>) {
    const Vec<A> w = load(weight + k);
    Vec<A> column_dy{}, column_dyx{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> dy = load(dy_ptr + r * N + k);
      const Vec<A> x_hat = (load(x_ptr + r * N + k) - mean[r]) * rstd[r];
      const Vec<A> g = dy * w;
      sum_g[r] += g;
      sum_gx[r] += g * x_hat;
      if (COLUMNS) {
        column_dy += dy;
        column_dyx += dy * x_hat;
      }
      if (TELEMETRY) local.add(dy);
    }
    if (COLUMNS) {
      store(out.dweight + k, load(out.dweight + k) + column_dyx);
      store(out.dbias + k, load(out.dbias + k) + column_dy);
    }
  }
  for (int r = 0; r < R; ++r) {
    if (tail) {
      const Vec<A> dy = load_tail(dy_ptr + r * N + whole, tail);
      const Vec<A> x_hat = (load_tail(x_ptr + r * N + whole, tail) - mean[r]) * rstd[r];
      const Vec<A> g = dy * load_tail(weight + whole, tail);
      sum_g[r] += g;  // the lanes beyond the row hold dy = 0
      sum_gx[r] += g * x_hat;
      if (COLUMNS) {
        store_tail(out.dweight + whole, load_tail(out.dweight + whole, tail) + dy * x_hat, tail);
        store_tail(out.dbias + whole, load_tail(out.dbias + whole, tail) + dy, tail);
      }
      if (TELEMETRY) local.add_tail(dy, tail);
    }
    mean_g[r] = broadcast<A>(sum<A>(sum_g[r]) / A(N));
    mean_gx[r] = broadcast<A>(sum<A>(sum_gx[r]) / A(N));
  }
  measure = local;
}

template <typename TX, typename TY, int R, bool TELEMETRY, bool RESIDUAL, bool COLUMNS>
static GK_INLINE void norm_bwd_rows(const NormBackward<TX, TY>& p, int64_t row, const NormGradients<TX>& out,
                                 Measure<Acc<TX>>* measure) {
  using A = Acc<TX>;
  const int64_t N = p.N, whole = N - N % WIDTH<A>, tail = N - whole;
  const TY* dy_ptr = p.dy + row * N;
  const TX *x_ptr = p.x + row * N, *dresidual_ptr = RESIDUAL ? p.dresidual + row * N : nullptr;
  TX* dx_ptr = p.dx + row * N;
  Vec<A> mean[R], rstd[R], mean_g[R], mean_gx[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = broadcast<A>(p.mean[row + r]);
    rstd[r] = broadcast<A>(p.rstd[row + r]);
  }
  norm_bwd_sums<TX, TY, R, TELEMETRY, COLUMNS>(dy_ptr, x_ptr, p.weight, mean, rstd, N, out, measure[0], mean_g, mean_gx);
  Measure<A> measure_residual = measure[1], measure_dx = measure[2];
  const auto gradient = [&](int r, Vec<A> dy, Vec<A> x, Vec<A> w) __attribute__((always_inline)) {
    const Vec<A> x_hat = (x - mean[r]) * rstd[r];
    return rstd[r] * ((dy * w - mean_g[r]) - x_hat * mean_gx[r]);
  };
  for (int64_t k = 0; k < whole; k += WIDTH<A>) {
    const Vec<A> w = load(p.weight + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * N + k;
      Vec<A> dx = gradient(r, load(dy_ptr + at), load(x_ptr + at), w);
      if (RESIDUAL) {
        const Vec<A> dresidual = load(dresidual_ptr + at);
        dx += dresidual;
        if (TELEMETRY) measure_residual.add(dresidual);
      }
      if constexpr (!std::is_same_v<TX, TY>) store(p.dx_narrow + row * N + at, dx);
      dx = store(dx_ptr + at, dx);
      if (TELEMETRY) measure_dx.add(dx);
    }
  }
  if (tail) {
    const Vec<A> w = load_tail(p.weight + whole, tail);
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * N + whole;
      Vec<A> dx = gradient(r, load_tail(dy_ptr + at, tail), load_tail(x_ptr + at, tail), w);
      if (RESIDUAL) {
        const Vec<A> dresidual = load_tail(dresidual_ptr + at, tail);
        dx += dresidual;
        if (TELEMETRY) measure_residual.add_tail(dresidual, tail);
      }
      if constexpr (!std::is_same_v<TX, TY>) store_tail(p.dx_narrow + row * N + at, dx, tail);
      store_tail(dx_ptr + at, dx, tail);
      if (TELEMETRY) measure_dx.add_tail(load_tail(dx_ptr + at, tail), tail);
    }
  }
  measure[1] = measure_residual;
  measure[2] = measure_dx;
}

template <typename TX, typename TY, bool TELEMETRY, bool RESIDUAL, bool COLUMNS>
static void norm_bwd_range(const NormBackward<TX, TY>& p, int64_t begin, int64_t end, const NormGradients<TX>& out) {
  const int64_t block = std::max(ROWS, POINTWISE_BLOCK / p.N / ROWS * ROWS);  // rows between two folds
  Measure<Acc<TX>> measure[3];
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = std::min(end, first + block);
    int64_t row = first;
    for (; row + ROWS <= last; row += ROWS) norm_bwd_rows<TX, TY, ROWS, TELEMETRY, RESIDUAL, COLUMNS>(p, row, out, measure);
    for (; row < last; ++row) norm_bwd_rows<TX, TY, 1, TELEMETRY, RESIDUAL, COLUMNS>(p, row, out, measure);
    if (TELEMETRY) {
      const int64_t offset = first * p.N, count = (last - first) * p.N;
      fold(measure[0], p.dy + offset, count, out.cells[0]);
      if (RESIDUAL) fold(measure[1], p.dresidual + offset, count, out.cells[1]);
      fold(measure[2], p.dx + offset, count, out.cells[2]);
    }
  }
}

template <typename TX, typename TY>
static void norm_bwd(const NormBackward<TX, TY>& p, bool telemetry, int64_t begin, int64_t end, const NormGradients<TX>& out) {
  const auto with_columns = [&](auto columns) {
    constexpr bool COLUMNS = decltype(columns)::value;
    const auto range = telemetry ? (p.dresidual ? norm_bwd_range<TX, TY, true, true, COLUMNS> : norm_bwd_range<TX, TY, true, false, COLUMNS>)
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
