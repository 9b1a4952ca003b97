// Vectors of one instruction set, written with the compiler's vector type so that every kernel is written once.
// Included inside namespace gk::GK_ISA, once per instruction set; no include guard.
// Loads widen to float (double stays double); stores round and return what was stored, widened again.

template <typename A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(GK_VECTOR_BYTES)));
  typedef int32_t integer __attribute__((vector_size(GK_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(GK_VECTOR_BYTES)));
  typedef uint16_t half_bits __attribute__((vector_size(GK_VECTOR_BYTES / 2)));
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(GK_VECTOR_BYTES)));
  typedef int64_t integer __attribute__((vector_size(GK_VECTOR_BYTES)));
};
template <typename A>
using Vec = typename Lanes<A>::type;
template <typename A>
constexpr int64_t WIDTH = GK_VECTOR_BYTES / sizeof(A);

typedef Vec<float> F;

template <typename A>
static GK_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

template <typename R, typename T>
static GK_INLINE R load_as(const T* p) {
  R result;
  __builtin_memcpy(&result, p, sizeof(R));
  return result;
}

static GK_INLINE F load(const float* p) { return load_as<F>(p); }
static GK_INLINE Vec<double> load(const double* p) { return load_as<Vec<double>>(p); }
static GK_INLINE F load(const c10::BFloat16* p) {
  return (F)(__builtin_convertvector(load_as<Lanes<float>::half_bits>(p), Lanes<float>::bits) << 16);
}
static GK_INLINE F load(const c10::Half* p) {
#if GK_VECTOR_BYTES == 64
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif GK_VECTOR_BYTES == 32
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  F result;
  for (int64_t k = 0; k < WIDTH<float>; ++k) result[k] = (float)p[k];
  return result;
#endif
}

static GK_INLINE F store(float* p, F v) {
  __builtin_memcpy(p, &v, sizeof(F));
  return v;
}
static GK_INLINE Vec<double> store(double* p, Vec<double> v) {
  __builtin_memcpy(p, &v, sizeof(v));
  return v;
}
static GK_INLINE F store(c10::BFloat16* p, F v) {
  typedef Lanes<float>::bits Bits;
  const Bits bits = (Bits)v;
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;  // nearest, ties to even
  rounded = v == v ? rounded : Bits{} + 0x7fc00000u;
  const auto stored = __builtin_convertvector(rounded >> 16, Lanes<float>::half_bits);
  __builtin_memcpy(p, &stored, sizeof(stored));
  return (F)rounded;
}
static GK_INLINE F store(c10::Half* p, F v) {
#if GK_VECTOR_BYTES == 64
  const __m256i stored = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256((__m256i*)p, stored);
  return (F)_mm512_cvtph_ps(stored);
#elif GK_VECTOR_BYTES == 32
  const __m128i stored = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128((__m128i*)p, stored);
  return (F)_mm256_cvtph_ps(stored);
#else
  for (int64_t k = 0; k < WIDTH<float>; ++k) p[k] = v[k];
  return load(p);
#endif
}

// The last `count` < WIDTH elements of a row; the other lanes are zero and are not touched in memory.
template <typename T>
static GK_INLINE Vec<Acc<T>> load_tail(const T* p, int64_t count) {
  T padded[WIDTH<Acc<T>>] = {};
  __builtin_memcpy((void*)padded, p, count * sizeof(T));
  return load(padded);
}
template <typename T>
static GK_INLINE Vec<Acc<T>> store_tail(T* p, Vec<Acc<T>> v, int64_t count) {
  T padded[WIDTH<Acc<T>>];
  v = store(padded, v);
  __builtin_memcpy((void*)p, padded, count * sizeof(T));
  return v;
}
#if GK_VECTOR_BYTES == 64
static GK_INLINE F load_tail(const float* p, int64_t count) { return (F)_mm512_maskz_loadu_ps((1u << count) - 1, p); }
static GK_INLINE F load_tail(const c10::BFloat16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16((1u << count) - 1, p);
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
static GK_INLINE F store_tail(float* p, F v, int64_t count) {
  _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v);
  return v;
}
#endif

// a < b ? a : b and a > b ? a : b, lane by lane: b where either is NaN.
template <typename V>
static GK_INLINE V lower(V a, V b) {
  return a < b ? a : b;
}
template <typename V>
static GK_INLINE V higher(V a, V b) {
  return a > b ? a : b;
}

template <typename A>
static GK_INLINE Vec<A> magnitude(Vec<A> v) {
  typedef typename Lanes<A>::integer Integer;
  const Integer sign = Integer{} + (typename std::conditional_t<sizeof(A) == 4, int32_t, int64_t>)(1ull << (8 * sizeof(A) - 1));
  return (Vec<A>)((Integer)v & ~sign);
}

// The running largest and smallest magnitude; a NaN in v leaves them as they are.
template <typename A>
static GK_INLINE Vec<A> higher_magnitude(Vec<A> v, Vec<A> running) {
#if GK_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return (F)_mm512_range_ps((__m512)v, (__m512)running, 0b1011);
#endif
  return higher(magnitude<A>(v), running);
}
template <typename A>
static GK_INLINE Vec<A> lower_magnitude(Vec<A> v, Vec<A> running) {
#if GK_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return (F)_mm512_range_ps((__m512)v, (__m512)running, 0b1010);
#endif
  return lower(magnitude<A>(v), running);
}

// Reductions over the lanes, in an order that depends on the instruction set alone.
template <typename A>
static GK_INLINE A sum(Vec<A> v) {
#if GK_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_ps((__m512)v);
  if constexpr (sizeof(A) == 8) return _mm512_reduce_add_pd((__m512d)v);
#elif GK_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
#endif
  A result = v[0];
  for (int64_t k = 1; k < WIDTH<A>; ++k) result += v[k];
  return result;
}
template <typename A>
static GK_INLINE A max(Vec<A> v) {
  A result = v[0];
  for (int64_t k = 1; k < WIDTH<A>; ++k) result = v[k] > result ? v[k] : result;
  return result;
}
template <typename A>
static GK_INLINE A min(Vec<A> v) {
  A result = v[0];
  for (int64_t k = 1; k < WIDTH<A>; ++k) result = v[k] < result ? v[k] : result;
  return result;
}

// e^v for v in [-87.33, 88.3], within 1.5 units in the last place; powers below the smallest normal float are not reached.
// Range reduction to |r| <= ln(2)/2, then a polynomial (Moshier, Cephes expf) and the exponent added as an integer.
static GK_INLINE F exponential(F v) {
  const F shifted = v * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest to v / ln 2 in the low bits
  const F n = shifted - 12582912.0f;
  const F r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = F{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  typedef Lanes<float>::bits Bits;
  return (F)((Bits)p + ((Bits)shifted << 23));
}
