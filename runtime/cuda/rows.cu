// Kernels of the transformer that work on rows: one row is the WIDTH numbers of a token.
//
// Macros: WIDTH (C, a multiple of 8), HEAD_SIZE (S: 16, 32, 64 or 128), CODE_DIM (D), EMBED_ROWS. The residual stream is
// float32. N sequences have L = `positions` new tokens each, so row n * L + l is token l of sequence n.
// Modulations are float32 (N, C), or (N, 1, C).

#define VECTORS (WIDTH / 8)
#define ROW_WARPS ((VECTORS + 31) / 32 < 8 ? (VECTORS + 31) / 32 : 8)
#define ROW_THREADS (ROW_WARPS * 32)
#define ROW_ITEMS ((VECTORS + ROW_THREADS - 1) / ROW_THREADS)
#define HEAD_LANES (HEAD_SIZE / 8)
#define NORM_EPS 1e-6f
#define UNIT_EPS 1e-12f
#define HAS_BRANCH 1u   // the row kernels first add a branch of the block
#define WIDE_BRANCH 2u  // the branch is float32
#define WIDE_RESULT 4u  // the result is float32

#define EACH_VECTOR(i) for (int i = 0; i < ROW_ITEMS; i++) if ((int)threadIdx.x + i * ROW_THREADS < VECTORS)
#define COLUMN(i) (((int)threadIdx.x + (i) * ROW_THREADS) * 8)

// The sum over all threads of a block. Has a barrier. Each call in a kernel needs its own `partial`.
DEVICE float row_sum(float *partial, float value) {
  value = lanes_sum(value, 32);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = value;
  __syncthreads();
  float sum = 0.0f;
  UNROLL
  for (int warp = 0; warp < ROW_WARPS; warp++) sum += partial[warp];
  return sum;
}

// Adds branch * gamma to a row of the stream, if there is a branch.
DEVICE void add_branch(float values[][8], const float *stream, const void *branch, const float *gamma, u64 row,
                       u64 sequence, u32 flags) {
  UNROLL
  EACH_VECTOR(i) {
    load8_wide(values[i], stream + row * WIDTH + COLUMN(i));
    if (flags & HAS_BRANCH) {
      float added[8], factor[8];
      load8_of(added, branch, row * WIDTH + COLUMN(i), flags & WIDE_BRANCH);
      load8_wide(factor, gamma + sequence * WIDTH + COLUMN(i));
      UNROLL
      for (int k = 0; k < 8; k++) values[i][k] += added[k] * factor[k];
    }
  }
}

// Layer normalisation without parameters, then * (1 + scale) + shift. partial: of both sums.
DEVICE void normalise(float values[][8], float (*partial)[ROW_WARPS], const float *scale, const float *shift,
                      u64 sequence) {
  float sum = 0.0f;
  UNROLL
  EACH_VECTOR(i) {
    UNROLL
    for (int k = 0; k < 8; k++) sum += values[i][k];
  }
  const float mean = row_sum(partial[0], sum) * (1.0f / WIDTH);
  float squares = 0.0f;
  UNROLL
  EACH_VECTOR(i) {
    UNROLL
    for (int k = 0; k < 8; k++) {
      values[i][k] -= mean;
      squares += values[i][k] * values[i][k];
    }
  }
  const float factor = 1.0f / sqrtf(row_sum(partial[1], squares) * (1.0f / WIDTH) + NORM_EPS);
  UNROLL
  EACH_VECTOR(i) {
    float gain[8], bias[8];
    load8_wide(gain, scale + sequence * WIDTH + COLUMN(i));
    load8_wide(bias, shift + sequence * WIDTH + COLUMN(i));
    UNROLL
    for (int k = 0; k < 8; k++) values[i][k] = values[i][k] * factor * (1.0f + gain[k]) + bias[k];
  }
}

// stream (rows, C) = codes (rows, D) . weight (D, C) + offset (rows, C), all float32.
// Blocks: (ceil(rows / EMBED_ROWS), ceil(C / 512)).
KERNEL(128)
embed(const float *__restrict__ codes, const float *__restrict__ weight, const float *__restrict__ offset,
      float *__restrict__ stream, u32 rows) {
  SHARED float shared_codes[EMBED_ROWS][CODE_DIM];
  const u32 first = blockIdx.x * EMBED_ROWS, column = (blockIdx.y * 128 + threadIdx.x) * 4;
  const u32 count = min(rows - first, (u32)EMBED_ROWS);
  for (u32 i = threadIdx.x; i < EMBED_ROWS * CODE_DIM; i += 128)
    shared_codes[i / CODE_DIM][i % CODE_DIM] = i < count * CODE_DIM ? codes[(u64)first * CODE_DIM + i] : 0.0f;
  __syncthreads();
  if (column >= WIDTH) return;
  float sums[EMBED_ROWS][4];
  UNROLL
  for (u32 r = 0; r < EMBED_ROWS; r++) sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = 0.0f;
  for (int d = 0; d < CODE_DIM; d++) {
    const float4 w = *(const float4 *)(weight + (u64)d * WIDTH + column);
    UNROLL
    for (u32 r = 0; r < EMBED_ROWS; r++) {
      const float code = shared_codes[r][d];
      sums[r][0] += code * w.x, sums[r][1] += code * w.y, sums[r][2] += code * w.z, sums[r][3] += code * w.w;
    }
  }
  UNROLL
  for (u32 r = 0; r < EMBED_ROWS; r++) {
    if (r >= count) continue;
    const u64 at = (u64)(first + r) * WIDTH + column;
    float4 sum = *(const float4 *)(offset + at);
    sum.x += sums[r][0], sum.y += sums[r][1], sum.z += sums[r][2], sum.w += sums[r][3];
    *(float4 *)(stream + at) = sum;
  }
}

