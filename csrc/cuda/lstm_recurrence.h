// What both time loops share: how a block holds its slice of W_hh, multiplies it by the rows that the blocks exchange,
// and meets the others. The body of the kernels: no CUDA in here, what is special to a device is behind device.h.
//
// Blocks of one group of batch rows exchange h (forward) or dG (backward) through two buffers, one read while the other is
// written, in the order in which the matrix product wants them: buffer[k block][row tile][lane] holds 8 elements, those of
// batch row lane / 4 from k = 8 (lane % 4) on. Which k is which pair of the product is free as long as W_hh follows: here a
// lane's 8 elements are what two products in a row take, so that it loads 16 bytes at once and nothing is staged.
// Rows and units beyond the last one are zeros: no tail is left in the loops.
#pragma once

#include "../fields.h"
#include "device.h"
#include "lstm_tiling.h"

namespace gk {

struct Recurrence {
  Tiling tiling;
  int64_t T, B, H;
  const int64_t* offsets;   // (T + 1,): the first row of each step; null where all steps have B rows
  bool reverse;             // the forward pass goes from the last step to the first
  Vector16* double_buffer;  // (2, groups, buffer_vectors), zeros; unused by one block
  uint64_t* flags;          // (2, groups, slices), zeros
};

struct Step {
  int64_t first = 0, rows = 0;  // none where there is no such step
};

GK_DEVICE Step step_at(const Recurrence& w, int64_t t) {
  if (t < 0 || t >= w.T) return {};
  if (!w.offsets) return {t * w.B, w.B};
  return {w.offsets[t], w.offsets[t + 1] - w.offsets[t]};
}

// What one thread is in its block: its place in the product, and the block's in the grid.
struct ThreadCoordinates {
  int lane, warp, unit_warp, row_warp, k_warp;
  int k_begin, k_end;  // k blocks of this warp
  int slice, group;

  GK_DEVICE explicit ThreadCoordinates(const Tiling& p) {
    lane = device::thread() % 32;
    warp = device::thread() / 32;
    k_warp = warp % p.k_warps;
    row_warp = warp / p.k_warps % p.row_warps;
    unit_warp = warp / (p.k_warps * p.row_warps);
    k_begin = p.k_blocks * k_warp / p.k_warps;
    k_end = p.k_blocks * (k_warp + 1) / p.k_warps;
    slice = device::block() % p.slices;
    group = device::block() / p.slices;
  }
};

// The front of shared memory.
struct SharedHeader {
  uint32_t maxima[2][2][WARPS];  // [parity][largest, incoming][warp]
  uint32_t seen[2][2];           // the same of all blocks
  double squares[3][WARPS];      // of one step: dh, dc, recurrent dh
  float forget[WARPS];
  uint32_t counts[2][WARPS];
};
static_assert(sizeof(SharedHeader) <= HEAD_BYTES, "the head of shared memory is larger than tiled");

struct Memory {
  SharedHeader* head;
  Vector16* weights;        // what does not fit the registers: [unit warp][k warp][turn][k block][2 M][lane]
  float* sums;              // [k warp][row tile][row][COLUMNS], the partial products
  Vector16* double_buffer;  // of one block alone

  GK_DEVICE explicit Memory(const Tiling& p) {
    char* base = device::shared();
    head = reinterpret_cast<SharedHeader*>(base);
    weights = reinterpret_cast<Vector16*>(base + HEAD_BYTES);
    sums = reinterpret_cast<float*>(base + HEAD_BYTES + p.weight_bytes);
    double_buffer = reinterpret_cast<Vector16*>(base + HEAD_BYTES + p.weight_bytes + p.sum_bytes);
  }
};

// One (unit, batch row) pair that a thread owns, and where it finds its parts.
struct UnitRow {
  int unit, row;
  bool there;
  int sums, double_buffer;  // offsets: of its first sum in its row tile's, and of its first element in an exchange buffer

