// The hook of a probe on a tensor's gradient.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace gk {

void bind_probe_hook(pybind11::module_& m);

}  // namespace gk
