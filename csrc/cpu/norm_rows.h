// Rows of LayerNorm (Ba, Kiros and Hinton 2016), shared by layer_norm and add_layer_norm.
//   x_hat = (x - mean) rstd,  y = x_hat weight + bias
//   g = dy weight,  dx = rstd (g - sum(g) / N - x_hat sum(g x_hat) / N) [+ dresidual],
//   dweight = sum_M(dy x_hat),  dbias = sum_M(dy)
// Included inside namespace gk::GK_ISA after measure.h, once per instruction set; no include guard.
// One task owns a contiguous range of rows and takes them ROWS at a time, so that the column accumulators are read
// and written once for ROWS rows. weight, bias and the accumulators are float (double for double tensors), and go on behind the
// last column in whole vectors: see Columns.
// TX is the dtype of x and dx, TY that of y and dy; they differ only for a float32 residual stream.

constexpr int64_t ROWS = GK_VECTOR_BYTES == 64 ? 2 : 1;
constexpr int64_t FAR = 1024;  // bytes of a row from which on the backward takes rows far from each other: see norm_bwd_block
constexpr int64_t CHUNK = 256 * STEP<float>;  // elements that are summed in float: 256 additions a lane

// Where the vectors of a row start: pairs below `whole`, then one or two single ones.
template <typename T>
struct RowShape {
  // room: whether a vector may read and write beyond the last column, into the next row.
  GK_INLINE RowShape(int64_t N, bool room)
      : N(N),
        whole(N - N % STEP<T>),
        first(std::min(N - whole, WIDTH<Acc<T>>), room),
        second(std::max<int64_t>(N - whole - WIDTH<Acc<T>>, 0), room) {}

  // Calls body(access, k) for the vectors that start in columns [begin, min(N, begin + CHUNK)).
  template <typename Body>
  GK_INLINE void for_each_vector(int64_t begin, const Body& body) const {
    const int64_t end = std::min(whole, begin + CHUNK);
    for (int64_t k = begin; k < end; k += STEP<T>) body(Whole<T>(), k);
    if (end < whole || whole == N) return;
    body(first, whole);
    if (N - whole > WIDTH<Acc<T>>) body(second, whole + WIDTH<Acc<T>>);
  }
  template <typename Body>
  GK_INLINE void for_each_vector(const Body& body) const {
    for (int64_t begin = 0; begin == 0 || begin < whole; begin += CHUNK) for_each_vector(begin, body);
  }

  int64_t N, whole;
  Part<T> first, second;
};

// The sums of R rows: vectors in float over CHUNK columns, and their totals in double.
template <typename A, int R>
struct RowSums {
  Pair<A> recent[R]{};
  double total[R]{};

  GK_INLINE void merge_partials() {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      total[r] += static_cast<double>(sum<A>(recent[r]));
      recent[r] = Pair<A>{};
    }
  }
};

// R rows forward: x[0 .. R N) -> y, mean, rstd. The mean is corrected by the mean of x - mean, so that a large offset costs
// nothing; the variance is the second pass over x - mean.
template <typename TX, typename TY, int R>
static GK_INLINE void norm_fwd_rows(const TX* x, TY* y, const Acc<TX>* weight, const Acc<TX>* bias, Acc<TX> eps,
                                    const RowShape<TX>& row, Acc<TX>* mean, Acc<TX>* rstd) {
  using A = Acc<TX>;
  const int64_t N = row.N;
  const double one_column = 1.0 / static_cast<double>(N);
  RowSums<A, R> sums, first, second;
  Vec<A> centre[R], shift[R], scale[R];
  for (int64_t begin = 0; begin == 0 || begin < row.whole; begin += CHUNK) {
    row.for_each_vector(begin, [&](auto access, int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) sums.recent[r] += access.load(x + r * N + k);
    });
    sums.merge_partials();
  }
  for (int r = 0; r < R; ++r) centre[r] = broadcast<A>(static_cast<A>(sums.total[r] * one_column));
  for (int64_t begin = 0; begin == 0 || begin < row.whole; begin += CHUNK) {
    row.for_each_vector(begin, [&](auto access, int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const auto d = access.keep(access.load(x + r * N + k) - centre[r]);
        first.recent[r] += d;
        second.recent[r] += d * d;
      }
    });
    first.merge_partials();
    second.merge_partials();
  }
  for (int r = 0; r < R; ++r) {
    const A correction = static_cast<A>(first.total[r] * one_column);
    const A variance = static_cast<A>(second.total[r] * one_column) - correction * correction;
    rstd[r] = A(1) / std::sqrt((variance > 0 ? variance : variance - variance) + eps);
    mean[r] = centre[r][0] + correction;
    shift[r] = broadcast<A>(correction);
    scale[r] = broadcast<A>(rstd[r]);
  }
  row.for_each_vector([&](auto access, int64_t k) __attribute__((always_inline)) {
    const auto w = access.load_column(weight + k), b = access.load_column(bias + k);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      prefetch_pair(x + (R + r) * N + k);
      access.store(y + r * N + k, ((access.load(x + r * N + k) - centre[r]) - shift[r]) * scale[r] * w + b);
    }
  });
}

