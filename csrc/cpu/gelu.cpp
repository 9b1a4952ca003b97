// GELU (Hendrycks and Gimpel 2016), exact and tanh form.
//   exact  y = x P(x), P the standard normal distribution function;  dx = dy (P(x) + x p(x))
//   tanh   y = x S(u), S the logistic function, u = 2 sqrt(2 / pi) (x + 0.044715 x^3);  dx = dy (S + x S (1 - S) u')
// One program owns a contiguous range of elements, walked in blocks of POINTWISE_BLOCK.
#define GK_SOURCE "gelu.cpp"
#include "each_isa.h"

#ifdef GK_ISA
namespace gk::GK_ISA {
#include "vec.h"

#include "measure.h"

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

struct GeluScalar {
  double value, slope;
};

static GK_INLINE GeluScalar gelu_double(double x, bool tanh) {
  if (tanh) {
    const double scale = 0.79788456080286535588, cubic = 0.044715;
    const double t = std::tanh(scale * (x + cubic * x * x * x));
    const double slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * cubic * x * x);
    return {0.5 * x * (1 + t), slope};
  }
  const double probability = 0.5 * std::erfc(-x * 0.70710678118654752440);
  return {x * probability, probability + x * 0.39894228040143267794 * std::exp(-0.5 * x * x)};
}

template <typename A>
static GK_INLINE void gelu(Vec<A> x, bool tanh, Vec<A>& value, Vec<A>& slope) {
  if constexpr (sizeof(A) == 4) {
    const Gelu g = tanh ? gelu_tanh(x) : gelu_exact(x);
    value = g.value;
    slope = g.slope;
  } else {
    for (int64_t k = 0; k < WIDTH<A>; ++k) {
      const GeluScalar g = gelu_double(x[k], tanh);
      value[k] = g.value;
      slope[k] = g.slope;
    }
  }
}

template <typename T, bool TANH>
static void gelu_fwd_range(const T* x, T* y, int64_t begin, int64_t end) {
  using A = Acc<T>;
  Vec<A> value, slope;
  int64_t k = begin;
  for (; k + WIDTH<A> <= end; k += WIDTH<A>) {
    gelu<A>(load(x + k), TANH, value, slope);
    store(y + k, value);
  }
  if (k < end) {
    gelu<A>(load_tail(x + k, end - k), TANH, value, slope);
    store_tail(y + k, value, end - k);
  }
}

template <typename T, bool TANH, bool TELEMETRY>
static void gelu_bwd_range(const T* dy_ptr, const T* x_ptr, T* dx_ptr, int64_t begin, int64_t end, Cell* cells) {
  using A = Acc<T>;
  Measure<A> measure_dy, measure_dx;
  Vec<A> value, slope;
  for (int64_t first = begin; first < end; first += POINTWISE_BLOCK) {
    const int64_t last = std::min(end, first + POINTWISE_BLOCK);
    int64_t k = first;
    for (; k + WIDTH<A> <= last; k += WIDTH<A>) {
      const Vec<A> dy = load(dy_ptr + k);
      gelu<A>(load(x_ptr + k), TANH, value, slope);
      const Vec<A> dx = store(dx_ptr + k, dy * slope);
      if (TELEMETRY) {
        measure_dy.add(dy);
        measure_dx.add(dx);
      }
    }
    if (k < last) {
      const Vec<A> dy = load_tail(dy_ptr + k, last - k);
      gelu<A>(load_tail(x_ptr + k, last - k), TANH, value, slope);
      const Vec<A> dx = store_tail(dx_ptr + k, dy * slope, last - k);
      if (TELEMETRY) {
        measure_dy.add_tail(dy, last - k);
        measure_dx.add_tail(dx, last - k);
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
