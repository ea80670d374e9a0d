// Kernels of the decoder and the encoder. Maps are (B, H, W, C) in half precision, C a multiple of 8, unless said.

#define ADDERS 8  // threads that add up the parts of one group
#define GROUP_EPS 1e-6f

// out (count, D) = codebook[tokens], D = CODE_DIM, a multiple of 8. A thread for 8 numbers.
KERNEL(MAP_THREADS)
look_up(const int *__restrict__ tokens, const u16 *__restrict__ codebook, u16 *__restrict__ out, u32 count) {
  const u32 at = blockIdx.x * MAP_THREADS + threadIdx.x, token = at / (CODE_DIM / 8), part = at % (CODE_DIM / 8);
  if (token >= count) return;
  const uint4 *source = (const uint4 *)(codebook + (u64)tokens[token] * CODE_DIM);
  ((uint4 *)out)[at] = source[part];
}

// Mean and reciprocal standard deviation of every group of channels: statistics (B, groups, 2). x (B, pixels, C),
// float32 if `wide` is not 0. A block sums `chunk` pixels of an image into partial (B, chunks, groups, 2). The last
// block of an image to end adds them up, always in the same order. finished (B): 0 before and after.
// Blocks: (chunks, B).
KERNEL(MAP_THREADS)
group_statistics(const void *__restrict__ x, float *__restrict__ partial, u32 *__restrict__ finished,
                 float *__restrict__ statistics, u32 pixels, u32 channels, u32 groups, u32 chunk, u32 wide) {
  SHARED float sums[2][MAP_THREADS * 8];
  SHARED double shares[2][MOST_GROUPS][ADDERS];
  SHARED u32 is_last;
  const u32 octets = channels / 8, lanes = MAP_THREADS / octets, thread = threadIdx.x, image = blockIdx.y;
  const u32 octet = thread % octets, lane = thread / octets, chunks = gridDim.x, per_group = channels / groups;
  if (lane < lanes) {
    float sum[8] = {0}, squares[8] = {0};
    const u32 end = min((blockIdx.x + 1) * chunk, pixels);
    for (u32 pixel = blockIdx.x * chunk + lane; pixel < end; pixel += lanes) {
      float values[8];
      load8_of(values, x, ((u64)image * pixels + pixel) * channels + octet * 8, wide);
      UNROLL
      for (int k = 0; k < 8; k++) {
        sum[k] += values[k];
        squares[k] += values[k] * values[k];
      }
    }
    UNROLL
    for (int k = 0; k < 8; k++) {
      sums[0][lane * channels + octet * 8 + k] = sum[k];
      sums[1][lane * channels + octet * 8 + k] = squares[k];
    }
  }
  __syncthreads();
  for (u32 c = thread; c < 2 * channels; c += MAP_THREADS) {
    float *column = sums[c / channels] + c % channels, sum = 0.0f;
    for (u32 i = 0; i < lanes; i++) sum += column[i * channels];
    column[0] = sum;
  }
  __syncthreads();
  partial += (u64)image * chunks * groups * 2;
  for (u32 i = thread; i < 2 * groups; i += MAP_THREADS) {
    float sum = 0.0f;
    for (u32 c = 0; c < per_group; c++) sum += sums[i & 1][i / 2 * per_group + c];
    partial[blockIdx.x * groups * 2 + i] = sum;
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) is_last = atomicAdd(&finished[image], 1u) == chunks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const u32 share = thread % ADDERS;
  for (u32 group = thread / ADDERS; group < groups; group += MAP_THREADS / ADDERS) {
    double sum = 0.0, squares = 0.0;
    for (u32 i = share; i < chunks; i += ADDERS) {
      sum += __ldcg(&partial[(i * groups + group) * 2]);
      squares += __ldcg(&partial[(i * groups + group) * 2 + 1]);
    }
    shares[0][group][share] = sum;
    shares[1][group][share] = squares;
  }
  __syncthreads();
  for (u32 group = thread; group < groups; group += MAP_THREADS) {
    double sum = 0.0, squares = 0.0;
    for (u32 i = 0; i < ADDERS; i++) {
      sum += shares[0][group][i];
      squares += shares[1][group][i];
    }
    const double count = (double)pixels * per_group, mean = sum / count;
    const float variance = fmaxf((float)(squares / count - mean * mean), 0.0f);
    statistics[((u64)image * groups + group) * 2] = (float)mean;
    statistics[((u64)image * groups + group) * 2 + 1] = 1.0f / sqrtf(variance + GROUP_EPS);
  }
  if (thread == 0) finished[image] = 0;
}

