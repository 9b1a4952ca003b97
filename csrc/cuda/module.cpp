// The Python module gradkernels._C_cuda, built where torch has CUDA. Loading it registers the ops of csrc/cuda with PyTorch's
// dispatcher; what is bound here are questions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "lstm_layer.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_cuda, m) {
  m.def("recurrence_on_device", gk::recurrence_on_device, py::arg("device_index"), py::arg("B"), py::arg("H"), py::arg("dtype"),
        py::arg("backward"), py::arg("num_concurrent"));
  m.def("recurrence_tiling", gk::recurrence_tiling, py::arg("B"), py::arg("H"), py::arg("backward"), py::arg("sms"),
        py::arg("shared_bytes"));
}
