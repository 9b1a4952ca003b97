// GELU (Hendrycks and Gimpel 2016), exact and tanh form.
//   exact  y = x P(x), P the standard normal distribution function;  dx = dy (P(x) + x p(x))
//   tanh   y = x S(u), S the sigmoid function, u = 2 sqrt(2 / pi) (x + 0.044715 x^3);  dx = dy (S + x S (1 - S) u')
// One task owns a contiguous range of elements, read in blocks of POINTWISE_BLOCK.
#include <cmath>

#include "checks.h"
#include "gelu_tables.h"

#ifndef GK_ISA
namespace gk {

struct GeluDouble {
  double value, slope;
};

// Never part of a loop, whose multiplications and additions the compiler would contract in another way in each.
__attribute__((noinline)) static GeluDouble gelu_double(double x, bool tanh) {
  if (tanh) {
    const double scale = 0.79788456080286535588, cubic = 0.044715;
    const double t = std::tanh(scale * (x + cubic * x * x * x));
    const double slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * cubic * x * x);
    return {0.5 * x * (1 + t), slope};
  }
  const double probability = 0.5 * std::erfc(-x * 0.70710678118654752440);
  return {x * probability, probability + x * 0.39894228040143267794 * std::exp(-0.5 * x * x)};
}

}  // namespace gk
#endif

#define GK_SOURCE "gelu.cpp"
#include "each_isa.h"

#ifdef GK_ISA
namespace gk::GK_ISA {
#include "vec.h"

#include "measure.h"

// Where x is not finite the answers are those of the formula as it is written, in every dtype: y is infinity at +infinity and
// NaN at -infinity, the slope is NaN at both.

#if GK_VECTOR_BYTES == 64
// Where one instruction looks up 32 entries, y and the slope come from tables: see make_gelu_tables.py. bfloat16 takes the
// cubic ones, whose error is a five-hundredth of its rounding. `bounded` is |x| within the tables; the last segment is zero, so
// that the result is zero beyond it, and NaN where |x| itself is infinite.
template <size_t TERMS>
static GK_INLINE F table(F bounded, F magnitude_of_x, const float (&coefficients)[TERMS][32]) {
  const F shifted = bounded + 3145728.0f;  // 1.5 * 2^21: |x| to the nearest quarter, and their number in the low bits
  const F f = magnitude_of_x - (shifted - 3145728.0f);
  F result{};
#pragma GCC unroll 6
  for (int power = TERMS - 1; power >= 0; --power) {
    const float* row = coefficients[power];
    const F coefficient = (F)_mm512_permutex2var_ps(_mm512_load_ps(row), (__m512i)shifted, _mm512_load_ps(row + 16));
    result = power == TERMS - 1 ? coefficient : result * f + coefficient;
  }
  return result;
}

template <typename T, bool TANH>
static GK_INLINE F gelu_value(F x) {
  const F size = magnitude<float>(x), bounded = lower(size, F{} + 7.8f);
  const F r = std::is_same_v<T, c10::BFloat16> ? table(bounded, bounded, TANH ? GELU_TANH_R3 : GELU_EXACT_R3)
                                               : table(bounded, bounded, TANH ? GELU_TANH_R5 : GELU_EXACT_R5);
  const F step = (F)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, __m512{}, _CMP_GT_OQ), (__m512)(F{} + 1.0f));
  return x * step - r;  // 0 times -infinity is NaN
}

template <typename T, bool TANH>
static GK_INLINE F gelu_slope(F x) {
  const F size = magnitude<float>(x), bounded = lower(size, F{} + 7.8f);
  const F s = std::is_same_v<T, c10::BFloat16> ? table(bounded, size, TANH ? GELU_TANH_S3 : GELU_EXACT_S3)
                                               : table(bounded, size, TANH ? GELU_TANH_S5 : GELU_EXACT_S5);
  return x > 0.0f ? 1.0f - s : s;
}
#else
struct Gelu {
  F value, slope;
};

