// What the Python module asks about the recurrences of lstm_layer.cu.
#pragma once

#include <stdint.h>

#include <array>
#include <string>

namespace gk {

// (blocks, predicted cycles of a step) of recurrence_fwd or recurrence_bwd on this device, as one of `num_concurrent` such
// recurrences between which its multiprocessors are divided. No blocks where it would not run.
std::array<int64_t, 2> recurrence_on_device(int device, int64_t B, int64_t H, const std::string& dtype, bool backward,
                                            int64_t num_concurrent);

// (blocks, units and batch rows of a block, its shared memory in bytes) on a device of `sms` multiprocessors whose blocks may
// have `shared_bytes`: what the launcher would choose there.
std::array<int64_t, 4> recurrence_tiling(int64_t B, int64_t H, bool backward, int sms, int shared_bytes);

}  // namespace gk
