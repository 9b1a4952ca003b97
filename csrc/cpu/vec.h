// Vectors of one instruction set, written with the compiler's vector type so that every kernel is written once.
// Included inside namespace gk::GK_ISA, once per instruction set; no include guard.
// Loads upcast to float (double stays double); stores round to nearest even.

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
#if GK_VECTOR_BYTES == 64
static GK_INLINE F upcast(__m256i bits, c10::BFloat16) { return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16); }
static GK_INLINE F upcast(__m256i bits, c10::Half) { return (F)_mm512_cvtph_ps(bits); }
static GK_INLINE F load(const c10::BFloat16* p) { return upcast(_mm256_loadu_si256((const __m256i*)p), c10::BFloat16()); }
static GK_INLINE F load(const c10::Half* p) { return upcast(_mm256_loadu_si256((const __m256i*)p), c10::Half()); }
#else
static GK_INLINE F load(const c10::BFloat16* p) {
#if GK_VECTOR_BYTES == 32
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (F)(__builtin_convertvector(load_as<Lanes<float>::half_bits>(p), Lanes<float>::bits) << 16);
#endif
}
static GK_INLINE F load(const c10::Half* p) {
#if GK_VECTOR_BYTES == 32
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  F result;
  for (int64_t k = 0; k < WIDTH<float>; ++k) result[k] = (float)p[k];
  return result;
#endif
}
#endif

