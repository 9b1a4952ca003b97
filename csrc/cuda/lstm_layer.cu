// The recurrences of one LSTM layer through time on a GPU of sm_80 or later, in one launch each. What a block does at every
// step is in lstm_recurrence_forward.h and lstm_recurrence_backward.h; the products before and after the recurrence are
// PyTorch's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <array>
#include <vector>

#include "lstm_layer.h"
#include "lstm_recurrence_backward.h"
#include "lstm_recurrence_forward.h"

namespace gk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T, int M, bool LOCAL>
__global__ void __launch_bounds__(THREADS, 1) lstm_recurrence_fwd_kernel(const __grid_constant__ Forward p) {
  recurrence_forward<T, M, LOCAL>(p);
}

template <typename T, int M, bool LOCAL, bool TELEMETRY>
__global__ void __launch_bounds__(THREADS, 1) lstm_recurrence_bwd_kernel(const __grid_constant__ Backward p) {
  recurrence_backward<T, M, LOCAL, TELEMETRY>(p);
}

// One thread a (step, block).
__global__ void lstm_recurrence_align_kernel(const __grid_constant__ Backward p, int32_t* exponents) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int num_blocks = p.recurrence.tiling.num_blocks();
  if (index < p.recurrence.T * num_blocks) align_sums(p, index / num_blocks, static_cast<int>(index % num_blocks), exponents);
}

static void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "lstm_layer: ", what, ": ", cudaGetErrorString(error));
}

template <typename T>
static const void* forward_kernel(const Tiling& p) {
  if (p.local) return reinterpret_cast<const void*>(lstm_recurrence_fwd_kernel<T, 2, true>);
  if (p.M == 2) return reinterpret_cast<const void*>(lstm_recurrence_fwd_kernel<T, 2, false>);
  return reinterpret_cast<const void*>(lstm_recurrence_fwd_kernel<T, 4, false>);
}

template <typename T, bool TELEMETRY>
static const void* backward_kernel(const Tiling& p) {
  if (p.local) return reinterpret_cast<const void*>(lstm_recurrence_bwd_kernel<T, 1, true, TELEMETRY>);
  if (p.M == 1) return reinterpret_cast<const void*>(lstm_recurrence_bwd_kernel<T, 1, false, TELEMETRY>);
  return reinterpret_cast<const void*>(lstm_recurrence_bwd_kernel<T, 2, false, TELEMETRY>);
}

static const void* kernel_of(const Tiling& p, bool half, bool backward, bool telemetry) {
  if (!backward) return half ? forward_kernel<Half>(p) : forward_kernel<Bfloat16>(p);
  if (telemetry) return half ? backward_kernel<Half, true>(p) : backward_kernel<Bfloat16, true>(p);
  return half ? backward_kernel<Half, false>(p) : backward_kernel<Bfloat16, false>(p);
}

static int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// How the recurrence runs on the current device, `device`, as one of `num_concurrent` such recurrences between which its SMs
// are divided, or a tiling with M = 0 where it does not: the device is too old, W_hh does not fit, or the device itself says
// that not all blocks would be resident at once, which waiting for each other takes.
static Tiling tiling_on(int device, int64_t B, int64_t H, bool half, bool backward, int64_t num_concurrent) {
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 8) return {};
  const Limits limits{attribute(cudaDevAttrMultiProcessorCount, device) / static_cast<int>(num_concurrent),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  const Tiling p = choose_tiling(B, H, backward, limits);
  if (p.M == 0 || (!p.local && !attribute(cudaDevAttrCooperativeLaunch, device))) return {};
  for (const bool telemetry : {false, true}) {
    const void* kernel = kernel_of(p, half, backward, telemetry);
    int resident = 0;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes),
          "cudaFuncSetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, THREADS, p.shared_bytes), "occupancy");
    if (p.local ? resident < 1 : resident * limits.sms < p.num_blocks()) return {};
  }
  return p;
}

