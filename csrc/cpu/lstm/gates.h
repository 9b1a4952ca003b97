// The gates' functions, and the product that feeds them: vectors over units, broadcasts over rows.
// Included inside namespace gk::GK_ISA after vec.h, once per instruction set; no include guard.

// The first `count` elements of a vector; the others are read as zero and not written.
static GK_INLINE F load_first(const float* p, int64_t count) {
  if (count >= WIDTH<float>) return load(p);
#if GK_VECTOR_BYTES == 64
  return (F)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  F result{};
  for (int64_t k = 0; k < count; ++k) result[k] = p[k];
  return result;
#endif
}
static GK_INLINE Vec<double> load_first(const double* p, int64_t count) {
  if (count >= WIDTH<double>) return load(p);
#if GK_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), p);
#else
  Vec<double> result{};
  for (int64_t k = 0; k < count; ++k) result[k] = p[k];
  return result;
#endif
}
static GK_INLINE void store_first(float* p, F v, int64_t count) {
  if (count >= WIDTH<float>) return store(p, v);
#if GK_VECTOR_BYTES == 64
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  for (int64_t k = 0; k < count; ++k) p[k] = v[k];
#endif
}
static GK_INLINE void store_first(double* p, Vec<double> v, int64_t count) {
  if (count >= WIDTH<double>) return store(p, v);
#if GK_VECTOR_BYTES == 64
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
#else
  for (int64_t k = 0; k < count; ++k) p[k] = v[k];
#endif
}

// e^v for |v| <= 708, within 2 units in the last place (Moshier, Cephes exp). Of a NaN it may make a number, as its float twin.
static GK_INLINE Vec<double> exponential(Vec<double> v) {
  typedef uint64_t Bits __attribute__((vector_size(GK_VECTOR_BYTES)));
  const Vec<double> shifted = v * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52: see the float twin
  const Vec<double> n = shifted - 6755399441055744.0;
  const Vec<double> r = (v - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  const Vec<double> square = r * r;
  const Vec<double> p = r * ((1.26177193074810590878e-4 * square + 3.02994407707441961300e-2) * square + 1.0);
  const Vec<double> q =
      ((3.00198505138664455042e-6 * square + 2.52448340349684104192e-3) * square + 2.27265548208155028766e-1) * square + 2.0;
  return (Vec<double>)((Bits)(1.0 + 2.0 * p / (q - p)) + ((Bits)shifted << 52));
}

template <typename A>
constexpr A EXPONENT_LIMIT = sizeof(A) == 4 ? A(87) : A(700);

// 1 / v, v >= 1. A table of 14 bits and one Newton step, within 1.5 units in the last place, for a third of a division's time.
template <typename A>
static GK_INLINE Vec<A> reciprocal(Vec<A> v) {
#if GK_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) {
    const F guess = (F)_mm512_rcp14_ps((__m512)v);
    return guess * (2.0f - v * guess);
  }
#endif
  return A(1) / v;
}

// 1 / (1 + e^-v); NaN stays NaN, by the last term.
template <typename A>
static GK_INLINE Vec<A> sigmoid(Vec<A> v) {
  const Vec<A> limit = broadcast<A>(EXPONENT_LIMIT<A>), bounded = lower(limit, higher(-limit, v));
  return reciprocal<A>(A(1) + exponential(-bounded)) + bounded * A(0);
}