  // `rows`: of the product, a unit. Forward rows are [8 units][gate][unit], so gate g is 8 g rows further.
  GK_DEVICE UnitRow(const Recurrence& w, const ThreadCoordinates& place, int index, bool backward) {
    const Tiling& p = w.tiling;
    const int local = device::thread() + index * THREADS, u = local & (p.units - 1), b = local / p.units;
    unit = place.slice * p.units + u;
    row = place.group * p.rows() + b;
    there = b < p.rows() && unit < w.H && row < w.B;
    const int product_rows = backward ? p.units : 4 * p.units, tile = b / COLUMNS, column = b % COLUMNS;
    sums = (tile * product_rows + (backward ? u : u / 8 * 32 + u % 8)) * COLUMNS + column;
    const int k = backward ? 4 * unit : unit;
    double_buffer = ((k / 32 * p.row_tiles + tile) * 32 + column * 4 + k % 32 / 8) * 8 + k % 8;
  }
};

// W_hh as the forward product takes it: a row of the product is a gate of a unit, K is the units of the step before.
struct ForwardWeights {
  const uint16_t* weight_hh;
  int64_t H;
  bool aligned;

  // `half` 0 or 1: row lane / 4 or 8 more of m tile `tile`, whose first unit is `unit`; 8 elements along K.
  GK_DEVICE Vector16 load(int64_t unit, int tile, int half, int k_block, int lane) const {
    const int64_t row = unit + tile / 2 * 8 + lane / 4, k = int64_t{32} * k_block + 8 * (lane % 4);
    const uint16_t* source = weight_hh + ((tile % 2 * 2 + half) * H + row) * H + k;
    if (row >= H) return {0, 0, 0, 0};
    if (aligned && k + 8 <= H) return *reinterpret_cast<const Vector16*>(source);
    uint32_t v[8];
    GK_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = k + i < H ? source[i] : 0;
    return {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
  }
};

// W_hh as the backward product takes it: a row is a unit of the step before, K is dG, the four gates of a unit side by side.
struct BackwardWeights {
  const uint16_t* weight_hh;
  int64_t H;

  GK_DEVICE Vector16 load(int64_t unit, int tile, int half, int k_block, int lane) const {
    const int64_t column = unit + tile * 16 + half * 8 + lane / 4, first = int64_t{8} * k_block + 2 * (lane % 4);
    uint32_t v[8];
    GK_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int64_t row = first + i / 4;
      v[i] = column < H && row < H ? weight_hh[(i % 4 * H + row) * H + column] : 0;
    }
    return {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
  }
};

// The part of W_hh that a block multiplies by at every step: it stays where it is for the whole recurrence.
template <typename T, int M, int TURNS, int RESIDENT>
struct Stationary {
  static constexpr int SLOTS = RESIDENT / (2 * M) / TURNS;  // k blocks of a tile in registers
  Vector16 resident[TURNS][SLOTS][2 * M];
  Vector16* others;

  template <typename Weights>
  GK_DEVICE Stationary(const Tiling& p, const ThreadCoordinates& place, const Memory& memory, const Weights& weights) {
    const int tile_units = p.units / (p.unit_warps * TURNS), length = place.k_end - place.k_begin;
    others = memory.weights + (place.unit_warp * p.k_warps + place.k_warp) * TURNS * p.shared_weights * 2 * M * 32;
    GK_UNROLL
    for (int turn = 0; turn < TURNS; ++turn) {
      const int64_t unit = int64_t{place.slice} * p.units + (place.unit_warp * TURNS + turn) * tile_units;
      GK_UNROLL
      for (int s = 0; s < SLOTS; ++s) {
        GK_UNROLL
        for (int part = 0; part < 2 * M; ++part) {
          resident[turn][s][part] = {0, 0, 0, 0};
          if (s < length) resident[turn][s][part] = weights.load(unit, part / 2, part % 2, place.k_begin + s, place.lane);
        }
      }
      GK_ROLLED
      for (int s = SLOTS; s < length && place.row_warp == 0; ++s) {
        GK_UNROLL
        for (int part = 0; part < 2 * M; ++part) {
          others[((turn * p.shared_weights + s - SLOTS) * 2 * M + part) * 32 + place.lane] =
              weights.load(unit, part / 2, part % 2, place.k_begin + s, place.lane);
        }
      }
    }
  }