std::array<int64_t, 2> recurrence_on_device(int device, int64_t B, int64_t H, const std::string& dtype, bool backward,
                                            int64_t num_concurrent) {
  STD_TORCH_CHECK(dtype == "bfloat16" || dtype == "float16", "recurrence_on_device: dtype must be bfloat16 or float16, got ",
                  dtype);
  STD_TORCH_CHECK(num_concurrent > 0, "recurrence_on_device: num_concurrent must be positive, got ", num_concurrent);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tiling p = tiling_on(device, B, H, dtype == "float16", backward, num_concurrent);
  return {p.M == 0 ? 0 : p.num_blocks(), p.cycles};
}

std::array<int64_t, 4> recurrence_tiling(int64_t B, int64_t H, bool backward, int sms, int shared_bytes) {
  const Tiling p = choose_tiling(B, H, backward, {sms, shared_bytes});
  return {p.M == 0 ? 0 : p.num_blocks(), p.units, p.rows(), p.shared_bytes};
}

static void check_tensor(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
  bool fits = t.scalar_type() == dtype && t.is_contiguous() && t.dim() == static_cast<int64_t>(shape.size());
  for (size_t k = 0; fits && k < shape.size(); ++k) fits = t.size(static_cast<int64_t>(k)) == shape.begin()[k];
  STD_TORCH_CHECK(fits, "lstm_recurrence: ", name, " must be contiguous, of the recurrence's dtype and shape");
}

