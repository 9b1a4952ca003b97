// GELU (Hendrycks and Gimpel 2016), exact and tanh form.
//   exact  y = x P(x), P the standard normal distribution function;  dx = dy (P(x) + x p(x))
//   tanh   y = x S(u), S the logistic function, u = 2 sqrt(2 / pi) (x + 0.044715 x^3);  dx = dy (S + x S (1 - S) u')
// One program owns a contiguous range of elements, walked in blocks of FOLD.
#include <cmath>

#include "checks.h"
#include "gelu_tables.h"

#ifndef GK_ISA
namespace gk {

struct GeluDouble {
  double value, slope;
};

inline GeluDouble gelu_double(double x, bool tanh) {
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

#if GK_VECTOR_BYTES == 64
// Where one instruction looks up 32 entries, y and the slope come from tables: see make_gelu_tables.py. bfloat16 takes the
// cubic ones, whose error is a five-hundredth of its rounding.
template <size_t TERMS>
static GK_INLINE F table(F magnitude_of_x, const float (&coefficients)[TERMS][32]) {
  const F shifted = magnitude_of_x * 4.0f + 12582912.0f;  // 1.5 * 2^23: the segment in the low bits
  const F f = magnitude_of_x * 4.0f - (shifted - 12582912.0f);
  F result{};
#pragma GCC unroll 6
  for (int power = TERMS - 1; power >= 0; --power) {
    const float* row = coefficients[power];
    const F coefficient = (F)_mm512_permutex2var_ps(_mm512_load_ps(row), (__m512i)shifted, _mm512_load_ps(row + 16));
    result = power == TERMS - 1 ? coefficient : result * f + coefficient;
  }
  return result;
}

template <typename T>
static GK_INLINE F gelu_value(F x, bool tanh) {
  const F magnitude_of_x = lower_magnitude<float>(x, F{} + 7.8f);
  const F r = std::is_same_v<T, c10::BFloat16> ? table(magnitude_of_x, tanh ? GELU_TANH_R3 : GELU_EXACT_R3)
                                               : table(magnitude_of_x, tanh ? GELU_TANH_R5 : GELU_EXACT_R5);
  return higher(F{}, x) - r;  // NaN stays NaN
}

template <typename T>
static GK_INLINE F gelu_slope(F x, bool tanh) {
  const F magnitude_of_x = lower(F{} + 7.8f, magnitude<float>(x));  // NaN stays NaN
  const F s = std::is_same_v<T, c10::BFloat16> ? table(magnitude_of_x, tanh ? GELU_TANH_S3 : GELU_EXACT_S3)
                                               : table(magnitude_of_x, tanh ? GELU_TANH_S5 : GELU_EXACT_S5);
  return x > 0.0f ? 1.0f - s : s;
}
#else
struct Gelu {
  F value, slope;
};

// P(-|x|) = e^{-x^2/2} Q(v) with v = a |x| / (1 + a |x|): a minimax fit of e^{x^2/2} P(-|x|), relative error 1.3e-8, its
// constant term exact so that P is right to half a unit in the last place around zero. The same exponential is p(x).
static GK_INLINE Gelu gelu_exact(F x) {
  const F scaled = magnitude<float>(x) * 0.3252691328525543f;
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

template <typename T>
static GK_INLINE F gelu_value(F x, bool tanh) {
  return tanh ? gelu_tanh(x).value : gelu_exact(x).value;
}
template <typename T>
static GK_INLINE F gelu_slope(F x, bool tanh) {
  return tanh ? gelu_tanh(x).slope : gelu_exact(x).slope;
}
#endif

template <typename T>
static GK_INLINE Vec<double> gelu_value(Vec<double> x, bool tanh) {
  for (int64_t k = 0; k < WIDTH<double>; ++k) x[k] = gelu_double(x[k], tanh).value;
  return x;
}
template <typename T>
static GK_INLINE Vec<double> gelu_slope(Vec<double> x, bool tanh) {
  for (int64_t k = 0; k < WIDTH<double>; ++k) x[k] = gelu_double(x[k], tanh).slope;
  return x;
}

template <typename T, bool TANH>
static GK_INLINE Pair<Acc<T>> value_at(Pair<Acc<T>> x) {
  return {gelu_value<T>(x.a, TANH), gelu_value<T>(x.b, TANH)};
}
template <typename T, bool TANH>
static GK_INLINE Pair<Acc<T>> slope_at(Pair<Acc<T>> x) {
  return {gelu_slope<T>(x.a, TANH), gelu_slope<T>(x.b, TANH)};
}

template <typename T, bool TANH>
static void gelu_fwd_range(const T* x, T* y, int64_t begin, int64_t end) {
  int64_t k = begin;
  for (; k + STEP<T> <= end; k += STEP<T>) store_pair(y + k, value_at<T, TANH>(load_pair(x + k)));
  if (k < end) store_tail(y + k, value_at<T, TANH>(load_tail(x + k, end - k)), end - k);
}

template <typename T, bool TANH, bool TELEMETRY>
static void gelu_bwd_range(const T* dy_ptr, const T* x_ptr, T* dx_ptr, int64_t begin, int64_t end, Cell* cells) {
  Measure<T> measure_dy, measure_dx;
  for (int64_t first = begin; first < end; first += FOLD) {
    const int64_t last = std::min(end, first + FOLD);
    int64_t k = first;
    for (; k + STEP<T> <= last; k += STEP<T>) {
      store_pair(dx_ptr + k, load_pair(dy_ptr + k) * slope_at<T, TANH>(load_pair(x_ptr + k)));
      if (TELEMETRY) {
        add(measure_dy, dy_ptr + k);
        add(measure_dx, dx_ptr + k);
      }
    }
    if (k < last) {
      const auto dx = load_tail(dy_ptr + k, last - k) * slope_at<T, TANH>(load_tail(x_ptr + k, last - k));
      store_tail(dx_ptr + k, dx, last - k);
      if (TELEMETRY) {
        add_tail(measure_dy, dy_ptr + k, last - k);
        add_tail(measure_dx, dx_ptr + k, last - k);
      }
    }
    if (TELEMETRY) {
      fold(measure_dy, dy_ptr + first, last - first, cells[0]);
      fold(measure_dx, dx_ptr + first, last - first, cells[1]);
    }
  }
}

template <typename T>
static void gelu_fwd(const T* x, T* y, bool tanh, int64_t begin, int64_t end) {
  tanh ? gelu_fwd_range<T, true>(x, y, begin, end) : gelu_fwd_range<T, false>(x, y, begin, end);
}

template <typename T>
static void gelu_bwd(const T* dy, const T* x, T* dx, bool tanh, bool telemetry, int64_t begin, int64_t end, Cell* cells) {
  const auto range = tanh ? (telemetry ? gelu_bwd_range<T, true, true> : gelu_bwd_range<T, true, false>)
                          : (telemetry ? gelu_bwd_range<T, false, true> : gelu_bwd_range<T, false, false>);
  range(dy, x, dx, begin, end, cells);
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
    for_each_program(num_programs(num_blocks, POINTWISE_BLOCK), num_blocks, [&](int64_t, int64_t begin, int64_t end) {
      GK_CHOOSE((gelu_fwd<scalar_t>))(x_ptr, y_ptr, tanh, begin * POINTWISE_BLOCK, std::min(x.numel(), end * POINTWISE_BLOCK));
    });
  });
  return y;
}

Tensor gelu_bwd(const Tensor& dy_any, const Tensor& x_any, bool tanh, const OptionalTensor& stats) {
  check_floating("gelu_bwd", "x", x_any.scalar_type());
  check("gelu_bwd", "dy", dy_any, x_any.sizes(), x_any.scalar_type());
  check_stats("gelu_bwd", stats, 2);
  const Tensor x = dense(x_any), dy = laid_out_as(x, dy_any);
  Tensor dx = at::empty_like(x);
  const int64_t num_blocks = (x.numel() + POINTWISE_BLOCK - 1) / POINTWISE_BLOCK;
  const int64_t programs = num_programs(num_blocks, POINTWISE_BLOCK);
  std::vector<Cell> cells(2 * programs);
  GK_DISPATCH(x.scalar_type(), "gelu_bwd", [&] {
    const auto* dy_ptr = dy.const_data_ptr<scalar_t>();
    const auto* x_ptr = x.const_data_ptr<scalar_t>();
    auto* dx_ptr = dx.mutable_data_ptr<scalar_t>();
    for_each_program(programs, num_blocks, [&](int64_t program, int64_t begin, int64_t end) {
      GK_CHOOSE((gelu_bwd<scalar_t>))(dy_ptr, x_ptr, dx_ptr, tanh, stats.has_value(), begin * POINTWISE_BLOCK,
                                      std::min(x.numel(), end * POINTWISE_BLOCK), &cells[2 * program]);
    });
  });
  record(stats, 0, cells.data(), 2, programs, x.numel());
  record(stats, 1, cells.data() + 1, 2, programs, x.numel());
  return dx;
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("gelu_fwd", gk::gelu_fwd);
  m.impl("gelu_bwd", gk::gelu_bwd);
}
#endif
