// The thin layer between a kernel's body and the machine that runs it: threads, barriers, the matrix product of a warp, and
// loads and stores that other blocks see. For nvcc it is defined here; for a compiler of the host it is only declared, and
// tests/cuda_emulator/device_on_host.h defines it with fibers and threads, so that a test can run the body on a machine without
// a GPU.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GK_DEVICE __device__ __forceinline__
#define GK_BOTH __host__ __device__ __forceinline__
#define GK_UNROLL _Pragma("unroll")
#define GK_ROLLED _Pragma("unroll 1")
#else
#include <math.h>
#define GK_DEVICE inline
#define GK_BOTH inline
#define GK_UNROLL
#define GK_ROLLED
#endif

namespace gk {

struct alignas(16) Vector16 {
  uint32_t x, y, z, w;
};
struct alignas(8) Pairs {
  uint32_t x, y;
};
struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace device {

#ifdef __CUDACC__

constexpr unsigned EVERY_LANE = 0xffffffffu;

GK_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
GK_DEVICE int block() { return static_cast<int>(blockIdx.x); }
GK_DEVICE char* shared() {
  extern __shared__ __align__(16) char dynamic_shared[];
  return dynamic_shared;
}
GK_DEVICE void sync() { __syncthreads(); }

GK_DEVICE uint32_t warp_max(uint32_t v) { return __reduce_max_sync(EVERY_LANE, v); }
GK_DEVICE uint32_t warp_add(uint32_t v) { return __reduce_add_sync(EVERY_LANE, v); }
template <typename A>
GK_DEVICE A shuffle_xor(A v, int mask) {
  return __shfl_xor_sync(EVERY_LANE, v, mask);
}

// c += A B, 16 x 8 x 16, as PTX's mma.m16n8k16 lays it out: lane l = 4 r + q holds
//   a: A[r][2q, 2q+1], A[r+8][2q, 2q+1], A[r][2q+8, 2q+9], A[r+8][2q+8, 2q+9]
//   b: B[2q, 2q+1][r], B[2q+8, 2q+9][r]        c: C[r][2q], C[r][2q+1], C[r+8][2q], C[r+8][2q+1]
GK_DEVICE void mma(Bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
GK_DEVICE void mma(Half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sixteen bytes that another block has written during this launch: out of the L2 cache, never out of this SM's own.
GK_DEVICE Vector16 load_foreign(const Vector16* p) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
  return {v.x, v.y, v.z, v.w};
}

// All that this thread has written or, through sync(), seen written is seen by whoever reads `value` and then acquires.
GK_DEVICE void publish(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
GK_DEVICE uint64_t peek(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}
GK_DEVICE void acquire() { __threadfence(); }

// A poll takes about a microsecond, so this is half a minute and more: no live peer needs as long for one step.
GK_DEVICE bool timed_out(uint32_t polls) { return polls > (1u << 25); }
GK_DEVICE void trap() { __trap(); }

// __expf: 2 ulp and 1.2 ulp more for each unit of |x|, about 2e-6 where the sigmoid function is not flat yet.
GK_DEVICE float exponential(float x) { return __expf(x); }
GK_DEVICE float reciprocal(float x) { return __frcp_rn(x); }
GK_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
GK_DEVICE float power_of_two(int exponent) { return ldexpf(1.0f, exponent); }

GK_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
GK_DEVICE float upcast(Bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
GK_DEVICE float upcast(Half x) { return __half2float(__ushort_as_half(x.bits)); }
GK_DEVICE void downcast(float x, Bfloat16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
GK_DEVICE void downcast(float x, Half& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }

#else

int thread();
int block();
char* shared();
void sync();
uint32_t warp_max(uint32_t v);
uint32_t warp_add(uint32_t v);
template <typename A>
A shuffle_xor(A v, int mask);
void mma(Bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma(Half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
Vector16 load_foreign(const Vector16* p);
void publish(uint64_t* flag, uint64_t value);
uint64_t peek(const uint64_t* flag);
void acquire();
bool timed_out(uint32_t polls);
void trap();
float exponential(float x);
float reciprocal(float x);
float hyperbolic_tangent(float x);
float power_of_two(int exponent);
uint32_t bits_of(float x);
float upcast(Bfloat16 x);
float upcast(Half x);
void downcast(float x, Bfloat16& y);
void downcast(float x, Half& y);

#endif

template <typename A>
GK_DEVICE A warp_sum(A v) {
  GK_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

}  // namespace device
}  // namespace gk
