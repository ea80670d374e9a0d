/* CUDA's additions to C, for a block whose threads are fibers. This file is included before the kernels. host_shim.c
   runs them. At a warp operation a lane waits for the other lanes of its warp, at a barrier for the whole block. */

#define _GNU_SOURCE
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define KERNEL(threads) static void
#define DEVICE static inline
#define SHARED static __attribute__((section("shared_memory"), aligned(16)))
#define UNROLL

typedef struct {
  unsigned x, y, z;
} ShimIndex;
typedef struct __attribute__((aligned(16))) {
  float x, y, z, w;
} float4;
typedef struct __attribute__((aligned(16))) {
  unsigned x, y, z, w;
} uint4;

/* One warp operation: the values of all lanes, and their sum, maximum and votes. */
typedef struct {
  unsigned long long values[32];
  unsigned votes, sum, top, arrived, site;
} ShimExchange;

typedef struct {
  jmp_buf env;
  ShimIndex index;
  unsigned warp, lane, turn, barrier;
  unsigned copies, copies_ended; /* asynchronous copies that wait, and how many of them are in groups */
  int state;
} ShimFiber;

static ShimFiber *shim_now;
static ShimIndex shim_block, shim_grid;
#define threadIdx (shim_now->index)
#define blockIdx shim_block
#define gridDim shim_grid

static void shim_barrier(unsigned site);
static ShimExchange *shim_exchange(unsigned mask, unsigned site, unsigned long long value);

/* All lanes must reach the same operation. It is identified by its source line and its kind. */
#define SHIM_WARP(name, kind, type, argument, result)                                                     \
  static inline type name(unsigned line, unsigned mask, unsigned long long value, unsigned argument) {   \
    const ShimExchange *exchange = shim_exchange(mask, line * 8 + kind, value);                           \
    (void)argument;                                                                                       \
    return result;                                                                                        \
  }
SHIM_WARP(shim_ballot, 0, unsigned, unused, exchange->votes)
SHIM_WARP(shim_max, 1, unsigned, unused, exchange->top)
SHIM_WARP(shim_add, 2, unsigned, unused, exchange->sum)
SHIM_WARP(shim_shfl, 3, unsigned long long, from, exchange->values[from & 31])
SHIM_WARP(shim_shfl_up, 4, unsigned long long, step,
          exchange->values[shim_now->lane - (shim_now->lane >= step ? step : 0)])
SHIM_WARP(shim_shfl_xor, 5, unsigned long long, bits, exchange->values[shim_now->lane ^ (bits & 31)])

#define __syncthreads() shim_barrier(__LINE__)
#define __ballot_sync(mask, vote) shim_ballot(__LINE__, mask, (vote) != 0, 0)
#define __reduce_max_sync(mask, value) shim_max(__LINE__, mask, value, 0)
#define __reduce_add_sync(mask, value) shim_add(__LINE__, mask, value, 0)
#define __shfl_sync(mask, value, from) shim_shfl(__LINE__, mask, value, from)
#define __shfl_xor_sync(mask, value, bits) shim_shfl_xor(__LINE__, mask, value, (unsigned)(bits))
#define __shfl_up_sync(mask, value, step) shim_shfl_up(__LINE__, mask, value, step)

#define atomicAdd(address, value)             \
  ({                                          \
    __typeof__(*(address)) shim_old = *(address); \
    *(address) += (value);                    \
    shim_old;                                 \
  })
#define atomicMax(address, value)                                   \
  ({                                                                \
    __typeof__(*(address)) shim_old = *(address), shim_new = (value); \
    if (shim_new > shim_old) *(address) = shim_new;                 \
    shim_old;                                                       \
  })

#define max(a, b)                          \
  ({                                       \
    __typeof__(a) shim_a = (a), shim_b = (b); \
    shim_a > shim_b ? shim_a : shim_b;     \
  })
#define min(a, b)                          \
  ({                                       \
    __typeof__(a) shim_a = (a), shim_b = (b); \
    shim_a < shim_b ? shim_a : shim_b;     \
  })
#define __popc __builtin_popcount
#define __ffs __builtin_ffs
#define __clzll(value) ((value) ? __builtin_clzll((unsigned long long)(value)) : 64)

/* The compiler must not fuse (-ffp-contract=off), so plain operators round as these do. */
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __ull2double_rn(unsigned long long a) { return (double)a; }

#define SHIM_BITS(name, from, to)          \
  static inline to name(from value) {      \
    to bits;                               \
    memcpy(&bits, &value, sizeof bits);    \
    return bits;                           \
  }
SHIM_BITS(__float_as_int, float, int)
SHIM_BITS(__int_as_float, int, float)
SHIM_BITS(__double_as_longlong, double, long long)
SHIM_BITS(__longlong_as_double, long long, double)

#include "host_half.h"