// P(-|x|) = e^{-x^2/2} Q(v) with v = a |x| / (1 + a |x|): a minimax fit of e^{x^2/2} P(-|x|), relative error 1.3e-8, its
// constant term exact so that P is right to half a unit in the last place around zero. The same exponential is p(x).
static GK_INLINE Gelu gelu_exact(F x) {
  const F scaled = lower(magnitude<float>(x), F{} + 1e30f) * 0.3252691328525543f;
  const F v = scaled / (scaled + 1.0f);
  F q = F{} + 0.0245537443f;
  q = q * v + -0.0743048896f;
  q = q * v + 0.0436499362f;
  q = q * v + 0.0344996589f;
  q = q * v + 0.0734963146f;
  q = q * v + -0.14697347f;
  q = q * v + -0.364873422f;
  q = q * v + 1.13646128f;
  q = q * v + -1.22649957f;
  q = q * v + 0.5f;
  const F exponent = x * (x * -0.5f);
  F e = exponential(higher(exponent, F{} - 87.3f));
  e = exponent > -87.3f ? e : F{};
  const F tail = e * q;
  const F probability = x > 0.0f ? 1.0f - tail : tail;
  const F value = x * probability;
  return {value, x * (e * 0.3989422804f) + probability};
}

static GK_INLINE Gelu gelu_tanh(F x) {
  const F limit = F{} + 11.0f;                             // beyond it S is 0 or 1 and its slope 0, in float
  const F bounded = higher(F{} - limit, lower(limit, x));  // NaN stays NaN
  const F square = bounded * bounded;
  const F u = bounded * (square * 0.0713548163f + 1.5957691216f);
  F e = exponential(higher(F{} - 87.3f, lower(F{} + 87.3f, F{} - u)));
  e = u < 87.3f ? e : F{};
  F s = 1.0f / (e + 1.0f);
  s = u > -87.3f ? s : F{};
  const F value = u > -87.3f ? x / (e + 1.0f) : x * 0.0f;  // x s, with one rounding less
  const F slope_u = square * 0.2140644489f + 1.5957691216f;
  return {x == x ? value : x, s + bounded * s * (e * s) * slope_u};
}

template <typename T, bool TANH>
static GK_INLINE F gelu_value(F x) {
  return (TANH ? gelu_tanh(x) : gelu_exact(x)).value;
}
template <typename T, bool TANH>
static GK_INLINE F gelu_slope(F x) {
  return (TANH ? gelu_tanh(x).slope : gelu_exact(x).slope) + x * 0.0f;
}
#endif

template <typename T, bool TANH>
static GK_INLINE Vec<double> gelu_value(Vec<double> x) {
  for (int64_t k = 0; k < WIDTH<double>; ++k) x[k] = gelu_double(x[k], TANH).value;
  return x;
}
template <typename T, bool TANH>
static GK_INLINE Vec<double> gelu_slope(Vec<double> x) {
  for (int64_t k = 0; k < WIDTH<double>; ++k) x[k] = gelu_double(x[k], TANH).slope;
  return x;
}

template <typename T, bool TANH>
static GK_INLINE Pair<Acc<T>> value_at(Pair<Acc<T>> x) {
  return {gelu_value<T, TANH>(x.a), gelu_value<T, TANH>(x.b)};
}
template <typename T, bool TANH>
static GK_INLINE Vec<Acc<T>> value_at(Vec<Acc<T>> x) {
  return gelu_value<T, TANH>(x);
}
template <typename T, bool TANH>
static GK_INLINE Pair<Acc<T>> slope_at(Pair<Acc<T>> x) {
  return {gelu_slope<T, TANH>(x.a), gelu_slope<T, TANH>(x.b)};
}
template <typename T, bool TANH>
static GK_INLINE Vec<Acc<T>> slope_at(Vec<Acc<T>> x) {
  return gelu_slope<T, TANH>(x);
}

template <typename T, bool TANH>
static void gelu_fwd_range(const T* x, T* y, int64_t begin, int64_t end) {
  for_each_vector<T>(begin, end, [&](auto access, int64_t k) __attribute__((always_inline)) {
    access.store(y + k, value_at<T, TANH>(access.load(x + k)));
  });
}

template <typename T, bool TANH, Mode MODE>
static void gelu_bwd_block(const T* dy, const T* x, T* dx, int64_t count, Measure<T>& measure_dy, Measure<T>& measure_dx) {
  Sums<T> sums_dy, sums_dx;
  const auto scale_dy = measure_dy.scale(), scale_dx = measure_dx.scale();
  for_each_vector<T>(0, count, [&](auto access, int64_t k) __attribute__((always_inline)) {
    access.store(dx + k, access.load(dy + k) * slope_at<T, TANH>(access.load(x + k)));
    if (MODE == OFF) return;
    sums_dy.template add<MODE>(access, dy + k, scale_dy);
    sums_dx.template add<MODE>(access, dx + k, scale_dx);
  });
  if (MODE == OFF) return;
  measure_dy.merge_partials(MODE, sums_dy, dy, count);
  measure_dx.merge_partials(MODE, sums_dx, dx, count);
}