// What is measured of a task: dy, dresidual, dx.
template <typename TX, typename TY>
struct NormMeasures {
  Measure<TY> dy;
  Measure<TX> dresidual, dx;

  Mode mode() const { return std::max({dy.mode(), dresidual.mode(), dx.mode()}); }
};
template <typename TX, typename TY>
struct NormSums {
  Sums<TY> dy;
  Sums<TX> dresidual, dx;
  Acc<TX> scale_dy, scale_dresidual, scale_dx;
};

// The sums over columns of R rows: adds to dweight, dbias and `sums`, returns the row means of g and g x_hat.
template <typename TX, typename TY, int R, bool COLUMNS, Mode MODE>
static GK_INLINE void norm_bwd_sums(const TY* dy_ptr, const TX* x_ptr, const Acc<TX>* weight, const Vec<Acc<TX>>* mean,
                                    const Vec<Acc<TX>>* rstd, const RowShape<TX>& row, int64_t apart,
                                    const NormGradients<TX>& out, NormSums<TX, TY>& sums, Vec<Acc<TX>>* mean_g,
                                    Vec<Acc<TX>>* mean_gx) {
  using A = Acc<TX>;
  const double one_column = 1.0 / static_cast<double>(row.N);
  RowSums<A, R> sum_g, sum_gx;
  Sums<TY> sums_dy = sums.dy;
  for (int64_t begin = 0; begin == 0 || begin < row.whole; begin += CHUNK) {
    row.for_each_vector(begin, [&](auto access, int64_t k) __attribute__((always_inline)) {
      const auto w = access.load_column(weight + k);
      auto column_dy = w, column_dyx = w;
      if (COLUMNS) column_dy = access.load_column(out.dbias + k), column_dyx = access.load_column(out.dweight + k);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const auto dy = access.load(dy_ptr + r * apart + k);  // zero beyond the last column
        const auto x_hat = (access.load(x_ptr + r * apart + k) - mean[r]) * rstd[r];
        const auto g = dy * w;
        sum_g.recent[r] += g;
        sum_gx.recent[r] += g * x_hat;
        if (COLUMNS) {
          column_dy += dy;
          column_dyx += dy * x_hat;
        }
        if (MODE != OFF) sums_dy.template add<MODE>(access, dy_ptr + r * apart + k, sums.scale_dy);
      }
      if (COLUMNS) {
        access.store_column(out.dbias + k, column_dy);
        access.store_column(out.dweight + k, column_dyx);
      }
    });
    sum_g.merge_partials();
    sum_gx.merge_partials();
  }
  sums.dy = sums_dy;
  for (int r = 0; r < R; ++r) {
    mean_g[r] = broadcast<A>(static_cast<A>(sum_g.total[r] * one_column));
    mean_gx[r] = broadcast<A>(static_cast<A>(sum_gx.total[r] * one_column));
  }
}

