// The statistics of a gradient, formed from the values that a backward loop already holds in registers.
// Included inside namespace gk::GK_ISA after vec.h, once per instruction set; no include guard.
//
// Per vector: one multiply-add for the sum of squares, one instruction for the running |max|, one for the running |min|.
// Per block of about POINTWISE_BLOCK elements the lanes are folded into a Cell in float64. A block whose sum of squares is not
// safely inside float's range (1e-30 or 1e+30 everywhere, an infinity, a NaN) is read again, exactly, in float64; a
// block whose smallest magnitude is zero is read again to count its zeros.

template <typename A>
struct Measure {
  Vec<A> square_sum{}, largest{}, smallest = Vec<A>{} + std::numeric_limits<A>::infinity();

  GK_INLINE void add(Vec<A> v) {
    square_sum += v * v;
    largest = higher_magnitude<A>(v, largest);
    smallest = lower_magnitude<A>(v, smallest);
  }
  // The same for the last `count` lanes of a row: the padding is zero, which only `smallest` must not see.
  GK_INLINE void add_tail(Vec<A> v, int64_t count) {
    square_sum += v * v;
    largest = higher_magnitude<A>(v, largest);
    A padded[WIDTH<A>];
    __builtin_memcpy(padded, &v, sizeof(v));
    for (int64_t k = count; k < WIDTH<A>; ++k) padded[k] = std::numeric_limits<A>::infinity();
    smallest = lower_magnitude<A>(load(padded), smallest);
  }
};

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
    F v = magnitude<float>(k + WIDTH<float> <= count ? load(p + k) : load_tail(p + k, count - k));
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
static void fold(Measure<Acc<T>>& measure, const T* p, int64_t count, Cell& cell) {
  using A = Acc<T>;
  constexpr A SMALLEST_SAFE = sizeof(A) == 4 ? A(0x1p-60) : A(0x1p-900);  // squares lost below it do not show in the sum
  const A square_sum = sum<A>(measure.square_sum);
  if (square_sum >= SMALLEST_SAFE && square_sum <= std::numeric_limits<A>::max()) {
    cell.square_sum += static_cast<double>(square_sum);
    cell.abs_max = std::max(cell.abs_max, static_cast<double>(max<A>(measure.largest)));
  } else {
    measure_exactly(p, count, cell);
  }
  if (min<A>(measure.smallest) == 0) cell.zero_count += static_cast<double>(count_zeros(p, count));
  measure = Measure<A>{};
}

// The statistics of p[0 .. count), for tensors that no kernel's loop holds in registers.
template <typename T>
static void measure_array(const T* p, int64_t count, Cell& cell) {
  using A = Acc<T>;
  Measure<A> measure;
  for (int64_t begin = 0; begin < count; begin += POINTWISE_BLOCK) {
    const int64_t end = std::min(count, begin + POINTWISE_BLOCK);
    int64_t k = begin;
    for (; k + WIDTH<A> <= end; k += WIDTH<A>) measure.add(load(p + k));
    if (k < end) measure.add_tail(load_tail(p + k, end - k), end - k);
    fold(measure, p + begin, end - begin, cell);
  }
}
