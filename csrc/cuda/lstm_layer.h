// What the Python module asks about the walks of lstm_layer.cu.
#pragma once

#include <stdint.h>

#include <array>
#include <string>

namespace gk {

// The number of blocks that walk_fwd or walk_bwd would run as on this device, or 0 where it would not run.
int walk_programs(int device, int64_t B, int64_t H, const std::string& dtype, bool backward);

// (programs, units and batch rows of a block, its shared memory in bytes) on a device of `sms` multiprocessors whose blocks may
// have `shared_bytes`: what the launcher would plan there.
std::array<int64_t, 4> walk_plan(int64_t B, int64_t H, bool backward, int sms, int shared_bytes);

}  // namespace gk
