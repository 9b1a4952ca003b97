// Vectors of one instruction set, written with the compiler's vector type so that every kernel is written once.
// Included inside namespace gk::GK_ISA, once per instruction set; no include guard.
// Loads widen to float (double stays double); stores round to nearest even.

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
#if GK_VECTOR_BYTES == 64
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif GK_VECTOR_BYTES == 32
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (F)(__builtin_convertvector(load_as<Lanes<float>::half_bits>(p), Lanes<float>::bits) << 16);
#endif
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

static GK_INLINE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof(v)); }
static GK_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }
static GK_INLINE void store(c10::BFloat16* p, F v) {
  typedef Lanes<float>::bits Bits;
  const Bits bits = (Bits)v;
  Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);  // nearest, ties to even
  rounded = v == v ? rounded : Bits{} + 0x7fc00000u;
  const auto stored = __builtin_convertvector(rounded >> 16, Lanes<float>::half_bits);
  __builtin_memcpy(p, &stored, sizeof(stored));
}
static GK_INLINE void store(c10::Half* p, F v) {
#if GK_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif GK_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t k = 0; k < WIDTH<float>; ++k) p[k] = v[k];
#endif
}

// Loops walk in pairs of vectors, STEP elements: a 16-bit pair fills one vector register.
template <typename A>
struct Pair {
  Vec<A> a, b;
};
template <typename T>
constexpr int64_t STEP = 2 * WIDTH<Acc<T>>;

template <typename A>
static GK_INLINE Pair<A> operator+(Pair<A> x, Pair<A> y) {
  return {x.a + y.a, x.b + y.b};
}
template <typename A>
static GK_INLINE Pair<A> operator-(Pair<A> x, Pair<A> y) {
  return {x.a - y.a, x.b - y.b};
}
template <typename A>
static GK_INLINE Pair<A> operator*(Pair<A> x, Pair<A> y) {
  return {x.a * y.a, x.b * y.b};
}
template <typename A>
static GK_INLINE void operator+=(Pair<A>& x, Pair<A> y) {
  x.a += y.a;
  x.b += y.b;
}
template <typename A>
static GK_INLINE Pair<A> pair(A value) {
  return {broadcast<A>(value), broadcast<A>(value)};
}

template <typename T>
static GK_INLINE Pair<Acc<T>> load_pair(const T* p) {
  return {load(p), load(p + WIDTH<Acc<T>>)};
}
template <typename T>
static GK_INLINE void store_pair(T* p, Pair<Acc<T>> v) {
#ifdef GK_HAS_BF16
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    // The conversion instruction takes subnormal floats for zero, so a pair that holds one goes the long way.
    const auto subnormal = _mm512_fpclass_ps_mask((__m512)v.a, 0x20) | _mm512_fpclass_ps_mask((__m512)v.b, 0x20);
    if (__builtin_expect(subnormal == 0, 1)) {
      _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a));
      return;
    }
  }
#endif
  store(p, v.a);
  store(p + WIDTH<Acc<T>>, v.b);
}

// The last `count` < STEP elements of a row; the other lanes are zero and are not touched in memory.
template <typename T>
static GK_INLINE Pair<Acc<T>> load_tail(const T* p, int64_t count) {
  T padded[STEP<T>] = {};
  __builtin_memcpy((void*)padded, p, count * sizeof(T));
  return load_pair(padded);
}
template <typename T>
static GK_INLINE void store_tail(T* p, Pair<Acc<T>> v, int64_t count) {
  T padded[STEP<T>];
  store_pair(padded, v);
  __builtin_memcpy((void*)p, padded, count * sizeof(T));
}

// a < b ? a : b and a > b ? a : b, lane by lane: b where either is NaN. For floats that is one instruction, which the
// compiler does not find by itself.
template <typename V>
static GK_INLINE V lower(V a, V b) {
#if GK_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, F>) return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif GK_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<V, F>) return (F)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}
template <typename V>
static GK_INLINE V higher(V a, V b) {
#if GK_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, F>) return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif GK_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<V, F>) return (F)_mm256_max_ps((__m256)a, (__m256)b);
#endif
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
static GK_INLINE A sum(Pair<A> v) {
  return sum<A>(v.a + v.b);
}
template <typename A>
static GK_INLINE A max(Vec<A> v) {
#if GK_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return _mm512_reduce_max_ps((__m512)v);
#endif
  A result = v[0];
  for (int64_t k = 1; k < WIDTH<A>; ++k) result = v[k] > result ? v[k] : result;
  return result;
}
template <typename A>
static GK_INLINE A min(Vec<A> v) {
#if GK_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return _mm512_reduce_min_ps((__m512)v);
#endif
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
