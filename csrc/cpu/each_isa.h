// Compiles the file named by GK_SOURCE once per instruction set, each time with GK_ISA set to the namespace to fill:
// `avx512_bf16`, `avx512`, `avx2` (x86-64 only), `baseline`. The file includes this header first, puts its loops under
// `#ifdef GK_ISA` and picks them with GK_CHOOSE((name)) in the part under `#else`, which is compiled once.
// Library headers are included before the first pass, so no code of theirs is compiled for a CPU that may not be there.
#ifndef GK_ISA

#include "../common.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define GK_ISA avx512_bf16
#define GK_HAS_BF16
#define GK_VECTOR_BYTES 64
#include GK_SOURCE
#undef GK_VECTOR_BYTES
#undef GK_HAS_BF16
#undef GK_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define GK_ISA avx512
#define GK_VECTOR_BYTES 64
#include GK_SOURCE
#undef GK_VECTOR_BYTES
#undef GK_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define GK_ISA avx2
#define GK_VECTOR_BYTES 32
#include GK_SOURCE
#undef GK_VECTOR_BYTES
#undef GK_ISA
#pragma GCC pop_options

#define GK_CHOOSE(function)                                             \
  (gk::cpu_isa() == gk::Isa::avx512_bf16 ? GK_IN(avx512_bf16, function) \
   : gk::cpu_isa() == gk::Isa::avx512    ? GK_IN(avx512, function)      \
   : gk::cpu_isa() == gk::Isa::avx2      ? GK_IN(avx2, function)        \
                                         : GK_IN(baseline, function))
#else
#define GK_CHOOSE(function) GK_IN(baseline, function)
#endif
// The function's name comes in brackets, so that its template arguments may hold commas.
#define GK_IN(isa, function) (&isa::GK_BARE function)
#define GK_BARE(...) __VA_ARGS__

#define GK_ISA baseline
#define GK_VECTOR_BYTES 16
#include GK_SOURCE
#undef GK_VECTOR_BYTES
#undef GK_ISA

#endif
