// The statistics of a gradient, formed from the values that a backward loop already holds in registers.
// Included inside namespace gk::GK_ISA after vec.h, once per instruction set; no include guard.
//
// Per vector: one multiply-add for the sum of squares, one instruction for the running |max|, one for the running |min|.
// Per block the lanes are folded into a Cell in float64. A block whose sum of squares is not safely inside float's range
// (1e-30 or 1e+30 everywhere, an infinity, a NaN) is read again, exactly, in float64; a block whose smallest magnitude is
// zero is read again to count its zeros.

// Elements between two folds: 256 additions to a float, whose rounding stays below 1e-5 even where all are equal.
constexpr int64_t FOLD = 512 * WIDTH<float>;

// What add() takes is memory just read or just written, so that a value is measured as stored.
template <typename T>
struct Measure {
  using A = Acc<T>;
  Pair<A> square_sum{};
  Vec<A> largest{}, smallest = Vec<A>{} + std::numeric_limits<A>::infinity();

  GK_INLINE void add_sums(const T* p) {
    const Pair<A> v = load_pair(p);
    square_sum += v * v;
    largest = higher_magnitude<A>(v.b, higher_magnitude<A>(v.a, largest));
  }
  GK_INLINE void add_smallest(const T* p) {
    const Pair<A> v = load_pair(p);
    smallest = lower_magnitude<A>(v.b, lower_magnitude<A>(v.a, smallest));
  }
  GK_INLINE A sum_of_squares() const { return sum<A>(square_sum); }
  GK_INLINE A largest_magnitude() const { return max<A>(largest); }
  GK_INLINE bool saw_zero() const { return min<A>(smallest) == 0; }
};

#ifdef GK_HAS_BF16
// Both vectors of a pair at once: bfloat16 magnitudes order as 16-bit integers, and one instruction sums 32 squares. It takes
// subnormals for zero and rounds the sum of two squares twice; neither shows at the precision of a block.
template <>
struct Measure<c10::BFloat16> {
  typedef uint16_t Bits __attribute__((vector_size(GK_VECTOR_BYTES)));
  F square_sum{};
  Bits largest{}, smallest = Bits{} + 0x7fff;

  GK_INLINE void add_sums(const c10::BFloat16* p) {
    const Bits bits = load_as<Bits>(p);
    square_sum = (F)_mm512_dpbf16_ps((__m512)square_sum, (__m512bh)bits, (__m512bh)bits);
    largest = higher(largest, bits & 0x7fff);
  }
  GK_INLINE void add_smallest(const c10::BFloat16* p) { smallest = lower(smallest, load_as<Bits>(p) & 0x7fff); }
  GK_INLINE float sum_of_squares() const { return sum<float>(square_sum); }
  GK_INLINE float largest_magnitude() const {
    const __m512i bits = (__m512i)largest;
    const uint32_t high = _mm512_reduce_max_epu32(bits) >> 16, low = _mm512_reduce_max_epu32(_mm512_slli_epi32(bits, 16)) >> 16;
    return c10::BFloat16(static_cast<uint16_t>(std::max(high, low)), c10::BFloat16::from_bits());
  }
  GK_INLINE bool saw_zero() const { return _mm512_testn_epi16_mask((__m512i)smallest, (__m512i)smallest) != 0; }
};
#endif

template <typename T>
static GK_INLINE void add(Measure<T>& measure, const T* p) {
  measure.add_sums(p);
  measure.add_smallest(p);
}

// The same for the last `count` < STEP elements of a row. Zeros fill up the pair for the sums, and p[0] for the minimum.
template <typename T>
static GK_INLINE void add_tail(Measure<T>& measure, const T* p, int64_t count) {
  T padded[STEP<T>] = {};
  std::copy(p, p + count, padded);
  measure.add_sums(padded);
  std::fill(padded + count, padded + STEP<T>, p[0]);
  measure.add_smallest(padded);
}

