// The statistics of a gradient, formed from memory that a backward loop has just read or written, so that a value is measured
// as stored, while it is in the first-level cache.
// Included inside namespace gk::GK_ISA after vec.h, once per instruction set; no include guard.
//
// Per vector: one multiply-add for the sum of squares, one instruction for the running |max|, two to count zeros. Per block the
// lanes are folded into a Cell in float64. A chunk whose squares leave float's range (1e-30 or 1e+30 everywhere, an infinity, a
// NaN) is measured again, and everything after it, in a careful loop that leaves out what is not finite, counts it, and squares
// the elements times a power of two that brings them into range.

constexpr int64_t FOLD = 512 * WIDTH<float>;  // elements between two folds: 256 additions to a float, rounded below 1e-5
constexpr int64_t CHUNK = 1024;               // elements that a loop hands over at a time, about: a few kB of each tensor

// What is added up over a vector's lanes. Counters are vectors too, of integers as wide as T.
template <typename T>
struct Sums {
  using A = Acc<T>;
  typedef typename Lanes<A>::integer Integer;
  Pair<A> square_sum{}, largest{};
  Integer zeros{}, nonfinite{};

  template <bool CAREFUL>
  GK_INLINE void add(const T* p, Vec<A> scale) {
    const Pair<A> v = load_pair(p);
    add_vector<CAREFUL>(v.a, scale, square_sum.a, largest.a);
    add_vector<CAREFUL>(v.b, scale, square_sum.b, largest.b);
  }
  GK_INLINE A largest_magnitude() const { return max<A>(higher(largest.a, largest.b)); }

 private:
  template <bool CAREFUL>
  GK_INLINE void add_vector(Vec<A> v, Vec<A> scale, Vec<A>& squares, Vec<A>& peak) {
    count_if(zeros, where_zero((Integer)v, magnitude_bits<A>()));
    if (CAREFUL) {
      const auto outside = where_above((Integer)magnitude<A>(v), (Integer)broadcast<A>(std::numeric_limits<A>::max()));
      count_if(nonfinite, outside);
      v = (Vec<A>)zero_where(outside, (Integer)v);
    }
    peak = higher_magnitude<A>(v, peak);
    if (CAREFUL) v *= scale;
    squares += v * v;
  }
};

// 16-bit elements are looked at as integers, a pair of vectors at once: their magnitudes order as these do.
template <typename T>
struct Sums16 {
  typedef int16_t Integer __attribute__((vector_size(GK_VECTOR_BYTES)));
  static constexpr int16_t INFINITE = std::is_same_v<T, c10::Half> ? 0x7c00 : 0x7f80;
  Pair<float> square_sum{};
  Integer largest{}, zeros{}, nonfinite{};

  template <bool CAREFUL>
  GK_INLINE void add(const T* p, F scale) {
    Integer bits = load_as<Integer>(p), magnitudes = bits & 0x7fff;
    count_if(zeros, where_zero(magnitudes, magnitudes));
    if (CAREFUL) {
      const auto outside = where_above(magnitudes, Integer{} + int16_t(INFINITE - 1));
      count_if(nonfinite, outside);
      bits = zero_where(outside, bits);
      magnitudes = zero_where(outside, magnitudes);
      const Pair<float> v = floats(bits) * scale;
      square_sum += v * v;
    } else {
      add_squares(p, bits);
    }
    largest = higher(largest, magnitudes);
  }
  GK_INLINE float largest_magnitude() const {
    int16_t lanes[STEP<T>], peak = 0;
    __builtin_memcpy(lanes, &largest, sizeof(largest));
    for (int64_t k = 0; k < STEP<T>; ++k) peak = std::max(peak, lanes[k]);
    return T(static_cast<uint16_t>(peak), T::from_bits());
  }

 private:
  // In no order that matters to a sum: the elements at even and those at odd places.
  static GK_INLINE Pair<float> floats(Integer bits) {
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      typedef Lanes<float>::bits Bits;
      return {(F)((Bits)bits << 16), (F)((Bits)bits & 0xffff0000u)};
    } else {
      T copy[STEP<T>];
      __builtin_memcpy((void*)copy, &bits, sizeof(bits));
      return load_pair(copy);
    }
  }
  GK_INLINE void add_squares([[maybe_unused]] const T* p, [[maybe_unused]] Integer bits) {
#ifdef GK_HAS_BF16
    // One instruction sums 32 squares. It takes subnormals for zero and rounds the sum of two squares twice; neither shows at
    // the precision of a block.
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      square_sum.a = (F)_mm512_dpbf16_ps((__m512)square_sum.a, (__m512bh)bits, (__m512bh)bits);
      return;
    }
#endif
    const Pair<float> v = std::is_same_v<T, c10::Half> ? load_pair(p) : floats(bits);
    square_sum += v * v;
  }
};
template <>
struct Sums<c10::BFloat16> : Sums16<c10::BFloat16> {};
template <>
struct Sums<c10::Half> : Sums16<c10::Half> {};

template <typename Counter>
static double total_of(Counter counter) {
  typedef std::remove_reference_t<decltype(counter[0])> Lane;
  Lane lanes[sizeof(Counter) / sizeof(Lane)];
  __builtin_memcpy(lanes, &counter, sizeof(counter));
  int64_t total = 0;
  for (const Lane lane : lanes) total += lane;
  return static_cast<double>(total);
}

