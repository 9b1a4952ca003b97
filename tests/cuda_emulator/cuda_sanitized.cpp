// One case of the recurrences forward and back as a program of its own, for tests/gpu/test_cuda_races.py to build with a
// sanitizer:
//   B H half reverse packed misaligned forgotten {M unit_warps row_warps row_tiles} {the same of the backward recurrence}
//   size...
// M = 0: the chooser's. misaligned: W_hh begins two bytes behind what is aligned.
// It fails where the recurrence times out or is not finite, or where the sanitizer finds something.
#include "cuda_on_host.cpp"

#include <stdio.h>
#include <stdlib.h>

template <typename A>
static std::vector<A> random_values(int64_t count, float scale, std::mt19937& random) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<A> values(count);
  for (A& v : values) {
    const float x = normal(random);
    if constexpr (std::is_same_v<A, float>) {
      v = x;
    } else {
      device::downcast(x, v);
    }
  }
  return values;
}

static bool finite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float x) { return isfinite(x); });
}

// 0, or which part went wrong.
template <typename T>
static int run_both_passes(const Request& request, const Request& back, bool misaligned, int64_t rows) {
  const int64_t B = request.B, H = request.H;
  std::mt19937 random(1);
  const auto weight = random_values<T>(4 * H * H + 1, 1 / sqrtf(H), random), h0 = random_values<T>(B * H, 0.5f, random);
  const auto dy = random_values<T>(rows * H, 1, random);
  const auto c0 = random_values<float>(B * H, 0.5f, random);
  auto gates = random_values<float>(rows * 4 * H, 2, random), cells = random_values<float>(rows * H, 1, random);
  auto dh = random_values<float>(B * H, 1, random), dc = random_values<float>(B * H, 1, random);
  std::vector<T> y(rows * H), dgates(rows * 4 * H);
  const auto bits = [](auto& values) { return reinterpret_cast<uint16_t*>(const_cast<T*>(values.data())); };

  const uint16_t* weight_hh = bits(weight) + misaligned;
  if (forward(&request, rows, weight_hh, bits(h0), c0.data(), gates.data(), cells.data(), bits(y)) != 0) return 1;
  if (!finite(cells) || !finite(gates)) return 2;
  int64_t tiling_back[11];
  tiling(&back, true, tiling_back);
  std::vector<double> partials(request.T * tiling_back[0] * NUM_SUMS);
  std::vector<int32_t> exponents(request.T);
  std::vector<int32_t> carried_state(2 * tiling_back[0]);
  const auto backward_reference = [&](bool continues_from, bool continues_to) {
    return backward(&back, rows, weight_hh, bits(dy), c0.data(), gates.data(), cells.data(), dh.data(), dc.data(), bits(dgates),
                    partials.data(), exponents.data(), carried_state.data(), continues_from, continues_to) == 0;
  };
  if (request.offsets ? !backward_reference(false, false)
                      : !backward_reference(false, true) || !backward_reference(true, false))
    return 3;
  return finite(dh) && finite(dc) ? 0 : 4;
}

static void plan_by_hand(Request& request, const int64_t* numbers) {
  request.M = numbers[0];
  request.unit_warps = numbers[1];
  request.row_warps = numbers[2];
  request.row_tiles = numbers[3];
}

int main(int count, char** vectors) {
  std::vector<int64_t> numbers;
  for (int k = 1; k < count; ++k) numbers.push_back(atoll(vectors[k]));
  if (numbers.size() < 16) return 5;
  std::vector<int64_t> offsets = {0};
  for (size_t k = 15; k < numbers.size(); ++k) offsets.push_back(offsets.back() + numbers[k]);
  Request request{};
  request.T = offsets.size() - 1;
  request.B = numbers[0];
  request.H = numbers[1];
  request.half = numbers[2];
  request.reverse = numbers[3];
  request.offsets = numbers[4] ? offsets.data() : nullptr;
  request.sms = 132;
  request.shared_bytes = 232448;
  request.seed = 1;
  request.dawdling = 4;
  request.silent_block = -1;
  request.timeout_seconds = 120;
  host::forgotten = static_cast<host::Order>(numbers[6]);
  Request back = request;
  plan_by_hand(request, &numbers[7]);
  plan_by_hand(back, &numbers[11]);
  const auto recurrence = request.half ? run_both_passes<Half> : run_both_passes<Bfloat16>;
  const int failed = recurrence(request, back, numbers[5], offsets.back());
  if (failed) fprintf(stderr, "the recurrences failed at %d\n", failed);
  return failed;
}