template <typename T>
static int64_t count_zeros(const T* p, int64_t count) {
  int64_t zeros = 0;
  if constexpr (sizeof(T) == 2) {
    const auto* bits = reinterpret_cast<const uint16_t*>(p);
    for (int64_t k = 0; k < count; ++k) zeros += (bits[k] & 0x7fff) == 0;
  } else {
    for (int64_t k = 0; k < count; ++k) zeros += p[k] == 0;
  }
  return zeros;
}

// Adds squares, largest magnitude and the number of non-finite elements of p[0 .. count), each exact to float64.
template <typename T>
static void measure_exactly(const T* p, int64_t count, Cell& cell) {
  typedef float HalfVector __attribute__((vector_size(GK_VECTOR_BYTES / 2)));
  typedef Lanes<float>::integer Integer;
  Vec<double> square_sum{};
  F largest{};
  Integer nonfinite{};
  for (int64_t k = 0; k < count; k += WIDTH<float>) {
    F v = magnitude<float>(k + WIDTH<float> <= count ? load(p + k) : load_tail(p + k, count - k).a);
    const Integer finite = v <= std::numeric_limits<float>::max();  // -1 where true
    nonfinite += 1 + finite;
    v = (F)((Integer)v & finite);
    largest = higher(v, largest);
    HalfVector halves[2];
    __builtin_memcpy(halves, &v, sizeof(v));
    for (const HalfVector& half : halves) {
      const auto wide = __builtin_convertvector(half, Vec<double>);
      square_sum += wide * wide;
    }
  }
  cell.square_sum += sum<double>(square_sum);
  cell.abs_max = std::max(cell.abs_max, static_cast<double>(max<float>(largest)));
  for (int64_t k = 0; k < WIDTH<float>; ++k) cell.nonfinite_count += nonfinite[k];
}
template <>
void measure_exactly(const double* p, int64_t count, Cell& cell) {
  constexpr double SMALL = 0x1p-480, LARGE = 0x1p480, SCALE = 0x1p537;  // see Cell
  for (int64_t k = 0; k < count; ++k) {
    const double v = std::fabs(p[k]);
    if (!(v <= std::numeric_limits<double>::max())) {
      cell.nonfinite_count += 1;
      continue;
    }
    cell.abs_max = std::max(cell.abs_max, v);
    if (v > LARGE) {
      cell.square_sum_huge += (v / SCALE) * (v / SCALE);
    } else if (v < SMALL) {
      cell.square_sum_tiny += (v * SCALE) * (v * SCALE);
    } else {
      cell.square_sum += v * v;
    }
  }
}

// Adds a block to the cell and starts the next one. `p` is the block's memory: p[0 .. count), the values as stored.
template <typename T>
static void fold(Measure<T>& measure, const T* p, int64_t count, Cell& cell) {
  using A = Acc<T>;
  constexpr A SMALLEST_SAFE = sizeof(A) == 4 ? A(0x1p-60) : A(0x1p-900);  // squares lost below it do not show in the sum
  const A square_sum = measure.sum_of_squares();
  if (square_sum >= SMALLEST_SAFE && square_sum <= std::numeric_limits<A>::max()) {
    cell.square_sum += static_cast<double>(square_sum);
    cell.abs_max = std::max(cell.abs_max, static_cast<double>(measure.largest_magnitude()));
  } else {
    measure_exactly(p, count, cell);
  }
  if (measure.saw_zero()) cell.zero_count += static_cast<double>(count_zeros(p, count));
  measure = Measure<T>{};
}

// The statistics of p[0 .. count), for tensors that no kernel's loop holds in registers.
template <typename T>
static void measure_array(const T* p, int64_t count, Cell& cell) {
  Measure<T> measure;
  for (int64_t begin = 0; begin < count; begin += FOLD) {
    const int64_t end = std::min(count, begin + FOLD);
    int64_t k = begin;
    for (; k + STEP<T> <= end; k += STEP<T>) add(measure, p + k);
    if (k < end) add_tail(measure, p + k, end - k);
    fold(measure, p + begin, end - begin, cell);
  }
}
