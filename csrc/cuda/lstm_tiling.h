// How a layer is laid over the SMs: which block owns what, what lies in its shared memory, and what a step is predicted to
// cost. Plain integers, so that the launcher, the host's test and the table in docs/lstm_gpu.md compute the very same.
#pragma once

#include <algorithm>

#include "device.h"

namespace gk {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int COLUMNS = 8;                           // batch rows of one matrix product: its N
constexpr int LARGEST_LOCAL_H = 128;                 // up to here one block holds all of W_hh
constexpr int HEAD_BYTES = 1024;                     // maxima and statistics of the warps, at the front of shared memory
constexpr int CELLS_LOCAL = 4, CELLS_GRID = 2;       // (unit, batch row) pairs that one thread owns
constexpr int CHUNK = 4;                             // k blocks whose loads are on their way at once
constexpr int RESIDENT_FWD = 24, RESIDENT_BWD = 20;  // 16-byte words of W_hh in a thread's registers

struct Limits {
  int sms, shared_bytes;  // of the device: multiprocessors, and bytes that one block may have
};

// A warp multiplies M tiles of 16 rows at a time (fwd: 4 units with their 4 gates each; bwd: 16 units) by 8 batch rows, over
// blocks of 32 along K (fwd: H; bwd: 4 H). The 8 warps of a block are `unit_warps` x `row_warps` x `k_warps`.
struct Tiling {
  int M = 0;           // 0: no tiling, the layer does not fit
  bool local = false;  // one block holds all units: nothing to wait for
  int unit_warps = 1, row_warps = 1, k_warps = 1;
  int turns = 1;                             // tiles of one warp, one after the other
  int units = 0, row_tiles = 0;              // of a block; a row tile is COLUMNS rows
  int slices = 0, groups = 0, k_blocks = 0;  // blocks = slices of the units x groups of the batch
  int shared_weights = 0;                    // k blocks of a tile that do not fit its warp's registers
  int buffer_vectors = 0;                    // 16-byte words of one exchange buffer of one group
  int weight_bytes = 0, sum_bytes = 0, shared_bytes = 0;
  int64_t cycles = 0;  // predicted, of a step

  GK_BOTH int num_blocks() const { return slices * groups; }
  GK_BOTH int rows() const { return row_tiles * COLUMNS; }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a step is predicted to cost, in cycles of an SM. No GPU has confirmed it yet; it chooses between tilings, no more.
struct Cost {
  int64_t barrier = 0, exchange = 0, products = 0, weights = 0, sums = 0, cells = 0;

  int64_t total() const { return barrier + exchange + products + weights + sums + cells; }
};

// From figures published for H100. GridBarrier: 500 until a block's stores are out, 700 until the last flag is seen, 2 a block
// to poll; within a block four barriers of 40. Exchange: an SM gets 64 bytes a cycle out of L2 and all together 24 each (shared
// memory: 128), 300 of latency for every CHUNK loads in a row. Products: 2 each, or 33 each in the longest chain. Weights and
// partial sums: 128 bytes of shared memory a cycle. Cells: about 300 of latency, 150 for each turn of all threads.
inline Cost predicted_cost(const Tiling& p, const Limits& device) {
  const int64_t length = divide_up(p.k_blocks, p.k_warps), tiles = divide_up(p.row_tiles, p.row_warps) * p.turns;
  const int64_t bytes = int64_t{16} * p.buffer_vectors * p.unit_warps;
  const int64_t from_l2 = std::max(bytes / 64, bytes * p.num_blocks() / (int64_t{24} * device.sms));
  const int64_t products = int64_t{2} * p.M * p.unit_warps * p.turns * p.k_blocks * p.row_tiles;
  Cost cost;
  cost.barrier = 160 + (p.local ? 0 : 500 + 700 + 2 * p.slices);
  cost.exchange = p.local ? bytes * p.turns / 128 + 30 : from_l2 + 300 * tiles * divide_up(length, CHUNK);
  cost.products = std::max(2 * products, 33 * length * tiles);
  cost.weights = int64_t{1} * p.weight_bytes * p.row_tiles / 128;
  cost.sums = int64_t{2} * p.sum_bytes / 128;
  cost.cells = 300 + 150 * divide_up(p.units * p.rows(), THREADS);
  return cost;
}

// Fills in what follows from the shape of a block; false where the device does not hold it.
inline bool complete(Tiling& p, int64_t B, int64_t H, bool backward, const Limits& device) {
  const int tile_units = (backward ? 16 : 4) * p.M;
  const int slots = (backward ? RESIDENT_BWD : RESIDENT_FWD) / (2 * p.M) / p.turns;
  p.units = tile_units * p.unit_warps * p.turns;
  p.slices = static_cast<int>(divide_up(H, p.units));
  p.groups = static_cast<int>(divide_up(B, p.rows()));
  p.k_blocks = static_cast<int>(divide_up(H, backward ? 8 : 32));
  const int cells = p.local ? CELLS_LOCAL : CELLS_GRID, longest = static_cast<int>(divide_up(p.k_blocks, p.k_warps));
  p.shared_weights = longest > slots ? longest - slots : 0;
  p.buffer_vectors = p.k_blocks * p.row_tiles * 32;
  p.weight_bytes = p.unit_warps * p.k_warps * p.turns * p.shared_weights * p.M * 1024;
  p.sum_bytes = p.k_warps * 16 * p.M * p.unit_warps * p.turns * p.rows() * 4;
  p.shared_bytes = HEAD_BYTES + p.weight_bytes + p.sum_bytes + (p.local ? 2 * 16 * p.buffer_vectors : 0);
  if (p.local ? p.slices != 1 : p.slices * p.groups > device.sms) return false;
  if (p.units * p.rows() > cells * THREADS || p.shared_bytes > device.shared_bytes) return false;
  p.cycles = predicted_cost(p, device).total();
  return true;
}

// The tiling with the least predicted time of a step, or one with M = 0. A grid is tiled with one block an SM.
inline Tiling choose_tiling(int64_t B, int64_t H, bool backward, const Limits& device) {
  Tiling best;
  const bool local = H <= LARGEST_LOCAL_H;
  if (B < 1 || H < 1 || B > (1 << 20) || H > 132 * 32) return best;
  for (int M = backward ? 1 : 2; M <= (backward ? 2 : 4); M *= 2) {
    if (local && M == (backward ? 2 : 4)) continue;
    for (int unit_warps = 1; unit_warps <= (local ? WARPS : 2); unit_warps *= 2) {
      for (int row_warps = 1; row_warps * unit_warps <= WARPS; row_warps *= 2) {
        for (int row_tiles = row_warps; row_tiles <= 16; ++row_tiles) {
          Tiling p;
          p.M = M;
          p.local = local;
          p.turns = local && !backward ? 2 : 1;
          p.unit_warps = unit_warps;
          p.row_warps = row_warps;
          p.k_warps = WARPS / (unit_warps * row_warps);
          p.row_tiles = row_tiles;
          if (complete(p, B, H, backward, device) && (best.M == 0 || p.cycles < best.cycles)) best = p;
        }
      }
    }
  }
  return best;
}

}  // namespace gk
