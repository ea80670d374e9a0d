// Attention over a key/value cache in place: out = softmax(q keysᵀ) values, for every sequence and head.
//
// q: (N, L, H, D) of L new tokens, times the temperature. keys, values: (T, N, H, D) of all T tokens, the new ones
// included. So a cache grows at its end. out: (N, L, H·D). If `scale_of` is not null, all tokens are new
// (L = T), and token i attends to token j only if scale_of[j] <= scale_of[i]. Scales are not negative. Every
// array is aligned to 16 bytes.
//
// Macros configure the kernels: HEADS (H), HEAD_SIZE (D: 16, 32, 64 or 128), and FLOAT16 of half.cu.

#define ATTENTION_ROWS 64                           // queries of a block: 16 for each of its 4 warps
#define ATTENTION_KEYS (HEAD_SIZE <= 80 ? 64 : 32)  // keys of a tile; two tiles of keys and values must fit in 48 KB
#define ATTENTION_CHUNKS (HEAD_SIZE / 8)            // vectors of 16 bytes in a row
#define NO_SCORE __int_as_float((int)0xff800000u)  // minus infinity
#define LATEST_SCALE 0x7fffffff

#if HEAD_SIZE % 16 || HEAD_SIZE < 16 || HEAD_SIZE > 128
#error "HEAD_SIZE must be a multiple of 16 from 16 to 128"
#endif

// --- tensor cores and asynchronous copies, from sm_80 on. All lanes of a warp must call the first three.

#ifndef STAND_INS
#if FLOAT16
#define MMA_TYPES "f32.f16.f16.f32"
#else
#define MMA_TYPES "f32.bf16.bf16.f32"
#endif

// c += a b, for matrices c (16, 8), a (16, 16) and b (16, 8) that are spread over the lanes of a warp.
DEVICE void multiply_matrices(float *c, const u32 *a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices (8, 8) from shared memory. Lane 8 i + r gives the address of row r of matrix i.
DEVICE void load_matrices(u32 *m, const uint4 *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
}

// The same matrices, each of them transposed.
DEVICE void load_transposed(u32 *m, const uint4 *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
}

// Copies 16 bytes to shared memory, of which only the first `bytes` are read. The others become 0.
DEVICE void start_copy(uint4 *target, const u16 *source, u32 bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(target)),
               "l"(source), "r"(bytes)
               : "memory");
}

// Ends a group of copies. `wait_for_copies` waits for all groups that this thread has ended.
DEVICE void end_copies(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }

