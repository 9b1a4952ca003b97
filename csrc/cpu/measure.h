// The statistics of a gradient, formed in the loop of a backward from memory that it has just read or written, so that a value
// is measured as stored.
// Included inside namespace gk::GK_ISA after vec.h, once per instruction set; no include guard.
//
// Per vector: one multiply-add for the sum of squares, and on integers, for the bits of magnitudes order as these do, one
// instruction for the largest and two that count what is not zero. Per block the lanes are merged into a Slot in float64.
// A block whose squares leave float's range (1e-30 or 1e+30 everywhere, an infinity, a NaN) is measured again, and all blocks
// after it, with more care: FINITE counts what is finite and leaves the rest out; SCALED also multiplies elements by a power of
// two that brings them into range before it squares them.

enum Mode { OFF, FAST, FINITE, SCALED };

constexpr int64_t MERGE_INTERVAL =
    512 * WIDTH<float>;  // elements between two merges: 256 additions to a float, rounded below 1e-5
constexpr int64_t FIRST_MERGE = MERGE_INTERVAL / 8;  // and before the first one, which tells whether to be careful

// Calls body(first, last) for the blocks of [begin, end).
template <typename Body>
static GK_INLINE void for_each_block(int64_t begin, int64_t end, const Body& body) {
  for (int64_t first = begin, last; first < end; first = last) {
    last = std::min(end, first + (first == begin ? FIRST_MERGE : MERGE_INTERVAL));
    body(first, last);
  }
}

// What is added up of a block, lane by lane. Counters are vectors too, of integers as wide as T.
template <typename T>
struct Sums {
  using A = Acc<T>;
  typedef typename Lanes<A>::integer Integer;
  Pair<A> square_sum{};
  Integer largest{}, nonzero{}, finite{};
  int64_t lanes = 0;  // that `finite` is out of: elements, and what fills up the last vectors

  template <Mode MODE, typename Access>
  GK_INLINE void add(Access access, const T* p, A scale) {
    const auto v = access.load(p);
    if (MODE != FAST) lanes += sizeof(v) / sizeof(A);
    if constexpr (std::is_same_v<Access, Whole<typename Access::type>>) {
      add_vector<MODE>(v.a, scale, square_sum.a);
      add_vector<MODE>(v.b, scale, square_sum.b);
    } else {
      add_vector<MODE>(v, scale, square_sum.a);
    }
  }
  GK_INLINE A largest_magnitude() const { return max<A>((Vec<A>)largest); }

 private:
  template <Mode MODE>
  GK_INLINE void add_vector(Vec<A> v, A scale, Vec<A>& squares) {
    const Integer magnitudes = (Integer)magnitude<A>(v);
    nonzero += one_where_nonzero(magnitudes);
    if constexpr (MODE == FAST) {
      largest = higher_bits(magnitudes, largest);
      squares += v * v;
    } else {
      const auto where = where_at_most(magnitudes, (Integer)broadcast<A>(std::numeric_limits<A>::max()));
      count_where(where, finite);
      largest = higher_where(where, magnitudes, largest);
      squares = add_square_where(where, MODE == SCALED ? v * scale : v, squares);
    }
  }
};

// 16-bit elements are looked at as integers, a pair of vectors at once: their magnitudes order as these do.
template <typename T>
struct Sums16 {
  typedef int16_t Integer __attribute__((vector_size(GK_VECTOR_BYTES)));
  static constexpr int16_t LARGEST_FINITE = std::is_same_v<T, c10::Half> ? 0x7bff : 0x7f7f;
  Pair<float> square_sum{};
  Integer largest{}, nonzero{}, finite{};
  int64_t lanes = 0;

  template <Mode MODE, typename Access>
  GK_INLINE void add(Access access, const T* p, float scale) {
    Integer bits = access.template load_bits<Integer>(p);
    const Integer magnitudes = bits & 0x7fff;
    nonzero += one_where_nonzero(magnitudes);
    if constexpr (MODE == FAST) {
      largest = higher_bits(magnitudes, largest);
    } else {
      const auto where = where_at_most(magnitudes, Integer{} + LARGEST_FINITE);
      lanes += STEP<T>;
      count_where(where, finite);
      largest = higher_where(where, magnitudes, largest);
      bits = keep_where(where, bits);
    }
#ifdef GK_HAS_BF16
    // One instruction sums 32 squares. It takes subnormals for zero and rounds the sum of two squares twice; neither shows at
    // the precision of a block.
    if constexpr (MODE != SCALED && std::is_same_v<T, c10::BFloat16>) {
      square_sum.a = (F)_mm512_dpbf16_ps((__m512)square_sum.a, (__m512bh)bits, (__m512bh)bits);
      return;
    }
#endif
    Pair<float> v = floats(bits);
    if (MODE == SCALED) v = v * broadcast<float>(scale);
    square_sum += v * v;
  }
  GK_INLINE float largest_magnitude() const {
    int16_t lanes[STEP<T>], peak = 0;
    __builtin_memcpy(lanes, &largest, sizeof(largest));
    for (int64_t k = 0; k < STEP<T>; ++k) peak = std::max(peak, lanes[k]);
    return T(static_cast<uint16_t>(peak), T::from_bits());
  }

 private:
  // In an order that does not matter to a sum: bfloat16 at even places first, then those at odd ones.
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
};
template <>
struct Sums<c10::BFloat16> : Sums16<c10::BFloat16> {};
template <>
struct Sums<c10::Half> : Sums16<c10::Half> {};