  // Two products of one k block: sums[0] and sums[1] are chains of their own, so that one need not wait for the other.
  GK_DEVICE static void product(float (&sums)[2][M][4], const Vector16 (&w)[2 * M], const Vector16& e) {
    GK_UNROLL
    for (int m = 0; m < M; ++m) {
      const uint32_t first[4] = {w[2 * m].x, w[2 * m + 1].x, w[2 * m].y, w[2 * m + 1].y};
      const uint32_t second[4] = {w[2 * m].z, w[2 * m + 1].z, w[2 * m].w, w[2 * m + 1].w};
      device::mma(T{}, sums[0][m], first, e.x, e.y);
      device::mma(T{}, sums[1][m], second, e.z, e.w);
    }
  }

  // This warp's part of W_hh times the rows in `double_buffer`, into its part of `sums`. All warps must meet before these are
  // read.
  template <bool LOCAL>
  GK_DEVICE void multiply(const Tiling& p, const ThreadCoordinates& place, const Vector16* double_buffer, float* sums) const {
    const int length = place.k_end - place.k_begin, rows = 16 * M * TURNS * p.unit_warps, stride = p.row_tiles * 32;
    const auto load = [&](const Vector16* source) { return LOCAL ? *source : device::load_foreign(source); };
    GK_ROLLED
    for (int tile = place.row_warp; tile < p.row_tiles; tile += p.row_warps) {
      const Vector16* column = double_buffer + place.k_begin * stride + tile * 32 + place.lane;
      GK_UNROLL
      for (int turn = 0; turn < TURNS; ++turn) {
        float acc[2][M][4] = {};
        GK_UNROLL
        for (int first = 0; first < SLOTS; first += CHUNK) {
          Vector16 e[CHUNK];
          GK_UNROLL
          for (int c = 0; c < CHUNK; ++c) {
            if (first + c < SLOTS && first + c < length) e[c] = load(column + (first + c) * stride);
          }
          GK_UNROLL
          for (int c = 0; c < CHUNK; ++c) {
            if (first + c < SLOTS && first + c < length) product(acc, resident[turn][first + c], e[c]);
          }
        }
        GK_ROLLED
        for (int first = SLOTS; first < length; first += CHUNK) {
          Vector16 e[CHUNK];
          GK_UNROLL
          for (int c = 0; c < CHUNK; ++c) {
            if (first + c < length) e[c] = load(column + (first + c) * stride);
          }
          const Vector16* source = others + (turn * p.shared_weights + first - SLOTS) * 2 * M * 32 + place.lane;
          GK_UNROLL
          for (int c = 0; c < CHUNK; ++c) {
            if (first + c >= length) continue;
            Vector16 w[2 * M];
            GK_UNROLL
            for (int part = 0; part < 2 * M; ++part) w[part] = source[(c * 2 * M + part) * 32];
            product(acc, w, e[c]);
          }
        }
        float* target =
            sums + ((place.k_warp * p.row_tiles + tile) * rows + (place.unit_warp * TURNS + turn) * 16 * M) * COLUMNS;
        target += place.lane / 4 * COLUMNS + place.lane % 4 * 2;
        GK_UNROLL
        for (int m = 0; m < M; ++m) {
          GK_UNROLL
          for (int i = 0; i < 4; ++i) target[(m * 16 + i / 2 * 8) * COLUMNS + i % 2] = acc[0][m][i] + acc[1][m][i];
        }
      }
    }
  }
};

// The sum over the k warps of row `row` (counted from the cell's own) of the product.
GK_DEVICE float sum_at(const Tiling& p, const float* sums, const UnitRow& unit_row, int row) {
  const int stride = p.sum_bytes / (4 * p.k_warps);
  float total = 0;
  for (int k = 0; k < p.k_warps; ++k) total += sums[k * stride + unit_row.sums + row * COLUMNS];
  return total;
}

// A magnitude in 16 bits that are ordered as magnitudes are: 0, ONE + floor(log2) (-127 for all subnormal ones), or NOT_FINITE.
constexpr int ONE = 512;
constexpr uint32_t NOT_FINITE = 0xffff;
GK_DEVICE uint32_t code_of(uint32_t magnitude_bits) {
  if (magnitude_bits >= 0x7f800000u) return NOT_FINITE;
  if (magnitude_bits == 0) return 0;
  return static_cast<uint32_t>(ONE - 127) + (magnitude_bits >> 23);
}

// Where the blocks of a group meet, once a step. A block tells with its flag that it has arrived, and two magnitudes: every
// block knows the largest of all when it goes on. Two sets of flags take turns: nobody can be two rounds ahead.
template <bool LOCAL>
struct GridBarrier {
  const Recurrence& w;
  const ThreadCoordinates& place;
  SharedHeader* head;

