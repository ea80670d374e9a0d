// What all kernels share: CUDA's keywords, integer types, and vectors of 16 bytes.
//
// The files of kernels are C plus CUDA's additions. They can be compiled as C and run on a CPU if stand-ins replace
// these additions. Then KERNEL is defined before this file.

#ifndef KERNEL
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define DEVICE static __device__ __forceinline__
#define SHARED __shared__
#define UNROLL _Pragma("unroll")
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define ALL_LANES 0xffffffffu
