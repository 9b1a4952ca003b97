// The Python module gradkernels._C: what was built and what this CPU runs. Ops are never bound here; loading the module
// registers them with PyTorch's dispatcher.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "autograd/probe.h"
#include "common.h"
#include "fields.h"
#include "launch_cache.h"

namespace py = pybind11;

namespace gk {

Isa cpu_isa() {
  static const Isa isa = [] {
    const std::string capability = at::get_cpu_capability();
#if defined(__x86_64__)
    if (capability.rfind("AVX512", 0) == 0) return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#endif
    if (capability.rfind("AVX2", 0) == 0) return Isa::avx2;
    return Isa::baseline;
  }();
  return isa;
}

}  // namespace gk

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["torch"] = TORCH_VERSION;
#if defined(__x86_64__)
    info["instruction_sets"] = py::make_tuple("baseline", "avx2", "avx512", "avx512_bf16");
#else
    info["instruction_sets"] = py::make_tuple("baseline");
#endif
    return info;
  });
  m.def("cpu_capability", [] {
    const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
    return names[static_cast<int>(gk::cpu_isa())];
  });
  m.def("fields", [] {
    py::dict facts;
    facts["FIELDS"] = py::tuple(py::cast(std::vector<std::string>(std::begin(gk::FIELDS), std::end(gk::FIELDS))));
    facts["TIME_FIELDS"] =
        py::tuple(py::cast(std::vector<std::string>(std::begin(gk::TIME_FIELDS), std::end(gk::TIME_FIELDS))));
    facts["NUM_NORMS"] = gk::NUM_NORMS;
    facts["LOW_GATE"] = gk::LOW_GATE;
    facts["HIGH_GATE"] = gk::HIGH_GATE;
    facts["SMALLEST_SQUARED"] = gk::SMALLEST_SQUARED;
    facts["LARGEST_SQUARED"] = gk::LARGEST_SQUARED;
    facts["SCALE"] = gk::SCALE;
    facts["EXPONENT_RANGE"] = gk::EXPONENT_RANGE;
    facts["MAX_EXPONENT_FLOAT"] = gk::MAX_EXPONENT_FLOAT;
    facts["MAX_EXPONENT_DOUBLE"] = gk::MAX_EXPONENT_DOUBLE;
    return facts;
  });
  gk::bind_launch_cache(m);
  gk::bind_probe_hook(m);
}