  GK_DEVICE uint64_t* flags(int64_t round) const {
    return w.flags + (round % 2 * w.tiling.groups + place.group) * w.tiling.slices;
  }

  // After this the block's other stores may follow: only what has been written before is waited for.
  GK_DEVICE void arrive(int64_t round, uint32_t max_abs, uint32_t external_max) const {
    auto& maxima = head->maxima[round % 2];
    const uint32_t warp_max_abs = device::warp_max(max_abs), warp_external_max = device::warp_max(external_max);
    if (place.lane == 0) {
      maxima[0][place.warp] = warp_max_abs;
      maxima[1][place.warp] = warp_external_max;
    }
    device::sync();
    if (LOCAL || place.warp != 0) return;
    const uint64_t code = uint64_t{code_of(block_maximum(maxima[0]))} << 16 | code_of(block_maximum(maxima[1]));
    if (place.lane == 0) device::publish(flags(round) + place.slice, static_cast<uint64_t>(round + 1) << 32 | code);
  }

  GK_DEVICE void arrive(int64_t round) const {
    device::sync();
    if (!LOCAL && device::thread() == 0) device::publish(flags(round) + place.slice, static_cast<uint64_t>(round + 1) << 32);
  }

  // Returns when all blocks have arrived: the codes of the largest magnitudes that came with the round.
  GK_DEVICE void wait(int64_t round, uint32_t& max_abs, uint32_t& external_max) const {
    auto& seen = head->seen[round % 2];
    if (LOCAL) {
      max_abs = code_of(block_maximum(head->maxima[round % 2][0]));
      external_max = code_of(block_maximum(head->maxima[round % 2][1]));
      return;
    }
    if (place.warp == 0) {
      uint32_t codes[2] = {0, 0};
      for (int slice = place.lane; slice < w.tiling.slices; slice += 32) {
        const uint64_t value = await(flags(round) + slice, static_cast<uint32_t>(round + 1));
        const uint32_t theirs[2] = {static_cast<uint32_t>(value >> 16) & 0xffff, static_cast<uint32_t>(value) & 0xffff};
        GK_UNROLL
        for (int i = 0; i < 2; ++i) codes[i] = theirs[i] > codes[i] ? theirs[i] : codes[i];
      }
      device::acquire();
      GK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t code = device::warp_max(codes[i]);
        if (place.lane == 0) seen[i] = code;
      }
    }
    device::sync();
    max_abs = seen[0];
    external_max = seen[1];
  }

 private:
  GK_DEVICE static uint32_t block_maximum(const uint32_t (&maxima)[WARPS]) {
    uint32_t result = 0;
    GK_UNROLL
    for (int warp = 0; warp < WARPS; ++warp) result = maxima[warp] > result ? maxima[warp] : result;
    return result;
  }

  // A flag's value once it is of this round. A peer that never comes ends the launch with an error instead of hanging it.
  GK_DEVICE static uint64_t await(const uint64_t* flag, uint32_t round) {
    uint64_t value = device::peek(flag);
    for (uint32_t polls = 0; static_cast<uint32_t>(value >> 32) != round; ++polls) {
      if (device::timed_out(polls)) device::trap();
      value = device::peek(flag);
    }
    return value;
  }
};

}  // namespace gk