// y = (x - mean) * rstd * gain + bias, then y = y * sigmoid(y) if `silu` is not 0. x as in group_statistics, gain and
// bias (C). Blocks: (chunks, B).
KERNEL(MAP_THREADS)
group_normalise(const void *__restrict__ x, const float *__restrict__ statistics, const float *__restrict__ gain,
                const float *__restrict__ bias, u16 *__restrict__ y, u32 pixels, u32 channels, u32 groups, u32 chunk,
                u32 wide, u32 silu) {
  const u32 octets = channels / 8, lanes = MAP_THREADS / octets, image = blockIdx.y;
  const u32 octet = threadIdx.x % octets, lane = threadIdx.x / octets, per_group = channels / groups;
  float factor[8], shift[8];
  UNROLL
  for (int k = 0; k < 8; k++) {
    const u32 c = octet * 8 + k;
    const float *group = statistics + ((u64)image * groups + c / per_group) * 2;
    factor[k] = group[1] * gain[c];
    shift[k] = bias[c] - group[0] * factor[k];
  }
  const u32 end = min((blockIdx.x + 1) * chunk, pixels);
  for (u32 pixel = blockIdx.x * chunk + lane; lane < lanes && pixel < end; pixel += lanes) {
    const u64 at = ((u64)image * pixels + pixel) * channels + octet * 8;
    float values[8];
    load8_of(values, x, at, wide);
    UNROLL
    for (int k = 0; k < 8; k++) {
      values[k] = values[k] * factor[k] + shift[k];
      if (silu) values[k] = __fdividef(values[k], 1.0f + fast_exp2(-LOG2_E * values[k]));
    }
    store8(y + at, values);
  }
}

// y (B, 2 * H, 2 * W, C): every pixel of x (B, H, W, C) twice along both sides. A thread for 8 numbers of x.
KERNEL(MAP_THREADS)
double_map(const u16 *__restrict__ x, u16 *__restrict__ y, u32 pixels, u32 width, u32 octets) {
  const u64 at = (u64)blockIdx.x * MAP_THREADS + threadIdx.x;
  const u64 pixel = at / octets, octet = at % octets;
  if (pixel >= pixels) return;
  const uint4 value = ((const uint4 *)x)[at];
  uint4 *target = (uint4 *)y + (pixel / width * 4 * width + pixel % width * 2) * octets + octet;
  target[0] = target[octets] = value;
  target += 2 * (u64)width * octets;
  target[0] = target[octets] = value;
}

// out (rows, stride) = softmax over the first `columns` numbers of each row of scores (rows, stride), float32. The rest
// of each row becomes 0. A block for each row.
KERNEL(128)
softmax_rows(const float *__restrict__ scores, u16 *__restrict__ out, u32 columns, u32 stride) {
  SHARED float partial[2][4];
  const float *row = scores + (u64)blockIdx.x * stride;
  const u32 thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  float top = row[0];
  for (u32 c = thread; c < columns; c += 128) top = fmaxf(top, row[c]);
  top = lanes_max(top, 32);
  if (lane == 0) partial[0][warp] = top;
  __syncthreads();
  top = fmaxf(fmaxf(partial[0][0], partial[0][1]), fmaxf(partial[0][2], partial[0][3]));
  float sum = 0.0f;
  for (u32 c = thread; c < columns; c += 128) sum += fast_exp2((row[c] - top) * LOG2_E);
  sum = lanes_sum(sum, 32);
  if (lane == 0) partial[1][warp] = sum;
  __syncthreads();
  const float factor = 1.0f / (partial[1][0] + partial[1][1] + partial[1][2] + partial[1][3]);
  for (u32 c = thread; c < stride; c += 128)
    out[(u64)blockIdx.x * stride + c] = half_of(c < columns ? fast_exp2((row[c] - top) * LOG2_E) * factor : 0.0f);
}

