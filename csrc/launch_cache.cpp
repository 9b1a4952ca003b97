// The launch cache: see launch_cache.h. Nothing here needs CUDA: a launch is a call of the driver's function by its address,
// streams and devices are reached through c10's guards, memory through PyTorch's dispatcher.
#include "launch_cache.h"

#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>

namespace py = pybind11;

namespace gk {

size_t HashKey::operator()(Key key) const {
  uint64_t hash = key.size();
  for (const uint64_t word : key) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
  }
  return hash;
}

std::shared_ptr<const CapturedLaunches> LaunchCache::find(Key key) const {
  std::shared_lock lock(mutex_);
  const auto found = table_.find(key);
  return found == table_.end() ? nullptr : found->second.capture;
}

// The entry of `key`, under the lock. Where the table is full it is moved to `full`, to die after the lock: the end of a
// capture takes the GIL, which must not be waited for while holding a lock that a thread with the GIL may be waiting for.
LaunchCache::Entry& LaunchCache::entry(Key key, Table& full) {
  auto found = table_.find(key);
  if (found == table_.end()) {
    if (table_.size() >= MAX_KINDS || launches_ >= MAX_LAUNCHES) {
      table_.swap(full);
      launches_ = 0;
    }
    found = table_.try_emplace(std::vector<uint64_t>(key.begin(), key.end())).first;
  }
  return found->second;
}

bool LaunchCache::should_capture(Key key) {
  Table full;
  std::unique_lock lock(mutex_);
  Entry& here = entry(key, full);
  const bool result = !here.captured && ++here.calls > 1;
  lock.unlock();
  return result;
}

void LaunchCache::keep(Key key, std::shared_ptr<const CapturedLaunches> capture) {
  Table full;
  std::unique_lock lock(mutex_);
  Entry& here = entry(key, full);
  here.captured = true;
  if (capture) launches_ += capture->launches.size();
  here.capture.swap(capture);
  lock.unlock();
}

std::pair<size_t, size_t> LaunchCache::size() const {
  std::shared_lock lock(mutex_);
  size_t cache = 0;
  for (const auto& [key, entry] : table_) cache += entry.capture != nullptr;
  return {table_.size(), cache};
}

namespace {

std::atomic<LaunchFunction> launch_function = nullptr;

// A call as captured launches see it. `key` holds everything that allocations, kernels and their parameters can depend on: of
// tensors dtype, device, sizes, strides, and what Triton specialises kernels on (the address modulo 16, and for AMD whether the
// storage is within 2 GB); which arguments share a storage, since then a pointer does not say whose it is; all other values.
struct Call {
  c10::SmallVector<uint64_t, 128> key;
  c10::SmallVector<char*, 16> starts;  // of the tensors, by position of the argument
  const Tensor* first = nullptr;

  // False for arguments that no captured launches can be made of.
  bool read(c10::ArrayRef<c10::IValue> arguments);
  Key words() const { return {key.data(), key.size()}; }