DEVICE void wait_for_copies(void) { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// threadIdx.x, read again. What follows from it is computed again too, and occupies no registers until then.
DEVICE u32 thread_again(void) {
  u32 thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
#endif

// --- tiles in shared memory

// Rows are swizzled, or padded by a vector if they do not fill the 32 banks. So the 8 rows of a matrix are in different
// banks.
#define ATTENTION_SWIZZLED (HEAD_SIZE % 64 == 0)
#define ATTENTION_TILE (ATTENTION_KEYS * (ATTENTION_CHUNKS + !ATTENTION_SWIZZLED))

DEVICE u32 tile_place(u32 row, u32 chunk) {
  return ATTENTION_SWIZZLED ? row * ATTENTION_CHUNKS + (chunk ^ (row & 7)) : row * (ATTENTION_CHUNKS + 1) + chunk;
}

#define COPY_ROWS (128 / ATTENTION_CHUNKS)  // rows that the threads of a block copy at once

// Starts to copy keys and values of one head from token `first` on. Tokens after the last become 0.
DEVICE void copy_tile(uint4 *key_tile, uint4 *value_tile, const u16 *keys, const u16 *values, u32 first, u32 tokens,
                      u64 token_stride) {
  const u32 thread = thread_again(), row = thread / ATTENTION_CHUNKS, chunk = thread % ATTENTION_CHUNKS;
  UNROLL
  for (u32 i = 0; i < ATTENTION_KEYS; i += COPY_ROWS) {
    if (128 % ATTENTION_CHUNKS && (row >= COPY_ROWS || row + i >= ATTENTION_KEYS)) break;
    const u32 token = first + row + i;
    const u64 offset = min(token, tokens - 1) * token_stride + chunk * 8;
    const u32 bytes = token < tokens ? 16 : 0;
    start_copy(key_tile + tile_place(row + i, chunk), keys + offset, bytes);
    start_copy(value_tile + tile_place(row + i, chunk), values + offset, bytes);
  }
  end_copies();
}

// --- masks. All lanes of a warp must call these, and all get the result.

// One past the last token that queries of scale `top` and below can attend to.
DEVICE u32 tokens_seen(const int *scale_of, u32 tokens, u32 top) {
  u32 seen = 0;
  for (u32 token = threadIdx.x & 31; token < tokens; token += 32)
    if ((u32)scale_of[token] <= top) seen = token + 1;
  return __reduce_max_sync(ALL_LANES, seen);
}

// The first token that queries of scale `low` cannot attend to; `tokens` if there is none.
DEVICE u32 first_hidden(const int *scale_of, u32 tokens, u32 low) {
  u32 hidden = 0;
  for (u32 token = threadIdx.x & 31; token < tokens; token += 32)
    if ((u32)scale_of[token] > low) hidden = max(hidden, tokens - token);
  return tokens - __reduce_max_sync(ALL_LANES, hidden);
}

// A maximum times log2(e), as it is subtracted from scores; 0 if there is no score yet.
DEVICE float offset_of(float top) { return top == NO_SCORE ? 0.0f : top * LOG2_E; }

// --- many queries: tiles of keys and values, tensor cores, and a running maximum and sum for every query
//
// Lane l holds parts of the queries l / 4 and l / 4 + 8 of its warp. Of every 8 columns it has 2 * (l % 4) and the next.
// Lanes without a query repeat the last one, and store the same result.

// Threads, and blocks of a multiprocessor. Four blocks limit a thread to 128 registers, which spills from sm_100 on.
#define ATTENTION_BOUNDS 128, (HEAD_SIZE <= 64 && __CUDA_ARCH__ < 1000 ? 4 : 2)

KERNEL(ATTENTION_BOUNDS)
attention(const u16 *__restrict__ q, const u16 *__restrict__ keys, const u16 *__restrict__ values,
          u16 *__restrict__ out, const int *__restrict__ scale_of, u32 new_tokens, u32 tokens, u32 sequences) {
  SHARED uint4 tiles[2][2][ATTENTION_TILE];  // two buffers of keys and values
  const u32 lane = threadIdx.x & 31, block_row = blockIdx.x * ATTENTION_ROWS;
  const u32 warp_row = block_row + (threadIdx.x >> 5) * 16, pair = (lane & 3) * 2;
  const u32 row0 = min(warp_row + lane / 4, new_tokens - 1), row1 = min(warp_row + lane / 4 + 8, new_tokens - 1);
  const u64 token_stride = (u64)sequences * (HEADS * HEAD_SIZE);
  const u64 head_offset = (u64)(blockIdx.z * HEADS + blockIdx.y) * HEAD_SIZE;
  keys += head_offset;
  values += head_offset;
  copy_tile(tiles[0][0], tiles[0][1], keys, values, 0, tokens, token_stride);

  const u64 new_offset = ((u64)blockIdx.z * new_tokens * HEADS + blockIdx.y) * HEAD_SIZE;
  const u16 *const query0 = q + new_offset + (u64)row0 * (HEADS * HEAD_SIZE) + pair;
  const u16 *const query1 = q + new_offset + (u64)row1 * (HEADS * HEAD_SIZE) + pair;
  u32 queries[HEAD_SIZE / 16][4];
  UNROLL
  for (int k = 0; k < HEAD_SIZE / 16; k++) {
    queries[k][0] = *(const u32 *)(query0 + 16 * k);
    queries[k][1] = *(const u32 *)(query1 + 16 * k);
    queries[k][2] = *(const u32 *)(query0 + 16 * k + 8);
    queries[k][3] = *(const u32 *)(query1 + 16 * k + 8);
  }

  u32 block_end = tokens, end = tokens;  // keys that the queries of the block and of the warp attend to
  u32 full = tokens;                     // all queries of the warp attend to the keys before it
  int scale0 = 0, scale1 = 0;
  if (scale_of) {
    scale0 = scale_of[row0], scale1 = scale_of[row1];
    const u32 low = ~__reduce_max_sync(ALL_LANES, ~(u32)min(scale0, scale1));
    const u32 top = __reduce_max_sync(ALL_LANES, (u32)max(scale0, scale1));
    const u32 first = min(block_row + lane, new_tokens - 1), second = min(block_row + 32 + lane, new_tokens - 1);
    const u32 block_top = __reduce_max_sync(ALL_LANES, (u32)max(scale_of[first], scale_of[second]));
    block_end = tokens_seen(scale_of, tokens, block_top);
    end = tokens_seen(scale_of, tokens, top);
    full = first_hidden(scale_of, tokens, low);
  }
  if (warp_row >= new_tokens) end = 0;

  float sums[HEAD_SIZE / 8][4], top0 = NO_SCORE, top1 = NO_SCORE, sum0 = 0.0f, sum1 = 0.0f;
  UNROLL
  for (int i = 0; i < HEAD_SIZE / 8; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;

  for (u32 first = 0, stage = 0; first < block_end; first += ATTENTION_KEYS, stage ^= 1) {
    wait_for_copies();
    __syncthreads();  // the tile is complete, and no warp still reads the other buffer
    if (first + ATTENTION_KEYS < block_end)
      copy_tile(tiles[stage ^ 1][0], tiles[stage ^ 1][1], keys, values, first + ATTENTION_KEYS, tokens, token_stride);
    if (first >= end) continue;

    float scores[ATTENTION_KEYS / 8][4];
    UNROLL
    for (int i = 0; i < ATTENTION_KEYS / 8; i++) scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = 0.0f;
    UNROLL
    for (int k = 0; k < HEAD_SIZE / 16; k++) {
      UNROLL
      for (int i = 0; i < ATTENTION_KEYS / 16; i++) {
        u32 m[4];
        load_matrices(m, tiles[stage][0] + tile_place(16 * i + (lane & 7) + (lane / 16) * 8, 2 * k + (lane / 8 & 1)));
        multiply_matrices(scores[2 * i], queries[k], m[0], m[1]);
        multiply_matrices(scores[2 * i + 1], queries[k], m[2], m[3]);
      }
    }

    if (first + ATTENTION_KEYS > full) {
      UNROLL
      for (int i = 0; i < ATTENTION_KEYS / 4; i++) {
        const u32 token = first + 8 * (i / 2) + pair + i % 2;
        const int scale = token >= tokens ? LATEST_SCALE : scale_of ? scale_of[token] : 0;
        if (scale > scale0) scores[i / 2][i % 2] = NO_SCORE;
        if (scale > scale1) scores[i / 2][2 + i % 2] = NO_SCORE;
      }
    }

    float new0 = top0, new1 = top1;
    UNROLL
    for (int i = 0; i < ATTENTION_KEYS / 8; i++) {
      new0 = fmaxf(new0, fmaxf(scores[i][0], scores[i][1]));
      new1 = fmaxf(new1, fmaxf(scores[i][2], scores[i][3]));
    }
    new0 = lanes_max(new0, 4);
    new1 = lanes_max(new1, 4);
    const float offset0 = offset_of(new0), offset1 = offset_of(new1);
    const float factor0 = fast_exp2(top0 * LOG2_E - offset0), factor1 = fast_exp2(top1 * LOG2_E - offset1);
    top0 = new0, top1 = new1;
    sum0 *= factor0, sum1 *= factor1;
    UNROLL
    for (int i = 0; i < HEAD_SIZE / 8; i++) {
      sums[i][0] *= factor0, sums[i][1] *= factor0;
      sums[i][2] *= factor1, sums[i][3] *= factor1;
    }

    UNROLL
    for (int k = 0; k < ATTENTION_KEYS / 16; k++) {
      u32 weights[4];
      UNROLL
      for (int i = 0; i < 2; i++) {
        const float *const here = scores[2 * k + i];
        const float weight0 = fast_exp2(here[0] * LOG2_E - offset0), weight1 = fast_exp2(here[1] * LOG2_E - offset0);
        const float weight2 = fast_exp2(here[2] * LOG2_E - offset1), weight3 = fast_exp2(here[3] * LOG2_E - offset1);
        sum0 += weight0 + weight1;
        sum1 += weight2 + weight3;
        weights[2 * i] = pack(weight0, weight1);
        weights[2 * i + 1] = pack(weight2, weight3);
      }
      UNROLL
      for (int i = 0; i < HEAD_SIZE / 16; i++) {
        u32 m[4];
        load_transposed(m, tiles[stage][1] + tile_place(16 * k + (lane & 15), 2 * i + lane / 16));
        multiply_matrices(sums[2 * i], weights, m[0], m[1]);
        multiply_matrices(sums[2 * i + 1], weights, m[2], m[3]);
      }
    }
  }

  if (end == 0) return;
  const float share0 = 1.0f / lanes_sum(sum0, 4), share1 = 1.0f / lanes_sum(sum1, 4);
  const u32 thread = thread_again(), odd = thread & 1, row = block_row + thread / 32 * 16 + thread % 32 / 4;
  u16 *const target = out + new_offset + 8 * odd + (thread & 2) * 2;
  u16 *const target0 = target + (u64)min(row, new_tokens - 1) * (HEADS * HEAD_SIZE);
  u16 *const target1 = target + (u64)min(row + 8, new_tokens - 1) * (HEADS * HEAD_SIZE);
  UNROLL
  for (int i = 0; i < HEAD_SIZE / 16; i++) {
    // Neighbours exchange halves: the even lane gets 4 numbers of the first 8 columns, the odd lane 4 of the next 8
    const u32 low0 = pack(sums[2 * i][0] * share0, sums[2 * i][1] * share0);
    const u32 low1 = pack(sums[2 * i][2] * share1, sums[2 * i][3] * share1);
    const u32 high0 = pack(sums[2 * i + 1][0] * share0, sums[2 * i + 1][1] * share0);
    const u32 high1 = pack(sums[2 * i + 1][2] * share1, sums[2 * i + 1][3] * share1);
    const u32 other0 = __shfl_xor_sync(ALL_LANES, odd ? low0 : high0, 1);
    const u32 other1 = __shfl_xor_sync(ALL_LANES, odd ? low1 : high1, 1);
    const u64 four0 = odd ? other0 | (u64)high0 << 32 : low0 | (u64)other0 << 32;
    const u64 four1 = odd ? other1 | (u64)high1 << 32 : low1 | (u64)other1 << 32;
    *(u64 *)(target0 + 16 * i) = four0;
    *(u64 *)(target1 + 16 * i) = four1;
  }
}

// --- few tokens: a warp per query and head, without tensor cores. A group of lanes takes a key, 8 numbers per lane.

#define GROUP_LANES (HEAD_SIZE == 16 ? 2 : HEAD_SIZE == 32 ? 4 : HEAD_SIZE <= 64 ? 8 : 16)
#define GROUPS (32 / GROUP_LANES)
#define GROUP_KEYS 4  // keys that a group takes at once

#define ROWS_BOUNDS 128, 8  // threads; blocks of a multiprocessor, so 64 registers, enough for all loads of a step

// Weights stay in float32. If `wide` is not 0, q and out have float32 numbers.
KERNEL(ROWS_BOUNDS)
attention_rows(const void *__restrict__ q, const u16 *__restrict__ keys, const u16 *__restrict__ values,
               void *__restrict__ out, const int *__restrict__ scale_of, u32 new_tokens, u32 tokens, u32 sequences,
               u32 wide) {
  const u32 lane = threadIdx.x & 31, group = lane / GROUP_LANES;
  const u32 row = blockIdx.x * 4 + (threadIdx.x >> 5);
  if (row >= sequences * new_tokens * HEADS) return;
  const u32 head = row % HEADS, query = row / HEADS % new_tokens, sequence = row / HEADS / new_tokens;
  const u32 holds = lane % GROUP_LANES < ATTENTION_CHUNKS;  // some lanes have no numbers of their own
  const u32 place = 8 * min(lane % GROUP_LANES, (u32)ATTENTION_CHUNKS - 1);
  const u64 token_stride = (u64)sequences * (HEADS * HEAD_SIZE);
  const u64 offset = (u64)(sequence * HEADS + head) * HEAD_SIZE + place, index = (u64)row * HEAD_SIZE + place;
  const int scale = scale_of ? scale_of[query] : 0;
  float numbers[8], sums[8], top = NO_SCORE, sum = 0.0f;
  load8_of(numbers, q, index, wide);
  UNROLL
  for (int j = 0; j < 8; j++) sums[j] = 0.0f;

  for (u32 first = 0; first < tokens; first += GROUPS * GROUP_KEYS) {
    float scores[GROUP_KEYS], new_top = top;
    UNROLL
    for (int i = 0; i < GROUP_KEYS; i++) {
      const u32 token = first + i * GROUPS + group;
      float key[8], score = 0.0f;
      load8(key, keys + min(token, tokens - 1) * token_stride + offset);
      UNROLL
      for (int j = 0; j < 8; j++) score += numbers[j] * key[j];
      score = lanes_sum(holds ? score : 0.0f, GROUP_LANES);
      const int key_scale = token >= tokens ? LATEST_SCALE : scale_of ? scale_of[token] : 0;
      scores[i] = key_scale > scale ? NO_SCORE : score;
      new_top = fmaxf(new_top, scores[i]);
    }
    const float shift = offset_of(new_top), factor = fast_exp2(top * LOG2_E - shift);
    top = new_top;
    sum *= factor;
    UNROLL
    for (int j = 0; j < 8; j++) sums[j] *= factor;
    UNROLL
    for (int i = 0; i < GROUP_KEYS; i++) {
      const u32 token = min(first + i * GROUPS + group, tokens - 1);
      const float weight = fast_exp2(scores[i] * LOG2_E - shift);
      float value[8];
      load8(value, values + token * token_stride + offset);
      sum += weight;
      UNROLL
      for (int j = 0; j < 8; j++) sums[j] += weight * value[j];
    }
  }

  float all_top = top;
  for (int mask = GROUP_LANES; mask < 32; mask *= 2) all_top = fmaxf(all_top, shuffle_xor(all_top, mask));
  const float factor = fast_exp2(top * LOG2_E - offset_of(all_top));
  sum *= factor;
  UNROLL
  for (int j = 0; j < 8; j++) sums[j] *= factor;
  for (int mask = GROUP_LANES; mask < 32; mask *= 2) {
    sum += shuffle_xor(sum, mask);
    UNROLL
    for (int j = 0; j < 8; j++) sums[j] += shuffle_xor(sums[j], mask);
  }
  const float share = 1.0f / sum;
  UNROLL
  for (int j = 0; j < 8; j++) sums[j] *= share;
  if (holds && group == 0) store8_of(out, index, sums, wide);
}