static GK_INLINE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof(v)); }
static GK_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }
static GK_INLINE Lanes<float>::half_bits downcast(F v, c10::BFloat16) {
  typedef Lanes<float>::bits Bits;
  const Bits bits = (Bits)v;
  Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);  // nearest, ties to even
  rounded = v == v ? rounded : Bits{} + 0x7fc00000u;
  return __builtin_convertvector(rounded >> 16, Lanes<float>::half_bits);
}
static GK_INLINE Lanes<float>::half_bits downcast(F v, c10::Half) {
#if GK_VECTOR_BYTES == 64
  return (Lanes<float>::half_bits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif GK_VECTOR_BYTES == 32
  return (Lanes<float>::half_bits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  Lanes<float>::half_bits result;
  for (int64_t k = 0; k < WIDTH<float>; ++k) result[k] = c10::Half(v[k]).x;
  return result;
#endif
}
template <typename T>
static GK_INLINE void store(T* p, F v) {
  const auto stored = downcast(v, T());
  __builtin_memcpy((void*)p, &stored, sizeof(stored));
}

// Loops go in pairs of vectors, STEP elements: a 16-bit pair fills one vector register.
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
static GK_INLINE Pair<A> operator*(Pair<A> x, Pair<A> y) {
  return {x.a * y.a, x.b * y.b};
}
// With one vector for both of a pair: a number in every lane.
template <typename A>
static GK_INLINE Pair<A> operator-(Pair<A> x, typename Lanes<A>::type y) {
  return {x.a - y, x.b - y};
}
template <typename A>
static GK_INLINE Pair<A> operator*(Pair<A> x, typename Lanes<A>::type y) {
  return {x.a * y, x.b * y};
}
template <typename A>
static GK_INLINE Pair<A> operator-(Pair<A> x, Pair<A> y) {
  return {x.a - y.a, x.b - y.b};
}
template <typename A>
static GK_INLINE void operator+=(Pair<A>& x, Pair<A> y) {
  x.a += y.a;
  x.b += y.b;
}
// A running sum takes a single vector too.
template <typename A>
static GK_INLINE void operator+=(Pair<A>& x, typename Lanes<A>::type y) {
  x.a += y;
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

// How a loop reads and writes the elements of an array of T: a pair of vectors at a time, as long as there are so many.
template <typename T>
struct Whole {
  using type = T;

  template <typename U>
  GK_INLINE Pair<Acc<T>> load(const U* p) const {
    return load_pair(p);
  }
  template <typename U>
  GK_INLINE void store(U* p, Pair<Acc<T>> v) const {
    store_pair(p, v);
  }
  GK_INLINE Pair<Acc<T>> keep(Pair<Acc<T>> v) const { return v; }
  template <typename Bits, typename U>
  GK_INLINE Bits load_bits(const U* p) const {
    return load_as<Bits>(p);
  }
  // The same of an array that goes on behind its last element, in whole vectors.
  GK_INLINE Pair<Acc<T>> load_column(const Acc<T>* p) const { return load_pair(p); }
  GK_INLINE void store_column(Acc<T>* p, Pair<Acc<T>> v) const { store_pair(p, v); }
};

// And then single vectors, of which the first `count` lanes are elements and the others zero.
// With `room` the whole vector is the caller's to read and to write: what stands behind the elements is read and left out, and
// overwritten with anything. AVX-512 needs none: it reads and writes the lanes it is told to.
template <typename T>
struct Part {
  using type = T;
  using A = Acc<T>;
  GK_INLINE Vec<A> load_column(const A* p) const { return gk::GK_ISA::load(p); }
  GK_INLINE void store_column(A* p, Vec<A> v) const { gk::GK_ISA::store(p, v); }
#if GK_VECTOR_BYTES == 64
  GK_INLINE Part(int64_t count, bool) : lanes(count >= WIDTH<A> ? ~0u : (1u << count) - 1) {}
  GK_INLINE Vec<A> load(const float* p) const { return (F)_mm512_maskz_loadu_ps((__mmask16)lanes, p); }
  GK_INLINE Vec<A> load(const double* p) const { return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)lanes, p); }
  template <typename U>
  GK_INLINE Vec<A> load(const U* p) const {
    return upcast(_mm256_maskz_loadu_epi16((__mmask16)lanes, p), U());
  }
  template <typename Bits, typename U>
  GK_INLINE Bits load_bits(const U* p) const {
    return (Bits)_mm512_zextsi256_si512(_mm256_maskz_loadu_epi16((__mmask16)lanes, p));
  }
  GK_INLINE void store(float* p, F v) const { _mm512_mask_storeu_ps(p, (__mmask16)lanes, (__m512)v); }
  GK_INLINE void store(double* p, Vec<double> v) const { _mm512_mask_storeu_pd(p, (__mmask8)lanes, (__m512d)v); }
  template <typename U>
  GK_INLINE void store(U* p, F v) const {
    _mm256_mask_storeu_epi16(p, (__mmask16)lanes, (__m256i)downcast(v, U()));
  }
  GK_INLINE F keep(F v) const { return (F)_mm512_maskz_mov_ps((__mmask16)lanes, (__m512)v); }
  GK_INLINE Vec<double> keep(Vec<double> v) const { return (Vec<double>)_mm512_maskz_mov_pd((__mmask8)lanes, (__m512d)v); }

  uint32_t lanes;
#else
  typedef typename Lanes<A>::integer Integer;

  GK_INLINE Part(int64_t count, bool room) : count(count), room(room) {
    for (int64_t k = 0; k < WIDTH<A>; ++k) lanes[k] = k < count ? -1 : 0;
  }
  template <typename U>
  GK_INLINE Vec<A> load(const U* p) const {
    if (room) return keep(gk::GK_ISA::load(p));
    U padded[WIDTH<A>] = {};
    __builtin_memcpy((void*)padded, p, count * sizeof(U));
    return gk::GK_ISA::load(padded);
  }
  // The bits of 16-bit elements, in a vector that has zeros in its second half.
  template <typename Bits, typename U>
  GK_INLINE Bits load_bits(const U* p) const {
    U padded[STEP<T>] = {};
    __builtin_memcpy((void*)padded, p, count * sizeof(U));
    return load_as<Bits>(padded);
  }
  template <typename U>
  GK_INLINE void store(U* p, Vec<A> v) const {
    if (room) return gk::GK_ISA::store(p, v);
    U padded[WIDTH<A>];
    gk::GK_ISA::store(padded, v);
    __builtin_memcpy((void*)p, padded, count * sizeof(U));
  }
  GK_INLINE Vec<A> keep(Vec<A> v) const { return (Vec<A>)((Integer)v & lanes); }

  int64_t count;
  bool room;
  Integer lanes;
#endif
};

// Asks for memory that a pair of vectors will be read from soon. It need not be the tensor's.
template <typename T>
static GK_INLINE void prefetch_pair(const T* p) {
  for (size_t byte = 0; byte < STEP<T> * sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
}

// Calls body(access, k) for every k of [begin, end) that a vector or pair of vectors of T starts at.
template <typename T, typename Body>
static GK_INLINE void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t k = begin;
  for (; k + STEP<T> <= end; k += STEP<T>) body(Whole<T>(), k);
  for (; k < end; k += WIDTH<Acc<T>>) body(Part<T>(std::min(WIDTH<Acc<T>>, end - k), false), k);
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
  const Integer sign = Integer{} + (std::conditional_t<sizeof(A) == 4, int32_t, int64_t>)(1ull << (8 * sizeof(A) - 1));
  return (Vec<A>)((Integer)v & ~sign);
}

// Lanes of integer vectors as counters and as magnitudes: the bits of a float without its sign, which order as it does.
#if GK_VECTOR_BYTES == 64
#define GK_INTEGER_LANES(bits, type, mask)                                                                             \
  typedef int##bits##_t type __attribute__((vector_size(64)));                                                         \
  static GK_INLINE type higher_bits(type a, type b) { return (type)_mm512_max_epi##bits((__m512i)a, (__m512i)b); }     \
  static GK_INLINE type one_where_nonzero(type magnitudes) {                                                           \
    return (type)_mm512_min_epi##bits((__m512i)magnitudes, (__m512i)(type{} + 1));                                     \
  }                                                                                                                    \
  static GK_INLINE mask where_at_most(type v, type limit) {                                                            \
    return _mm512_cmple_epi##bits##_mask((__m512i)v, (__m512i)limit);                                                  \
  }                                                                                                                    \
  static GK_INLINE void count_where(mask lanes, type& counter) {                                                       \
    counter = (type)_mm512_mask_sub_epi##bits((__m512i)counter, lanes, (__m512i)counter, _mm512_set1_epi32(-1));       \
  }                                                                                                                    \
  static GK_INLINE type keep_where(mask lanes, type v) { return (type)_mm512_maskz_mov_epi##bits(lanes, (__m512i)v); } \
  static GK_INLINE type higher_where(mask lanes, type v, type running) {                                               \
    return (type)_mm512_mask_max_epi##bits((__m512i)running, lanes, (__m512i)v, (__m512i)running);                     \
  }
GK_INTEGER_LANES(16, Integers16, __mmask32)
GK_INTEGER_LANES(32, Integers32, __mmask16)
GK_INTEGER_LANES(64, Integers64, __mmask8)
#undef GK_INTEGER_LANES
static GK_INLINE F add_square_where(__mmask16 lanes, F v, F sum) {
  return (F)_mm512_mask3_fmadd_ps((__m512)v, (__m512)v, (__m512)sum, lanes);
}
static GK_INLINE Vec<double> add_square_where(__mmask8 lanes, Vec<double> v, Vec<double> sum) {
  return (Vec<double>)_mm512_mask3_fmadd_pd((__m512d)v, (__m512d)v, (__m512d)sum, lanes);
}
#else
template <typename I>
static GK_INLINE I higher_bits(I a, I b) {
  return a > b ? a : b;
}
template <typename I>
static GK_INLINE I one_where_nonzero(I magnitudes) {
  return -(I)(magnitudes > 0);
}
template <typename I>
static GK_INLINE I where_at_most(I v, I limit) {
  return (I)(v <= limit);
}
template <typename I>
static GK_INLINE void count_where(I lanes, I& counter) {
  counter -= lanes;
}
template <typename I>
static GK_INLINE I keep_where(I lanes, I v) {
  return v & lanes;
}
template <typename I>
static GK_INLINE I higher_where(I lanes, I v, I running) {
  return higher_bits(v & lanes, running);
}
template <typename I, typename V>
static GK_INLINE V add_square_where(I lanes, V v, V sum) {
  v = (V)((I)v & lanes);
  return sum + v * v;
}
#endif

// The running largest magnitude; a NaN in v leaves it as it is.
template <typename A>
static GK_INLINE Vec<A> higher_magnitude(Vec<A> v, Vec<A> running) {
#if GK_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return (F)_mm512_range_ps((__m512)v, (__m512)running, 0b1011);
#endif
  return higher(magnitude<A>(v), running);
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
// e^v for v in [-87.33, 88.3], within 1.5 units in the last place; powers below the smallest normal float are not reached.
// Range reduction to |r| <= ln(2)/2, then a polynomial (Moshier, Cephes expf) and the exponent added as an integer; which makes
// a number of a NaN whose low bits are not zero.
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
