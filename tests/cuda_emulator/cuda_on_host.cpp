// The recurrences of csrc/cuda as functions that tests/support/recurrence_on_host.py calls through ctypes: tiled for a device
// of the size that the test asks for, and run by tests/cuda_emulator/device_on_host.h.
#include "device_on_host.h"

#include "../../csrc/cuda/lstm_recurrence_backward.h"
#include "../../csrc/cuda/lstm_recurrence_forward.h"

#include <limits>

using namespace gk;

extern "C" {

// What goes in beside the tensors; tests/support/recurrence_on_host.py has the same fields.
struct Request {
  int64_t T, B, H;
  const int64_t* offsets;
  int32_t reverse, half;                        // half: float16, else bfloat16
  int32_t sms, shared_bytes;                    // of the device to choose for
  int32_t M, unit_warps, row_warps, row_tiles;  // a tiling by hand; M = 0: the chooser's
  int32_t seed, dawdling, silent_block, missing_blocks;
  double timeout_seconds;
};

static Tiling tiling_of(const Request& request, bool backward) {
  const Limits device{request.sms, request.shared_bytes};
  if (request.M == 0) return choose_tiling(request.B, request.H, backward, device);
  Tiling p;
  p.M = request.M;
  p.unit_warps = request.unit_warps;
  p.row_warps = request.row_warps;
  p.k_warps = WARPS / (p.unit_warps * p.row_warps);
  p.row_tiles = request.row_tiles;
  return complete(p, request.B, request.H, backward, device) ? p : Tiling{};
}

// (programs, M, local, unit warps, row warps, row tiles, slices, groups, k blocks in shared memory, shared bytes, cycles)
void tiling(const Request* request, int backward, int64_t* result) {
  const Tiling p = tiling_of(*request, backward);
  const int64_t values[] = {p.M == 0 ? 0 : p.num_blocks(),
                            p.M,
                            p.local,
                            p.unit_warps,
                            p.row_warps,
                            p.row_tiles,
                            p.slices,
                            p.groups,
                            p.shared_weights,
                            p.shared_bytes,
                            p.cycles};
  std::copy(std::begin(values), std::end(values), result);
}
}

// What a launch needs beside its arguments, cleared as the launcher does.
struct Scratch {
  std::vector<Vector16> double_buffer;
  std::vector<uint64_t> flags;
  host::Launch launch;

  Scratch(const Request& request, Recurrence& recurrence, bool backward) {
    const Tiling tiling = tiling_of(request, backward);
    recurrence = {tiling, request.T, request.B, request.H, request.offsets, request.reverse != 0, nullptr, nullptr};
    double_buffer.resize(tiling.local ? 0 : 2 * tiling.groups * tiling.buffer_vectors);
    flags.resize(2 * tiling.num_blocks());
    recurrence.double_buffer = double_buffer.data();
    recurrence.flags = flags.data();
    launch.blocks = tiling.num_blocks() - request.missing_blocks;
    launch.shared_bytes = tiling.shared_bytes;
    launch.seed = request.seed;
    launch.timeout_seconds = request.timeout_seconds;
    launch.silent_block = request.silent_block;
    launch.dawdling = request.dawdling;
  }
};

template <typename T>
static bool run_forward(Scratch& scratch, const Forward& p) {
  const Tiling& tiling = p.recurrence.tiling;
  if (tiling.local) return host::run(scratch.launch, [&] { recurrence_forward<T, 2, true>(p); });
  if (tiling.M == 2) return host::run(scratch.launch, [&] { recurrence_forward<T, 2, false>(p); });
  return host::run(scratch.launch, [&] { recurrence_forward<T, 4, false>(p); });
}

template <typename T, bool TELEMETRY>
static bool run_backward(Scratch& scratch, const Backward& p) {
  const Tiling& tiling = p.recurrence.tiling;
  if (tiling.local) return host::run(scratch.launch, [&] { recurrence_backward<T, 1, true, TELEMETRY>(p); });
  if (tiling.M == 1) return host::run(scratch.launch, [&] { recurrence_backward<T, 1, false, TELEMETRY>(p); });
  return host::run(scratch.launch, [&] { recurrence_backward<T, 2, false, TELEMETRY>(p); });
}

extern "C" {

// 0: done, 1: given up, 2: no tiling. rows: of all steps together.
int forward(const Request* request, int64_t rows, const uint16_t* weight_hh, const uint16_t* h0, const float* c0, float* gates,
            float* cells, uint16_t* y) {
  const int64_t H = request->H, state = request->B * H;
  const host::Guarded<const uint16_t> w(weight_hh, 4 * H * H), h(h0, state);
  const host::Guarded<const float> c(c0, state);
  const host::Guarded<float> all_gates(gates, rows * 4 * H), all_cells(cells, rows * H);
  const host::Guarded<uint16_t> all_y(y, rows * H);
  Forward p{{}, w, h, c, all_gates, all_cells, all_y};
  Scratch scratch(*request, p.recurrence, false);
  if (p.recurrence.tiling.M == 0) return 2;
  return (request->half ? run_forward<Half> : run_forward<Bfloat16>)(scratch, p) ? 0 : 1;
}

int backward(const Request* request, int64_t rows, const uint16_t* weight_hh, const uint16_t* dy, const float* c0,
             const float* gates, const float* cells, float* dh, float* dc, uint16_t* dgates, double* partials,
             int32_t* exponents, int32_t* carried_state, int continues_from, int continues_to) {
  const int64_t H = request->H, state = request->B * H;
  const host::Guarded<const uint16_t> w(weight_hh, 4 * H * H), all_dy(dy, rows * H);
  const host::Guarded<const float> c(c0, state), all_gates(gates, rows * 4 * H), all_cells(cells, rows * H);
  const host::Guarded<float> state_dh(dh, state), state_dc(dc, state);
  const host::Guarded<uint16_t> all_dgates(dgates, rows * 4 * H);
  Backward p{{},       w,          all_dy,  c,       all_gates, all_cells,           state_dh,
             state_dc, all_dgates, nullptr, nullptr, nullptr,   continues_from != 0, continues_to != 0};
  Scratch scratch(*request, p.recurrence, true);
  const Tiling& tiling = p.recurrence.tiling;
  if (tiling.M == 0) return 2;
  const host::Guarded<int32_t> passed_on(carried_state, 2 * tiling.groups);
  p.carried_state = passed_on;
  const host::Guarded<double> sums(partials, request->T * tiling.num_blocks() * NUM_SUMS);
  std::vector<int32_t> group_exponents(tiling.groups * request->T);
  p.partials = sums;
  p.exponents = tiling.groups > 1 ? group_exponents.data() : exponents;
  const bool telemetry = partials != nullptr;
  const auto run = request->half ? (telemetry ? run_backward<Half, true> : run_backward<Half, false>)
                                 : (telemetry ? run_backward<Bfloat16, true> : run_backward<Bfloat16, false>);
  if (!run(scratch, p)) return 1;
  for (int64_t t = 0; telemetry && tiling.groups > 1 && t < request->T; ++t) {
    for (int program = 0; program < tiling.num_blocks(); ++program) align_sums(p, t, program, exponents);
  }
  return 0;
}

// Every bit pattern through downcast(upcast()), and x through narrow: for the test of this file's own conversions.
void convert(int half, int64_t count, const float* x, uint16_t* y) {
  for (int64_t k = 0; k < count; ++k) {
    Half h;
    Bfloat16 b;
    if (half)
      device::downcast(x[k], h);
    else
      device::downcast(x[k], b);
    y[k] = half ? h.bits : b.bits;
  }
}
}