 private:
  bool read(const Tensor& t, c10::ArrayRef<c10::IValue> before);
};

enum Tag : uint64_t { NONE, INT, BOOL, BOOLS, DOUBLE, TENSOR };

bool Call::read(c10::ArrayRef<c10::IValue> arguments) {
  for (size_t position = 0; position < arguments.size(); ++position) {
    const c10::IValue& value = arguments[position];
    if (value.isTensor() && value.toTensor().defined()) {
      if (!read(value.toTensor(), arguments.slice(0, position))) return false;
      continue;
    }
    starts.push_back(nullptr);
    if (value.isNone() || value.isTensor()) {
      key.push_back(NONE);
    } else if (value.isInt()) {
      key.append({INT, static_cast<uint64_t>(value.toInt())});
    } else if (value.isBool()) {
      key.append({BOOL, static_cast<uint64_t>(value.toBool())});
    } else if (value.isBoolList()) {
      const auto list = value.toBoolList();
      uint64_t bits = 1;  // above them, so that their number counts too
      for (const bool bit : list) bits = bits << 1 | static_cast<uint64_t>(bit);
      key.append({BOOLS, bits});
    } else if (value.isDouble()) {
      key.append({DOUBLE, std::bit_cast<uint64_t>(value.toDouble())});
    } else {
      return false;
    }
  }
  return first != nullptr;
}

bool Call::read(const Tensor& t, c10::ArrayRef<c10::IValue> before) {
  if (!t.has_storage() || t.unsafeGetTensorImpl()->is_python_dispatch() || t.dim() > 255) return false;
  const c10::Storage& storage = t.storage();
  uint64_t shared_with = 0;
  for (size_t position = 0; position < before.size() && !shared_with; ++position)
    if (before[position].isTensor() && before[position].toTensor().defined() &&
        before[position].toTensor().storage().is_alias_of(storage))
      shared_with = position + 1;
  char* const start = static_cast<char*>(t.data_ptr());
  const uint64_t modulo = reinterpret_cast<uintptr_t>(start) % 16, small = storage.nbytes() <= INT32_MAX;
  const c10::Device device = t.device();
  key.push_back(TENSOR | static_cast<uint64_t>(t.scalar_type()) << 8 | static_cast<uint64_t>(device.type()) << 16 |
                static_cast<uint64_t>(static_cast<uint8_t>(device.index())) << 24 | static_cast<uint64_t>(t.dim()) << 32 |
                modulo << 40 | small << 44 | shared_with << 48);
  for (const int64_t size : t.sizes()) key.push_back(static_cast<uint64_t>(size));
  for (const int64_t stride : t.strides()) key.push_back(static_cast<uint64_t>(stride));
  starts.push_back(start);
  if (!first) first = &t;
  return true;
}

// The stream that work on the device goes to now. The CPU, on which tests replay captured launches, has none.
void* stream_of(const c10::Device& device) {
  return device.is_cpu() ? nullptr : c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// Does what the capture says. False, with nothing launched, where memory came without the alignment kernels were
// compiled for.
bool replay(const CapturedLaunches& capture, Call& call, const std::string& op, std::vector<Tensor>& outputs) {
  const c10::Device device = call.first->device();
  const c10::DeviceGuard guard(device);
  c10::SmallVector<Tensor, 8> allocations;
  for (const auto& [sizes, strides, dtype] : capture.allocations) {
    allocations.push_back(at::empty_strided(sizes, strides, at::TensorOptions().dtype(dtype).device(device)));
    call.starts.push_back(static_cast<char*>(allocations.back().data_ptr()));
    if (reinterpret_cast<uintptr_t>(call.starts.back()) % 16) return false;
  }
  void* const stream = capture.launches.empty() ? nullptr : stream_of(device);
  const LaunchFunction function = launch_function.load(std::memory_order_relaxed);
  for (const Launch& launch : capture.launches) {
    c10::SmallVector<uint64_t, 32> values;
    c10::SmallVector<void*, 32> pointers;
    for (const auto& [tensor, value] : launch.parameters)
      values.push_back(tensor == Parameter::LITERAL ? value : reinterpret_cast<uintptr_t>(call.starts[tensor]) + value);
    for (uint64_t& value : values) pointers.push_back(&value);
    const auto [x, y, z] = launch.grid;
    const int code =
        function(launch.function, x, y, z, launch.threads, 1, 1, launch.shared_bytes, stream, pointers.data(), nullptr);
    TORCH_CHECK(code == 0, op, ": launching ", launch.kernel, " failed with the driver's error ", code);
  }
  for (const size_t index : capture.outputs) outputs.push_back(allocations[index]);
  return true;
}

// An owner of a Python object that may be let go by any thread, with or without the GIL, also after Python has ended.
std::shared_ptr<PyObject> own(py::object object) {
  return {object.release().ptr(), [](PyObject* held) {
            if (!Py_IsInitialized()) return;
            py::gil_scoped_acquire gil;
            Py_DECREF(held);
          }};
}

// The captured launches that gradkernels/triton/launch_cache.py describes.
std::shared_ptr<const CapturedLaunches> launches_from(const py::tuple& description, size_t num_arguments) {
  auto capture = std::make_shared<CapturedLaunches>();
  using Parameters = std::vector<std::pair<int64_t, uint64_t>>;
  using Row = std::tuple<std::string, uint64_t, std::array<unsigned, 3>, unsigned, unsigned, Parameters>;
  for (auto& [sizes, strides, dtype] :
       description[0].cast<std::vector<std::tuple<std::vector<int64_t>, std::vector<int64_t>, at::ScalarType>>>())
    capture->allocations.push_back({std::move(sizes), std::move(strides), dtype});
  const int64_t num_tensors = static_cast<int64_t>(num_arguments + capture->allocations.size());
  for (auto& [kernel, function, grid, threads, shared_bytes, parameters] : description[1].cast<std::vector<Row>>()) {
    Launch launch{std::move(kernel), reinterpret_cast<void*>(function), grid, threads, shared_bytes, {}};
    for (const auto& [tensor, value] : parameters) {
      TORCH_INTERNAL_ASSERT(tensor >= Parameter::LITERAL && tensor < num_tensors);
      launch.parameters.push_back({tensor, value});
    }
    capture->launches.push_back(std::move(launch));
  }
  capture->outputs = description[2].cast<std::vector<size_t>>();
  for (const size_t index : capture->outputs) TORCH_INTERNAL_ASSERT(index < capture->allocations.size());
  TORCH_INTERNAL_ASSERT(capture->launches.empty() || launch_function.load());
  capture->kernels = own(description[3]);
  return capture;
}

// A thread's first launch is Triton's: its launcher sees to it that the thread has the device's context, which takes calls of
// the driver's that PyTorch does not offer.
thread_local bool has_context = false;

// The kernel of an op at a device's key: replays the captured launches of the call, or calls the Python function `python`.
class CachedOp : public c10::OperatorKernel {
 public:
  CachedOp(std::string name, py::object python, py::object capture, std::shared_ptr<LaunchCache> cache)
      : name_(std::move(name)), python_(own(std::move(python))), watch_(own(std::move(capture))), caches_(std::move(cache)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const size_t num_arguments = op.schema().arguments().size();
    const auto arguments = torch::jit::last(*stack, num_arguments);
    // Under a dispatch mode, torch.compile's for one, the mode must see the allocations and launches.
    Call call;
    if (c10::impl::TorchDispatchModeTLS::stack_len() > 0 || !call.read(arguments)) return run_python(op, stack, nullptr);
    const auto capture = caches_->find(call.words());
    if (capture && (has_context || capture->launches.empty())) {
      std::vector<Tensor> outputs;
      if (replay(*capture, call, name_, outputs)) {
        caches_->replays.fetch_add(1, std::memory_order_relaxed);
        torch::jit::drop(*stack, num_arguments);
        for (Tensor& output : outputs) stack->emplace_back(std::move(output));
        return;
      }
    }
    run_python(op, stack, !capture && caches_->should_capture(call.words()) ? &call : nullptr);
    if (capture && !capture->launches.empty()) has_context = true;
  }

 private:
  // Calls the function; through `watch_`, which says what it did, where launches are to be captured for `captured`.
  void run_python(const c10::OperatorHandle& op, torch::jit::Stack* stack, const Call* captured) {
    const auto& schema = op.schema();
    auto arguments = torch::jit::pop(*stack, schema.arguments().size());
    std::shared_ptr<const CapturedLaunches> capture;
    {
      py::gil_scoped_acquire gil;
      py::list values;
      if (captured) values.append(py::handle(python_.get()));
      for (size_t position = 0; position < arguments.size(); ++position) {
        const bool is_dtype = schema.arguments()[position].real_type()->kind() == c10::TypeKind::ScalarTypeType;
        if (is_dtype && arguments[position].isInt())
          values.append(py::cast(static_cast<at::ScalarType>(arguments[position].toInt())));
        else
          values.append(torch::jit::toPyObject(std::move(arguments[position])));
      }
      auto result = py::reinterpret_steal<py::object>(
          PyObject_CallObject(captured ? watch_.get() : python_.get(), py::tuple(values).ptr()));
      if (!result) {
        python_error error;
        error.persist();
        throw error;
      }
      if (captured) {
        const auto pair = result.cast<py::tuple>();
        result = pair[0];
        if (!pair[1].is_none()) capture = launches_from(pair[1], schema.arguments().size());
      }
      push(schema, result, stack);
    }
    if (captured) caches_->keep(captured->words(), std::move(capture));
  }

  static void push(const c10::FunctionSchema& schema, const py::object& result, torch::jit::Stack* stack) {
    const auto& returns = schema.returns();
    if (returns.size() == 1) {
      stack->push_back(torch::jit::toIValue(result, returns[0].type()));
    } else if (!returns.empty()) {
      const auto values = result.cast<py::tuple>();
      TORCH_INTERNAL_ASSERT(values.size() == returns.size());
      for (size_t index = 0; index < returns.size(); ++index)
        stack->push_back(torch::jit::toIValue(values[index], returns[index].type()));
    }
  }

  const std::string name_;
  const std::shared_ptr<PyObject> python_, watch_;
  const std::shared_ptr<LaunchCache> caches_;
};

// Both live as long as the process: the dispatcher may outlive every owner that could be thought of.
struct Registered {
  std::vector<torch::Library> libraries;
  std::unordered_map<std::string, std::shared_ptr<LaunchCache>> cache;
};
Registered& registered() {
  static auto* const all = new Registered();
  return *all;
}

void implement(const std::string& name, const std::string& key, py::object python, py::object capture) {
  const auto separator = name.find("::");
  const auto cache = registered().cache[name] = std::make_shared<LaunchCache>();
  auto& library = registered().libraries.emplace_back(torch::Library::IMPL, name.substr(0, separator),
                                                      c10::parseDispatchKey(key), __FILE__, __LINE__);
  auto op = std::make_unique<CachedOp>(name, std::move(python), std::move(capture), cache);
  library.impl(name.substr(separator + 2).c_str(), torch::CppFunction::makeFromBoxedFunctor(std::move(op)));
}

}  // namespace

void bind_launch_cache(py::module_& m) {
  m.def("implement", &implement, py::arg("name"), py::arg("key"), py::arg("python"), py::arg("watch"));
  m.def("set_launch_function", [](uint64_t address) { launch_function = reinterpret_cast<LaunchFunction>(address); });
  m.def("stream_of", [](const c10::Device& device) { return reinterpret_cast<uint64_t>(stream_of(device)); });
  m.def("caches_of", [](const std::string& name) {
    const LaunchCache& cache = *registered().cache.at(name);
    const auto [kinds, planned] = cache.size();
    py::dict counts;
    counts["kinds"] = kinds;
    counts["captured launches"] = planned;
    counts["replays"] = cache.replays.load();
    return counts;
  });
}

}  // namespace gk