template <typename TX, typename TY, int R, bool RESIDUAL, bool COLUMNS, Mode MODE>
static GK_INLINE void norm_bwd_rows(const NormBackward<TX, TY>& p, int64_t first_row, int64_t rows_apart,
                                    const RowShape<TX>& row, const NormGradients<TX>& out, NormSums<TX, TY>& sums) {
  using A = Acc<TX>;
  const int64_t offset = first_row * row.N, apart = rows_apart * row.N;
  const TY* dy_ptr = p.dy + offset;
  const TX *x_ptr = p.x + offset, *dresidual_ptr = RESIDUAL ? p.dresidual + offset : nullptr;
  TX* dx_ptr = p.dx + offset;
  TY* dx_again_ptr = p.dx_again ? p.dx_again + offset : nullptr;
  Vec<A> mean[R], rstd[R], mean_g[R], mean_gx[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = broadcast<A>(p.mean[first_row + r * rows_apart]);
    rstd[r] = broadcast<A>(p.rstd[first_row + r * rows_apart]);
  }
  norm_bwd_sums<TX, TY, R, COLUMNS, MODE>(dy_ptr, x_ptr, p.weight, mean, rstd, row, apart, out, sums, mean_g, mean_gx);
  Sums<TX> sums_dresidual = sums.dresidual, sums_dx = sums.dx;
  row.for_each_vector([&](auto access, int64_t k) __attribute__((always_inline)) {
    const auto w = access.load_column(p.weight + k);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * apart + k;
      const auto x_hat = (access.load(x_ptr + at) - mean[r]) * rstd[r];
      auto dx = ((access.load(dy_ptr + at) * w - mean_g[r]) - x_hat * mean_gx[r]) * rstd[r];
      if (RESIDUAL) {
        dx += access.load(dresidual_ptr + at);
        if (MODE != OFF) sums_dresidual.template add<MODE>(access, dresidual_ptr + at, sums.scale_dresidual);
      }
      if (dx_again_ptr) access.store(dx_again_ptr + at, dx);
      access.store(dx_ptr + at, dx);
      if (MODE != OFF) sums_dx.template add<MODE>(access, dx_ptr + at, sums.scale_dx);
    }
  });
  sums.dresidual = sums_dresidual;
  sums.dx = sums_dx;
}

// The rows of [begin, end) for which a vector may reach beyond their last column: behind them there are WIDTH elements more.
template <typename T>
static GK_INLINE int64_t end_of_room(int64_t N, int64_t begin, int64_t end) {
  if (GK_VECTOR_BYTES == 64 || N % STEP<T> == 0) return end;
  return std::max(begin, end - (WIDTH<Acc<T>> + N - 1) / N);
}

// The rows [first, last), between two merges; those from `end_roomy` on have no room. Short rows are taken ROWS neighbours at a
// time. Of longer ones each is in a part of the block of its own, whose memory is then read from one end to the other: that is
// what a CPU fetches ahead, and it fetches less of two rows side by side.
template <typename TX, typename TY, bool RESIDUAL, bool COLUMNS, Mode MODE>
static void norm_bwd_block(const NormBackward<TX, TY>& p, int64_t first, int64_t last, int64_t end_roomy,
                           const NormGradients<TX>& out, NormMeasures<TX, TY>& measures) {
  const int64_t N = p.N, offset = first * N, count = (last - first) * N;
  const RowShape<TX> roomy(N, true), crowded(N, false);
  NormSums<TX, TY> sums{{}, {}, {}, measures.dy.scale(), measures.dresidual.scale(), measures.dx.scale()};
  const int64_t turns = std::max<int64_t>(0, std::min(last, end_roomy) - first) / ROWS;
  const bool far = N * static_cast<int64_t>(sizeof(TX)) >= FAR;
  for (int64_t turn = 0; turn < turns; ++turn)
    norm_bwd_rows<TX, TY, ROWS, RESIDUAL, COLUMNS, MODE>(p, first + turn * (far ? 1 : ROWS), far ? turns : 1, roomy, out, sums);
  for (int64_t row = first + ROWS * turns; row < last; ++row)
    norm_bwd_rows<TX, TY, 1, RESIDUAL, COLUMNS, MODE>(p, row, 0, crowded, out, sums);
  if (MODE == OFF) return;
  measures.dy.merge_partials(MODE, sums.dy, p.dy + offset, count);
  if (RESIDUAL) measures.dresidual.merge_partials(MODE, sums.dresidual, p.dresidual + offset, count);
  measures.dx.merge_partials(MODE, sums.dx, p.dx + offset, count);
}