template <typename T, bool TANH>
static void gelu_bwd_range(const T* dy, const T* x, T* dx, int64_t begin, int64_t end, Slot* slots) {
  static constexpr decltype(&gelu_bwd_block<T, TANH, OFF>) blocks[] = {
      gelu_bwd_block<T, TANH, OFF>, gelu_bwd_block<T, TANH, FAST>, gelu_bwd_block<T, TANH, FINITE>,
      gelu_bwd_block<T, TANH, SCALED>};
  Measure<T> measure_dy(slots), measure_dx(slots ? slots + 1 : nullptr);
  for_each_block(begin, end, [&](int64_t first, int64_t last) {
    const Mode mode = std::max(measure_dy.mode(), measure_dx.mode());
    blocks[mode](dy + first, x + first, dx + first, last - first, measure_dy, measure_dx);
  });
}

template <typename T>
static void gelu_fwd(const T* x, T* y, bool tanh, int64_t begin, int64_t end) {
  tanh ? gelu_fwd_range<T, true>(x, y, begin, end) : gelu_fwd_range<T, false>(x, y, begin, end);
}

// slots: for dy and dx; null where nothing is measured.
template <typename T>
static void gelu_bwd(const T* dy, const T* x, T* dx, bool tanh, int64_t begin, int64_t end, Slot* slots) {
  tanh ? gelu_bwd_range<T, true>(dy, x, dx, begin, end, slots) : gelu_bwd_range<T, false>(dy, x, dx, begin, end, slots);
}

}  // namespace gk::GK_ISA
#else

namespace gk {

Tensor gelu_fwd(const Tensor& x_any, bool tanh) {
  check_floating("gelu_fwd", "x", x_any.scalar_type());
  const Tensor x = dense(x_any);
  Tensor y = at::empty_like(x);
  const int64_t num_blocks = (x.numel() + POINTWISE_BLOCK - 1) / POINTWISE_BLOCK;
  GK_DISPATCH(x.scalar_type(), "gelu_fwd", [&] {
    const auto* x_ptr = x.const_data_ptr<scalar_t>();
    auto* y_ptr = y.mutable_data_ptr<scalar_t>();
    for_each_task(num_tasks(num_blocks, POINTWISE_BLOCK), num_blocks, [&](int64_t, int64_t begin, int64_t end) {
      GK_CHOOSE((gelu_fwd<scalar_t>))(x_ptr, y_ptr, tanh, begin * POINTWISE_BLOCK, std::min(x.numel(), end * POINTWISE_BLOCK));
    });
  });
  return y;
}

Tensor gelu_bwd(const Tensor& dy_any, const Tensor& x_any, bool tanh, const OptionalTensor& stats) {
  check_floating("gelu_bwd", "x", x_any.scalar_type());
  check("gelu_bwd", "dy", dy_any, x_any.sizes(), x_any.scalar_type());
  check_stats("gelu_bwd", stats, 2);
  const Tensor x = dense(x_any), dy = with_strides_of(x, dy_any);
  Tensor dx = at::empty_like(x);
  const int64_t num_blocks = (x.numel() + POINTWISE_BLOCK - 1) / POINTWISE_BLOCK;
  const int64_t tasks = num_tasks(num_blocks, POINTWISE_BLOCK);
  std::vector<Slot> slots(2 * tasks);
  GK_DISPATCH(x.scalar_type(), "gelu_bwd", [&] {
    const auto* dy_ptr = dy.const_data_ptr<scalar_t>();
    const auto* x_ptr = x.const_data_ptr<scalar_t>();
    auto* dx_ptr = dx.mutable_data_ptr<scalar_t>();
    for_each_task(tasks, num_blocks, [&](int64_t task, int64_t begin, int64_t end) {
      GK_CHOOSE((gelu_bwd<scalar_t>))(dy_ptr, x_ptr, dx_ptr, tanh, begin * POINTWISE_BLOCK,
                                      std::min(x.numel(), end * POINTWISE_BLOCK), stats ? &slots[2 * task] : nullptr);
    });
  });
  record(stats, 0, slots.data(), 2, tasks, x.numel());
  record(stats, 1, slots.data() + 1, 2, tasks, x.numel());
  return dx;
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("gelu_fwd", gk::gelu_fwd);
  m.impl("gelu_bwd", gk::gelu_bwd);
  m.impl("gelu_bwd_unmeasured",
         [](const at::Tensor& dy, const at::Tensor& x, bool tanh) { return gk::gelu_bwd(dy, x, tanh, {}); });
}
#endif