// stream (N * L, C) += branch * gamma, then result = norm(stream) * (1 + scale) + shift. A block for each row.
KERNEL(ROW_THREADS)
modulate_rows(float *__restrict__ stream, const void *__restrict__ branch, const float *__restrict__ gamma,
              const float *__restrict__ scale, const float *__restrict__ shift, void *__restrict__ result,
              u32 positions, u32 flags) {
  SHARED float partial[2][ROW_WARPS];
  const u64 row = blockIdx.x, sequence = blockIdx.x / positions;
  float values[ROW_ITEMS][8];
  add_branch(values, stream, branch, gamma, row, sequence, flags);
  if (flags & HAS_BRANCH) {
    UNROLL
    EACH_VECTOR(i) store8_wide(stream + row * WIDTH + COLUMN(i), values[i]);
  }
  normalise(values, partial, scale, shift, sequence);
  UNROLL
  EACH_VECTOR(i) store8_of(result, row * WIDTH + COLUMN(i), values[i], flags & WIDE_RESULT);
}

// The rows of the head, from the rows with and without the class: result (B * L, C) = c + t * (c - u), where c and u are the rows of
// the sequences that cond and uncond name, after the last branch, the normalisation and the modulation.
// A block for each row of the result.
KERNEL(ROW_THREADS)
guide_rows(const float *__restrict__ stream, const void *__restrict__ branch, const float *__restrict__ gamma,
           const float *__restrict__ scale, const float *__restrict__ shift, const int *__restrict__ cond,
           const int *__restrict__ uncond, const float *__restrict__ t, u16 *__restrict__ result, u32 positions,
           u32 flags) {
  SHARED float partial[2][2][ROW_WARPS];
  const u32 image = blockIdx.x / positions, position = blockIdx.x % positions;
  const u64 c = (u64)cond[image], u = (u64)uncond[image];
  float values[ROW_ITEMS][8];
  add_branch(values, stream, branch, gamma, c * positions + position, c, flags);
  normalise(values, partial[0], scale, shift, c);
  if (c != u) {
    const float weight = t[image];
    float other[ROW_ITEMS][8];
    add_branch(other, stream, branch, gamma, u * positions + position, u, flags);
    normalise(other, partial[1], scale, shift, u);
    UNROLL
    EACH_VECTOR(i) {
      UNROLL
      for (int k = 0; k < 8; k++) values[i][k] += weight * (values[i][k] - other[i][k]);
    }
  }
  UNROLL
  EACH_VECTOR(i) store8(result + (u64)blockIdx.x * WIDTH + COLUMN(i), values[i]);
}

// Keys and queries become unit vectors in every head, and queries are multiplied by the head's temperature. joined
// (N * L, 3 * C): query, key and value of each row. queries (N * L, C); joined and queries are float32 if `wide` is not
// 0. keys, values (L, N, C): the tail of the cache. A block for each row.
KERNEL(ROW_THREADS)
split_heads(const void *__restrict__ joined, const float *__restrict__ temperature, void *__restrict__ queries,
            u16 *__restrict__ keys, u16 *__restrict__ values, u32 positions, u32 sequences, u32 wide) {
  const u32 row = blockIdx.x;
  const u64 from = (u64)row * (3 * WIDTH), to = (u64)row * WIDTH;
  const u64 cached = ((u64)(row % positions) * sequences + row / positions) * WIDTH;
  UNROLL
  for (int i = 0; i < ROW_ITEMS; i++) {
    const int column = COLUMN(i), inside = column < WIDTH;
    float query[8] = {0}, key[8] = {0}, value[8];
    float query_square = 0.0f, key_square = 0.0f;
    if (inside) {
      load8_of(query, joined, from + column, wide);
      load8_of(key, joined, from + WIDTH + column, wide);
      load8_of(value, joined, from + 2 * WIDTH + column, wide);
      UNROLL
      for (int k = 0; k < 8; k++) {
        query_square += query[k] * query[k];
        key_square += key[k] * key[k];
      }
    }
    const float query_length = sqrtf(lanes_sum(query_square, HEAD_LANES));
    const float key_length = sqrtf(lanes_sum(key_square, HEAD_LANES));
    if (!inside) continue;
    const float query_factor = temperature[column / HEAD_SIZE] / fmaxf(query_length, UNIT_EPS);
    const float key_factor = 1.0f / fmaxf(key_length, UNIT_EPS);
    UNROLL
    for (int k = 0; k < 8; k++) {
      query[k] *= query_factor;
      key[k] *= key_factor;
    }
    store8_of(queries, to + column, query, wide);
    store8(keys + cached + column, key);
    store8(values + cached + column, value);
  }
}

// The input of the condition for `count` labels: hidden (count, C) = silu(embedding[label]) - mean, and
// first (count, C) = embedding[label] + start. A block for each label.
KERNEL(ROW_THREADS)
class_rows(const int *__restrict__ labels, const float *__restrict__ embedding, const float *__restrict__ mean,
           const float *__restrict__ start, u16 *__restrict__ hidden, float *__restrict__ first) {
  const u64 row = blockIdx.x, label = (u64)labels[blockIdx.x];
  UNROLL
  EACH_VECTOR(i) {
    float value[8], common[8], added[8];
    load8_wide(value, embedding + label * WIDTH + COLUMN(i));
    load8_wide(common, mean + COLUMN(i));
    load8_wide(added, start + COLUMN(i));
    UNROLL
    for (int k = 0; k < 8; k++) {
      added[k] += value[k];
      value[k] = value[k] / (1.0f + expf(-value[k])) - common[k];
    }
    store8(hidden + row * WIDTH + COLUMN(i), value);
    store8_wide(first + row * WIDTH + COLUMN(i), added);
  }
}