template <typename TX, typename TY, bool RESIDUAL, bool COLUMNS>
static void norm_bwd_range(const NormBackward<TX, TY>& p, int64_t begin, int64_t end, const NormGradients<TX>& out) {
  const int64_t N = p.N, end_roomy = end_of_room<TX>(N, begin, end);
  const int64_t additions = N / STEP<TX> + (N % STEP<TX> ? 2 : 0);  // to a lane, of one row
  // Rows of a few vectors, and those too long for one sum in float, are measured behind the loop.
  const bool in_loop = N >= 2 * STEP<TX> && ROWS * additions <= 512;
  const int64_t most = in_loop ? 256 / additions : std::min(ROWS_OF_A_SUM, MERGE_INTERVAL / std::max<int64_t>(1, N));
  const int64_t rows = std::max(ROWS, most / ROWS * ROWS);
  static constexpr decltype(&norm_bwd_block<TX, TY, RESIDUAL, COLUMNS, OFF>) blocks[] = {
      norm_bwd_block<TX, TY, RESIDUAL, COLUMNS, OFF>, norm_bwd_block<TX, TY, RESIDUAL, COLUMNS, FAST>,
      norm_bwd_block<TX, TY, RESIDUAL, COLUMNS, FINITE>, norm_bwd_block<TX, TY, RESIDUAL, COLUMNS, SCALED>};
  const auto slot = [&](int port) { return out.slots ? out.slots + port : nullptr; };
  NormMeasures<TX, TY> measures{Measure<TY>(slot(0)), Measure<TX>(RESIDUAL ? slot(1) : nullptr), Measure<TX>(slot(2))};
  for (int64_t first = begin, last; first < end; first = last) {
    last = std::min(end, first + (first == begin ? std::max(ROWS, rows / 8 / ROWS * ROWS) : rows));
    blocks[in_loop ? measures.mode() : OFF](p, first, last, end_roomy, out, measures);
    if (out.slots && !in_loop) {
      const int64_t offset = first * N, count = (last - first) * N;
      measures.dy.add(p.dy + offset, count);
      if (RESIDUAL) measures.dresidual.add(p.dresidual + offset, count);
      measures.dx.add(p.dx + offset, count);
    }
    if (COLUMNS && out.dweight_total && (last - begin) / ROWS_OF_A_SUM != (first - begin) / ROWS_OF_A_SUM) out.merge_columns(N);
  }
}

template <typename TX, typename TY>
static void norm_bwd(const NormBackward<TX, TY>& p, int64_t begin, int64_t end, const NormGradients<TX>& out) {
  const auto range = out.dweight ? (p.dresidual ? norm_bwd_range<TX, TY, true, true> : norm_bwd_range<TX, TY, false, true>)
                                 : (p.dresidual ? norm_bwd_range<TX, TY, true, false> : norm_bwd_range<TX, TY, false, false>);
  range(p, begin, end, out);
}

// Rows [begin, end) of a task's rows that end at `end_of_task`.
template <typename TX, typename TY>
static void norm_fwd(const TX* x, TY* y, const Acc<TX>* weight, const Acc<TX>* bias, double eps, int64_t N, int64_t begin,
                     int64_t end, int64_t end_of_task, Acc<TX>* mean, Acc<TX>* rstd) {
  const int64_t end_roomy = std::min(end, end_of_room<TX>(N, begin, end_of_task));
  const RowShape<TX> roomy(N, true), crowded(N, false);
  int64_t row = begin;
  for (; row + ROWS <= end_roomy; row += ROWS)
    norm_fwd_rows<TX, TY, ROWS>(x + row * N, y + row * N, weight, bias, Acc<TX>(eps), roomy, mean + row, rstd + row);
  for (; row < end; ++row)
    norm_fwd_rows<TX, TY, 1>(x + row * N, y + row * N, weight, bias, Acc<TX>(eps), crowded, mean + row, rstd + row);
}