// Adds s 2^(-2 exponent), a sum of squares of elements of about 2^-exponent at most: see Cell.
template <typename A>
static void add_square_sum(Cell& cell, double s, int exponent) {
  if (sizeof(A) == 4 || std::abs(exponent) <= 480) {
    cell.square_sum += std::ldexp(s, -2 * exponent);
  } else if (exponent > 0) {
    cell.square_sum_tiny += std::ldexp(s, 1074 - 2 * exponent);
  } else {
    cell.square_sum_huge += std::ldexp(s, -1074 - 2 * exponent);
  }
}

// Measures an array that is handed over piece by piece, one piece where the last one ended. Without a cell it does nothing.
template <typename T>
class Measure {
 public:
  explicit Measure(Cell* cell) : cell_(cell) {}

  void add(const T* p, int64_t count) {
    if (!cell_) return;
    while (count > 0) {
      const int64_t here = std::min(count, FOLD - pending_);
      add_chunk(p, here);
      p += here;
      count -= here;
      if (pending_ == FOLD) fold(p);
    }
  }
  // `end`: where the array ends.
  void finish(const T* end) {
    if (cell_ && pending_ > 0) fold(end);
  }

 private:
  using A = Acc<T>;
  static constexpr bool DOUBLE = sizeof(A) == 8;
  // Between these limits no square that was lost shows in the sum, and no sum of blocks overflows.
  static constexpr A SMALLEST = DOUBLE ? A(0x1p-900) : A(0x1p-90), LARGEST = DOUBLE ? A(0x1p960) : A(0x1p127);

  void add_chunk(const T* p, int64_t count) {
    if (!careful_) {
      const Sums<T> sums = added<false>(p, count);
      const A squares = sum<A>(sums.square_sum);
      if (squares <= LARGEST && (pending_ > 0 || in_range(squares, sums))) return keep(sums, count);
      careful_ = true;
      if (pending_ == 0) set_exponent(largest_magnitude(p, count));
    }
    keep(added<true>(p, count), count);
  }
  static bool in_range(A squares, const Sums<T>& sums) {
    return (squares >= SMALLEST && squares <= LARGEST) || (squares == 0 && sums.largest_magnitude() == 0);
  }
  void keep(const Sums<T>& sums, int64_t count) {
    sums_ = sums;
    pending_ += count;
    padding_ += (STEP<T> - count % STEP<T>) % STEP<T>;
  }

  template <bool CAREFUL>
  GK_INLINE Sums<T> added(const T* p, int64_t count) const {
    Sums<T> sums = sums_;
    const Vec<A> scale = broadcast<A>(scale_);
    int64_t k = 0;
    for (; k + STEP<T> <= count; k += STEP<T>) sums.template add<CAREFUL>(p + k, scale);
    if (k < count) {
      T padded[STEP<T>] = {};
      std::copy(p + k, p + count, padded);
      sums.template add<CAREFUL>(padded, scale);
    }
    return sums;
  }

  static A largest_magnitude(const T* p, int64_t count) {
    A peak = 0;
    for (int64_t k = 0; k < count; ++k) {
      const A v = std::fabs(static_cast<A>(p[k]));
      if (v <= std::numeric_limits<A>::max()) peak = std::max(peak, v);
    }
    return peak;
  }
  // Squares are taken of elements times 2^exponent_, which brings magnitudes of about `peak` to one where they are far from it.
  void set_exponent(A peak) {
    constexpr int NEAR_ONE = DOUBLE ? 400 : 40, MOST = DOUBLE ? 1000 : 100;
    const int exponent = peak == 0 ? 0 : -std::ilogb(peak);
    exponent_ = std::abs(exponent) <= NEAR_ONE ? 0 : std::max(-MOST, std::min(MOST, exponent));
    scale_ = std::ldexp(A(1), exponent_);
  }

  void fold(const T* end) {
    const A squares = sum<A>(sums_.square_sum), peak = sums_.largest_magnitude();
    if (in_range(squares, sums_)) {
      add_square_sum<A>(*cell_, static_cast<double>(squares), exponent_);
    } else {
      add_each_square(end - pending_, pending_);
      careful_ = true;
    }
    if (careful_) set_exponent(peak);
    cell_->abs_max = std::max(cell_->abs_max, static_cast<double>(peak));
    cell_->zero_count += total_of(sums_.zeros) - static_cast<double>(padding_);
    cell_->nonfinite_count += total_of(sums_.nonfinite);
    sums_ = Sums<T>{};
    pending_ = padding_ = 0;
  }

  // The squares of a block whose magnitudes no one scale suits.
  void add_each_square(const T* p, int64_t count) {
    constexpr double TINY = 0x1p-480, HUGE_ONE = 0x1p480, SCALE = 0x1p537;  // see Cell
    for (int64_t k = 0; k < count; ++k) {
      const double v = std::fabs(static_cast<double>(p[k]));
      if (!(v <= std::numeric_limits<double>::max())) continue;
      if (v > HUGE_ONE) {
        cell_->square_sum_huge += (v / SCALE) * (v / SCALE);
      } else if (v < TINY) {
        cell_->square_sum_tiny += (v * SCALE) * (v * SCALE);
      } else {
        cell_->square_sum += v * v;
      }
    }
  }

  Cell* cell_;
  Sums<T> sums_;
  bool careful_ = false;
  int exponent_ = 0;
  A scale_ = 1;
  int64_t pending_ = 0, padding_ = 0;  // elements since the last fold, and the zeros that filled up their last vectors
};

// The statistics of p[0 .. count), for tensors that no kernel's loop has at hand.
template <typename T>
static void measure_array(const T* p, int64_t count, Cell& cell) {
  Measure<T> measure(&cell);
  measure.add(p, count);
  measure.finish(p + count);
}
