/* Stand-ins for the parts of half.cu that are PTX. The kernels of the sampling loop define no FLOAT16 and use none. */

#ifdef FLOAT16
#define STAND_INS

static inline float fast_exp2(float x) { return exp2f(x); }
#define __threadfence() ((void)0)
#define __ldcg(address) (*(address))
#define __fdividef(a, b) ((a) / (b))

#if FLOAT16
static inline float float_of(unsigned short bits) {
  const unsigned sign = (unsigned)(bits >> 15) << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) return __int_as_float((int)sign) + (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
  if (exponent == 31) return __int_as_float((int)(sign | 0x7f800000u | fraction << 13));
  return __int_as_float((int)(sign | (exponent + 112) << 23 | fraction << 13));
}

static inline unsigned shim_round(float value) {
  const unsigned bits = (unsigned)__float_as_int(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return sign | 0x7e00u;
  if (size >= 0x477ff000u) return sign | 0x7c00u; /* at least halfway from the largest number to the next */
  if (size < 0x38800000u) { /* subnormal: a multiple of 2**-24, rounded to even by the addition */
    const float units = __int_as_float((int)size) * 0x1p24f + 0x1p23f;
    return sign | ((unsigned)__float_as_int(units) & 0x7fffffu);
  }
  return sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13);
}
#else
static inline float float_of(unsigned short bits) { return __int_as_float((int)((unsigned)bits << 16)); }

static inline unsigned shim_round(float value) {
  const unsigned bits = (unsigned)__float_as_int(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 64;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
#endif

static inline unsigned pack(float low, float high) { return shim_round(low) | shim_round(high) << 16; }

#include "host_tensor_cores.h"
#endif