// columns (B * H' * W', length): the part of x (B, H, W, C) under the kernel for each pixel of the result, in the order
// kernel row, kernel column, channel; 0 outside of x and at the end of a row. The numbers are float32 if `wide` is not
// 0. x is (B, C, H, W) if `planar` is not 0. A thread for each number.
KERNEL(MAP_THREADS)
im2col(const void *__restrict__ x, void *__restrict__ columns, u32 height, u32 width, u32 channels, u32 kernel_width,
       u32 kernel_size, u32 stride, u32 top, u32 left, u32 out_height, u32 out_width, u32 length, u32 rows, u32 wide,
       u32 planar) {
  const u64 at = (u64)blockIdx.x * MAP_THREADS + threadIdx.x, row = at / length;
  const u32 k = (u32)(at % length), channel = k % channels, tap = k / channels;
  if (row >= rows) return;
  const u64 image = row / ((u64)out_height * out_width);
  const int y = (int)((u32)(row / out_width) % out_height * stride + tap / kernel_width) - (int)top;
  const int x_at = (int)((u32)(row % out_width) * stride + tap % kernel_width) - (int)left;
  const int inside = tap < kernel_size && y >= 0 && y < (int)height && x_at >= 0 && x_at < (int)width;
  u64 from = 0;
  if (inside) {
    from = planar ? ((image * channels + channel) * height + (u32)y) * width + (u32)x_at
                  : ((image * height + (u32)y) * width + (u32)x_at) * channels + channel;
  }
  if (wide) {
    ((float *)columns)[at] = inside ? ((const float *)x)[from] : 0.0f;
  } else {
    ((u16 *)columns)[at] = inside ? ((const u16 *)x)[from] : (u16)0;
  }
}

// out (B, channels, pixels) float32 of the first channels of x (B, pixels, stride), which is float32 if `wide` is not
// 0. A thread for each pixel. Blocks: (ceil(pixels / MAP_THREADS), B).
KERNEL(MAP_THREADS)
to_planes(const void *__restrict__ x, float *__restrict__ out, u32 pixels, u32 stride, u32 channels, u32 wide) {
  const u32 pixel = blockIdx.x * MAP_THREADS + threadIdx.x;
  if (pixel >= pixels) return;
  const u64 from = ((u64)blockIdx.y * pixels + pixel) * stride, to = (u64)blockIdx.y * channels * pixels + pixel;
  for (u32 c = 0; c < channels; c++)
    out[to + (u64)c * pixels] = wide ? ((const float *)x)[from + c] : float_of(((const u16 *)x)[from + c]);
}

// out = a + b, or a alone if `b` is null. a and out are float32 where wide_a and wide_out are not 0; b is in half
// precision. count: vectors of 8 numbers.
KERNEL(MAP_THREADS)
add_maps(const void *a, const u16 *b, void *out, u32 count, u32 wide_a,
         u32 wide_out) {
  const u32 at = blockIdx.x * MAP_THREADS + threadIdx.x;
  if (at >= count) return;
  float values[8];
  load8_of(values, a, (u64)at * 8, wide_a);
  if (b) {
    float added[8];
    load8(added, b + (u64)at * 8);
    UNROLL
    for (int k = 0; k < 8; k++) values[k] += added[k];
  }
  store8_of(out, (u64)at * 8, values, wide_out);
}
