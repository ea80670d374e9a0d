// Numbers in half precision: fp16 if the macro FLOAT16 is 1, bf16 if it is 0. They are stored as u16. All arithmetic is
// in float32, and results are rounded once, to the nearest.

#define LOG2_E 1.4426950408889634f

#ifndef STAND_INS
DEVICE float float_of(u16 value) {
#if FLOAT16
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
#else
  return __int_as_float((int)((u32)value << 16));
#endif
}

// Two numbers, the first in the lower half of the result.
DEVICE u32 pack(float low, float high) {
  u32 result;
#if FLOAT16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#endif
  return result;
}

// 2**x to about 22 bits.
DEVICE float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

DEVICE u16 half_of(float value) { return (u16)pack(value, 0.0f); }

// --- vectors of 8 numbers, which take 16 bytes in half precision. Their addresses must be aligned to 16 bytes.

DEVICE void unpack8(float *values, uint4 packed) {
  const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
  UNROLL
  for (int i = 0; i < 4; i++) {
    values[2 * i] = float_of((u16)words[i]);
    values[2 * i + 1] = float_of((u16)(words[i] >> 16));
  }
}

DEVICE void load8(float *values, const u16 *source) { unpack8(values, *(const uint4 *)source); }

DEVICE void load8_wide(float *values, const float *source) {
  const float4 low = ((const float4 *)source)[0], high = ((const float4 *)source)[1];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

// From an array at `index`, which has float32 numbers if `wide` is not 0.
DEVICE void load8_of(float *values, const void *array, u64 index, u32 wide) {
  if (wide) {
    load8_wide(values, (const float *)array + index);
  } else {
    load8(values, (const u16 *)array + index);
  }
}

DEVICE void store8(u16 *target, const float *values) {
  uint4 packed;
  packed.x = pack(values[0], values[1]);
  packed.y = pack(values[2], values[3]);
  packed.z = pack(values[4], values[5]);
  packed.w = pack(values[6], values[7]);
  *(uint4 *)target = packed;
}

DEVICE void store8_wide(float *target, const float *values) {
  float4 low, high;
  low.x = values[0], low.y = values[1], low.z = values[2], low.w = values[3];
  high.x = values[4], high.y = values[5], high.z = values[6], high.w = values[7];
  ((float4 *)target)[0] = low, ((float4 *)target)[1] = high;
}

DEVICE void store8_of(void *array, u64 index, const float *values, u32 wide) {
  if (wide) {
    store8_wide((float *)array + index, values);
  } else {
    store8((u16 *)array + index, values);
  }
}

// --- sums and maxima over lanes of a warp. All lanes must call them.

DEVICE float shuffle_xor(float value, int mask) {
  return __int_as_float((int)__shfl_xor_sync(ALL_LANES, (u32)__float_as_int(value), mask));
}

// Over groups of `lanes` neighbours, a power of two. Every lane gets the result of its group.
DEVICE float lanes_sum(float value, int lanes) {
  for (int mask = lanes / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

DEVICE float lanes_max(float value, int lanes) {
  for (int mask = lanes / 2; mask; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}