// tanh v: around zero a series (Moshier, Cephes tanh), elsewhere 1 - 2 / (e^2|v| + 1), which is 1 where the power overflows.
// NaN stays NaN.
template <typename A>
static GK_INLINE Vec<A> hyperbolic_tangent(Vec<A> v) {
  typedef typename Lanes<A>::integer Integer;
  const Vec<A> size = magnitude<A>(v), square = v * v;
  const Vec<A> far = A(1) - A(2) * reciprocal<A>(exponential(lower(broadcast<A>(EXPONENT_LIMIT<A>), size + size)) + A(1));
  const Vec<A> signed_far = (Vec<A>)((Integer)far | ((Integer)v ^ (Integer)size));
  Vec<A> near;
  if constexpr (sizeof(A) == 4) {
    near = ((-5.70498872745e-3f * square + 2.06390887954e-2f) * square - 5.37397155531e-2f) * square + 1.33314422036e-1f;
    near = (near * square - 3.33332819422e-1f) * square * v + v;
  } else {
    const Vec<A> p = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square - 1.61468768441708447952e3;
    const Vec<A> q =
        ((square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3) * square + 4.84406305325125486048e3;
    near = v + v * square * (p / q);
  }
  return size > A(0.625) ? signed_far : near;
}

// The activated gates of WIDTH units, which lie H units apart, from `p` on.
template <typename A>
struct Gates {
  Vec<A> i, f, g, o;
};
template <typename A>
static GK_INLINE Gates<A> load_gates(const A* p, int64_t H, int64_t count) {
  return {load_first(p, count), load_first(p + H, count), load_first(p + 2 * H, count), load_first(p + 3 * H, count)};
}
template <typename A>
static GK_INLINE void store_gates(A* p, const Gates<A>& gates, int64_t H, int64_t count) {
  store_first(p, gates.i, count);
  store_first(p + H, gates.f, count);
  store_first(p + 2 * H, gates.g, count);
  store_first(p + 3 * H, gates.o, count);
}

template <typename A>
static GK_INLINE Gates<A> activate(const Vec<A> (&preactivations)[4]) {
  const auto& [i, f, g, o] = preactivations;
  return {sigmoid<A>(i), sigmoid<A>(f), hyperbolic_tangent<A>(g), sigmoid<A>(o)};
}

// One step back through the gates: the gradients of dc = dL/dc_next, of the preactivations, and of c.
template <typename A>
struct StepGradients {
  Vec<A> dc_next, dc;
  Gates<A> dgates;
};

// dh: dL/dh_next before any projection. dc_after: what comes to c_next from the step after. m: tanh(c_next).
template <typename A>
static GK_INLINE StepGradients<A> step_backward(Vec<A> dh, Vec<A> dc_after, const Gates<A>& gates, Vec<A> m, Vec<A> c) {
  const auto& [i, f, g, o] = gates;
  const Vec<A> dc = dc_after + dh * o * (A(1) - m * m);
  return {
      dc, dc * f, {dc * g * (i * (A(1) - i)), dc * c * (f * (A(1) - f)), dc * i * (A(1) - g * g), dh * m * (o * (A(1) - o))}};
}

// Rows of a register tile: with 4 vectors of columns, as many as leave registers for the weights and a broadcast.
constexpr int TILE_ROWS = GK_VECTOR_BYTES == 64 ? 6 : 3;

// sums[r][v] += sum over k of a[r, k] w[k, v]: rows of `a` are `row_stride` apart, vectors of `w` `vector_stride`, and what
// belongs to one k `step` from the next.
template <typename A, int ROWS, int VECTORS>
static GK_INLINE void multiply(const A* a, int64_t row_stride, const A* w, int64_t vector_stride, int64_t step, int64_t K,
                               Vec<A> (&sums)[ROWS][VECTORS]) {
  for (int64_t k = 0; k < K; ++k, w += step) {
    Vec<A> weights[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) weights[v] = load(w + v * vector_stride);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const Vec<A> factor = broadcast<A>(a[r * row_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * weights[v];
    }
  }
}

// Calls tile(rows_constant, first_row) for num_rows rows in tiles of nearly equal height, TILE_ROWS at most.
template <typename Tile>
static GK_INLINE void for_each_tile(int64_t num_rows, const Tile& tile) {
  const int64_t tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t n = 0; n < tiles; ++n) {
    const int64_t first = num_rows * n / tiles, rows = num_rows * (n + 1) / tiles - first;
    switch (rows) {
      case 1:
        tile(std::integral_constant<int, 1>{}, first);
        break;
      case 2:
        tile(std::integral_constant<int, 2>{}, first);
        break;
      case 3:
        tile(std::integral_constant<int, 3>{}, first);
        break;
#if GK_VECTOR_BYTES == 64
      case 4:
        tile(std::integral_constant<int, 4>{}, first);
        break;
      case 5:
        tile(std::integral_constant<int, 5>{}, first);
        break;
      default:
        tile(std::integral_constant<int, 6>{}, first);
        break;
#endif
    }
  }
}

// A thread's share of `columns`, in whole vectors.
struct Share {
  int64_t begin, end;
};
template <typename A>
static GK_INLINE Share share_of(int64_t columns, int thread, int threads) {
  const int64_t blocks = (columns + WIDTH<A> - 1) / WIDTH<A>;
  return {std::min(columns, blocks * thread / threads * WIDTH<A>),
          std::min(columns, blocks * (thread + 1) / threads * WIDTH<A>)};
}

// One vector of columns after the other, k by k: packed[block][k][lane] = weight[k, block * WIDTH + lane], zero beyond the
// last column. weight[k, column] is at k * k_stride + column * column_stride.
template <typename A>
constexpr int64_t panel_size(int64_t K) {
  return K * WIDTH<A> + WIDTH<A>;  // not a power of two, so that four panels do not share cache sets
}
template <typename A>
static void pack_columns(const A* weight, int64_t k_stride, int64_t column_stride, int64_t K, int64_t columns, Share share,
                         A* packed) {
  for (int64_t j = share.begin; j < share.end; j += WIDTH<A>) {
    A* panel = packed + j / WIDTH<A> * panel_size<A>(K);
    const int64_t count = std::min(WIDTH<A>, columns - j);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t lane = 0; lane < WIDTH<A>; ++lane) {
        panel[k * WIDTH<A> + lane] = lane < count ? weight[k * k_stride + (j + lane) * column_stride] : A(0);
      }
    }
  }
}

// out[r, j] = sum over k of a[r, k] w[k, j] for the columns of `share`; rows of out are `columns` apart.
template <typename A>
static void multiply_columns(const A* a, int64_t row_stride, const A* packed, int64_t K, int64_t num_rows, int64_t columns,
                             Share share, A* out) {
  const auto block = [&](auto vectors, int64_t j) {
    const A* w = packed + j / WIDTH<A> * panel_size<A>(K);
    for_each_tile(num_rows, [&](auto rows, int64_t r0) {
      Vec<A> sums[rows()][vectors()] = {};
      multiply<A>(a + r0 * row_stride, row_stride, w, panel_size<A>(K), WIDTH<A>, K, sums);
      for (int r = 0; r < rows(); ++r) {
        for (int v = 0; v < vectors(); ++v) {
          const int64_t column = j + v * WIDTH<A>;
          store_first(out + (r0 + r) * columns + column, sums[r][v], columns - column);
        }
      }
    });
  };
  int64_t j = share.begin;
  for (; share.end - j > 3 * WIDTH<A>; j += 4 * WIDTH<A>) block(std::integral_constant<int, 4>{}, j);
  for (; share.end - j > WIDTH<A>; j += 2 * WIDTH<A>) block(std::integral_constant<int, 2>{}, j);
  if (j < share.end) block(std::integral_constant<int, 1>{}, j);
}