template <typename Counter>
static int64_t total_of(Counter counter) {
  typedef std::remove_reference_t<decltype(counter[0])> Lane;
  Lane lanes[sizeof(Counter) / sizeof(Lane)];
  __builtin_memcpy(lanes, &counter, sizeof(counter));
  int64_t total = 0;
  for (const Lane lane : lanes) total += lane;
  return total;
}

// The statistics of one gradient in one task, block by block.
template <typename T>
class Measure {
 public:
  using A = Acc<T>;

  explicit Measure(Slot* slot) : slot_(slot), mode_(slot ? FAST : OFF) {}

  Mode mode() const { return mode_; }
  A scale() const { return scale_; }

  // Adds a block of memory p[0 .. count), of which a loop has formed `sums` in `mode`.
  void merge_partials(Mode mode, const Sums<T>& sums, const T* p, int64_t count) {
    const A squares = sum<A>(sums.square_sum), peak = sums.largest_magnitude();
    const bool in_range = (squares >= SMALLEST && squares <= LARGEST) || (squares == 0 && peak == 0);
    if (!in_range && mode == FAST) {
      mode_ = FINITE;
      return add(p, count);
    }
    if (!in_range && mode == FINITE) {
      set_exponent(peak);
      if (mode_ == SCALED) return add(p, count);
    }
    if (in_range) {
      add_square_sum(static_cast<double>(squares));
    } else {
      add_each_square(p, count);
    }
    if (mode != FAST) set_exponent(peak);
    slot_->abs_max = std::max(slot_->abs_max, static_cast<double>(peak));
    slot_->zero_count += static_cast<double>(count - total_of(sums.nonzero));
    if (mode != FAST) slot_->nonfinite_count += static_cast<double>(sums.lanes - total_of(sums.finite));
  }

  // Adds memory that no loop has at hand.
  void add(const T* p, int64_t count) {
    for (int64_t k = 0; k < count; k += MERGE_INTERVAL) {
      const int64_t some = std::min(MERGE_INTERVAL, count - k);
      if (mode_ == FAST) {
        add_block<FAST>(p + k, some);
      } else if (mode_ == FINITE) {
        add_block<FINITE>(p + k, some);
      } else {
        add_block<SCALED>(p + k, some);
      }
    }
  }

 private:
  static constexpr bool DOUBLE = sizeof(A) == 8;
  // Between these limits no square that was lost shows in the sum, and no sum of blocks overflows.
  static constexpr A SMALLEST = DOUBLE ? A(0x1p-900) : A(0x1p-90), LARGEST = DOUBLE ? A(0x1p960) : A(0x1p127);

  template <Mode MODE>
  void add_block(const T* p, int64_t count) {
    Sums<T> sums;
    const A scale = scale_;
    for_each_vector<T>(0, count, [&](auto access, int64_t k) __attribute__((always_inline)) {
      sums.template add<MODE>(access, p + k, scale);
    });
    merge_partials(MODE, sums, p, count);
  }

  // Elements are multiplied by 2^exponent_, which brings magnitudes of about `peak` to one where they are far from it.
  void set_exponent(A peak) {
    constexpr int NEAR_ONE = DOUBLE ? 400 : 40, MOST = DOUBLE ? 1000 : 100;
    const int exponent = peak == 0 ? 0 : -std::ilogb(peak);
    exponent_ = std::abs(exponent) <= NEAR_ONE ? 0 : std::max(-MOST, std::min(MOST, exponent));
    scale_ = std::ldexp(A(1), exponent_);
    mode_ = exponent_ == 0 ? FINITE : SCALED;
  }

  // Adds the sum of the squares of elements times 2^exponent_ to the part of the Slot that holds its size.
  void add_square_sum(double squares) {
    constexpr int ORDINARY = 960, SQUARED_SCALE = 1074;  // exponents: of what is squared as it is, and of SCALE^2
    const int power = squares == 0 ? 0 : std::ilogb(squares) - 2 * exponent_;
    if (power < -ORDINARY) {
      slot_->square_sum_tiny += std::ldexp(squares, SQUARED_SCALE - 2 * exponent_);
    } else if (power > ORDINARY) {
      slot_->square_sum_huge += std::ldexp(squares, -SQUARED_SCALE - 2 * exponent_);
    } else {
      slot_->square_sum += std::ldexp(squares, -2 * exponent_);
    }
  }
  // The squares of a block whose magnitudes no one scale suits.
  void add_each_square(const T* p, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      const double v = std::fabs(static_cast<double>(p[k]));
      if (!(v <= std::numeric_limits<double>::max())) continue;
      if (v > LARGEST_SQUARED) {
        slot_->square_sum_huge += (v / SCALE) * (v / SCALE);
      } else if (v < SMALLEST_SQUARED) {
        slot_->square_sum_tiny += (v * SCALE) * (v * SCALE);
      } else {
        slot_->square_sum += v * v;
      }
    }
  }

  Slot* slot_;
  Mode mode_;
  int exponent_ = 0;
  A scale_ = 1;
};

// The statistics of p[0 .. count), for tensors that no kernel's loop has at hand.
template <typename T>
static void measure_array(const T* p, int64_t count, Slot& slot) {
  Measure<T> measure(&slot);
  for_each_block(0, count, [&](int64_t first, int64_t last) { measure.add(p + first, last - first); });
}