// What both launches need beside their arguments: the tiling, scratch that starts as zeros, the steps' first rows, and the
// stream.
class Launch {
 public:
  Launch(const Tensor& gates, const Tensor& weight_hh, int64_t B, const OptionalTensor& batch_sizes, bool reverse,
         bool backward, int64_t num_concurrent)
      : guard_(gates.get_device_index()), device_(gates.get_device_index()), backward_(backward) {
    const ScalarType dtype = weight_hh.scalar_type();
    const int64_t H = weight_hh.size(1), rows = gates.size(0);
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "lstm_recurrence: weight_hh must be bfloat16 or float16");
    half_ = dtype == ScalarType::Half;
    STD_TORCH_CHECK(num_concurrent > 0, "lstm_recurrence: num_concurrent must be positive, got ", num_concurrent);
    const Tiling tiling = tiling_on(device_, B, H, half_, backward, num_concurrent);
    STD_TORCH_CHECK(tiling.M != 0, "lstm_recurrence: B = ", B, ", H = ", H,
                    " does not fit this device: ask recurrence_on_device first");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    const int64_t double_buffer = tiling.local ? 0 : int64_t{2} * tiling.groups * tiling.buffer_vectors,
                  flags = 2 * tiling.num_blocks();
    scratch_ = torch::stable::new_empty(gates, {2 * double_buffer + flags}, ScalarType::Long);
    auto* vectors = static_cast<Vector16*>(scratch_.mutable_data_ptr());
    check(cudaMemsetAsync(vectors, 0, 16 * double_buffer + 8 * flags, stream_), "cudaMemsetAsync");
    const int64_t T = batch_sizes ? batch_sizes->numel() : rows / B;
    recurrence = {tiling, T, B, H, nullptr, reverse, vectors, reinterpret_cast<uint64_t*>(vectors + double_buffer)};
    if (batch_sizes) send_offsets(gates, *batch_sizes);
    STD_TORCH_CHECK(batch_sizes || T * B == rows, "lstm_recurrence: ", rows, " rows are not whole steps of ", B);
  }

  template <typename Arguments>
  void run(const Arguments& arguments, bool telemetry) {
    void* list[] = {const_cast<Arguments*>(&arguments)};
    const void* kernel = kernel_of(recurrence.tiling, half_, backward_, telemetry);
    const dim3 blocks(recurrence.tiling.num_blocks()), threads(THREADS);
    const size_t shared = recurrence.tiling.shared_bytes;
    check(recurrence.tiling.local ? cudaLaunchKernel(kernel, blocks, threads, list, shared, stream_)
                                  : cudaLaunchCooperativeKernel(kernel, blocks, threads, list, shared, stream_),
          "launch");
  }

  cudaStream_t stream() const { return stream_; }
  Recurrence recurrence;

 private:
  // The copy leaves pageable memory before cudaMemcpyAsync returns; only a graph would read it later.
  void send_offsets(const Tensor& like, const Tensor& batch_sizes) {
    cudaStreamCaptureStatus capturing;
    check(cudaStreamIsCapturing(stream_, &capturing), "cudaStreamIsCapturing");
    STD_TORCH_CHECK(capturing == cudaStreamCaptureStatusNone,
                    "lstm_layer: packed sequences cannot be captured into a CUDA graph");
    STD_TORCH_CHECK(batch_sizes.is_cpu() && batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.is_contiguous(),
                    "lstm_recurrence: batch_sizes must be int64 on the CPU");
    const auto* sizes = static_cast<const int64_t*>(batch_sizes.const_data_ptr());
    std::vector<int64_t> offsets{0};
    bool fits = recurrence.T > 0 && sizes[0] == recurrence.B;
    for (int64_t t = 0; t < recurrence.T && fits; ++t) {
      fits = 0 <= sizes[t] && sizes[t] <= sizes[t == 0 ? 0 : t - 1];
      offsets.push_back(offsets.back() + sizes[t]);
    }
    STD_TORCH_CHECK(fits && offsets.back() == like.size(0), "lstm_recurrence: batch_sizes must start with ", recurrence.B,
                    ", not increase and add up to ", like.size(0));
    offsets_ = torch::stable::new_empty(like, {recurrence.T + 1}, ScalarType::Long);
    void* target = offsets_.mutable_data_ptr();
    check(cudaMemcpyAsync(target, offsets.data(), 8 * offsets.size(), cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
    recurrence.offsets = static_cast<const int64_t*>(target);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  bool half_, backward_;
  cudaStream_t stream_;
  Tensor scratch_, offsets_;
};

template <typename A>
static const A* pointer(const Tensor& t) {
  return static_cast<const A*>(t.const_data_ptr());
}
template <typename A>
static A* writable(const Tensor& t) {
  return static_cast<A*>(t.mutable_data_ptr());
}

void lstm_recurrence_fwd(Tensor gates, Tensor weight_hh, Tensor h0, Tensor c0, Tensor y, Tensor cells,
                         OptionalTensor batch_sizes, bool reverse, int64_t num_concurrent) {
  const int64_t rows = gates.size(0), B = c0.size(0), H = c0.size(1);
  const ScalarType dtype = weight_hh.scalar_type();
  check_tensor("weight_hh", weight_hh, dtype, {4 * H, H});
  check_tensor("gates", gates, ScalarType::Float, {rows, 4 * H});
  check_tensor("h0", h0, dtype, {B, H});
  check_tensor("c0", c0, ScalarType::Float, {B, H});
  check_tensor("y", y, dtype, {rows, H});
  check_tensor("cells", cells, ScalarType::Float, {rows, H});
  Launch launch(gates, weight_hh, B, batch_sizes, reverse, false, num_concurrent);
  launch.run(Forward{launch.recurrence, pointer<uint16_t>(weight_hh), pointer<uint16_t>(h0), pointer<float>(c0),
                     writable<float>(gates), writable<float>(cells), writable<uint16_t>(y)},
             false);
}

void lstm_recurrence_bwd(OptionalTensor dy, Tensor dh, Tensor dc, Tensor weight_hh, Tensor c0, Tensor gates, Tensor cells,
                         Tensor dgates, OptionalTensor partials, OptionalTensor exponents, OptionalTensor carried_state,
                         bool continues_from, bool continues_to, OptionalTensor batch_sizes, bool reverse,
                         int64_t num_concurrent) {
  const int64_t rows = gates.size(0), B = c0.size(0), H = c0.size(1);
  const ScalarType dtype = weight_hh.scalar_type();
  check_tensor("weight_hh", weight_hh, dtype, {4 * H, H});
  check_tensor("gates", gates, ScalarType::Float, {rows, 4 * H});
  check_tensor("cells", cells, ScalarType::Float, {rows, H});
  check_tensor("c0", c0, ScalarType::Float, {B, H});
  check_tensor("dh", dh, ScalarType::Float, {B, H});
  check_tensor("dc", dc, ScalarType::Float, {B, H});
  check_tensor("dgates", dgates, dtype, {rows, 4 * H});
  if (dy) check_tensor("dy", *dy, dtype, {rows, H});
  Launch launch(gates, weight_hh, B, batch_sizes, reverse, true, num_concurrent);
  const int64_t T = launch.recurrence.T, num_blocks = launch.recurrence.tiling.num_blocks(),
                groups = launch.recurrence.tiling.groups;
  STD_TORCH_CHECK(partials.has_value() == exponents.has_value(),
                  "lstm_recurrence: partials and exponents must be given together");
  STD_TORCH_CHECK(carried_state ? !batch_sizes : !continues_from && !continues_to,
                  "lstm_recurrence: chunks must be padded, and have a carried_state");
  if (carried_state) check_tensor("carried_state", *carried_state, ScalarType::Int, {num_blocks, 2});
  Backward p{launch.recurrence,
             pointer<uint16_t>(weight_hh),
             dy ? pointer<uint16_t>(*dy) : nullptr,
             pointer<float>(c0),
             pointer<float>(gates),
             pointer<float>(cells),
             writable<float>(dh),
             writable<float>(dc),
             writable<uint16_t>(dgates),
             nullptr,
             nullptr,
             carried_state ? writable<int32_t>(*carried_state) : nullptr,
             continues_from,
             continues_to};
  if (!partials) return launch.run(p, false);
  check_tensor("partials", *partials, ScalarType::Double, {T, num_blocks, NUM_SUMS});
  check_tensor("exponents", *exponents, ScalarType::Int, {T});
  const Tensor of_groups = groups > 1 ? torch::stable::new_empty(*exponents, {groups, T}, ScalarType::Int) : *exponents;
  p.partials = writable<double>(*partials);
  p.exponents = writable<int32_t>(of_groups);
  launch.run(p, true);
  if (groups == 1) return;
  lstm_recurrence_align_kernel<<<divide_up(T * num_blocks, 256), 256, 0, launch.stream()>>>(p, writable<int32_t>(*exponents));
  check(cudaGetLastError(), "launch");
}

}  // namespace gk

STABLE_TORCH_LIBRARY_FRAGMENT(gradkernels, m) {
  m.def(
      "lstm_recurrence_fwd(Tensor(a!) gates, Tensor weight_hh, Tensor h0, Tensor c0, Tensor(b!) y, Tensor(c!) cells, "
      "Tensor? batch_sizes, bool reverse, int num_concurrent) -> ()");
  m.def(
      "lstm_recurrence_bwd(Tensor? dy, Tensor(a!) dh, Tensor(b!) dc, Tensor weight_hh, Tensor c0, Tensor gates, Tensor cells, "
      "Tensor(c!) dgates, Tensor(d!)? partials, Tensor(e!)? exponents, Tensor(f!)? carry, bool resumes, bool pauses, "
      "Tensor? batch_sizes, bool reverse, int num_concurrent) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gradkernels, CUDA, m) {
  m.impl("lstm_recurrence_fwd", TORCH_BOX(&gk::lstm_recurrence_fwd));
  m.impl("lstm_recurrence_bwd", TORCH_BOX(&gk::lstm_recurrence_bwd));
}
