// The kernels of the sampling loop. They follow sampling.py, noise.py, tables.py and pixels.py exactly: same integers,
// same tokens, same pixels.
//
// Macros configure them: VOCABULARY (V), CODE_DIM (D), WIDTH (C), and BLOCK, the number of threads in a block of
// sample_rows (a multiple of 32, at most 1024). Floating-point operations that decide a result are intrinsics, which no
// compiler fuses.

#define WARPS (BLOCK / 32)
#define ITEMS ((VOCABULARY + BLOCK - 1) / BLOCK)  // values per thread
#define INDEX_BITS 22
#define WEIGHT_BITS 40
#define BINS 1024       // 32 chunks of 32 bins
#define LIMBS 3         // a histogram adds a weight in three parts of 14 bits, because 32-bit atomics are native;
#define LIMB_BITS 14    // the sum of a part cannot overflow for V < 2**18
#define CANDIDATES 256  // most values of one bin that are ranked against each other
#define SLOTS 2048      // most values kept by top-k that are moved together
#define LOGITS_REFUSED 1ull
#define PIXELS_REFUSED 2ull

// --- status

// The status word is 0, or the complement of kind, scale and row. So the maximum is the first refusal.
DEVICE void refuse(u64 *status, u64 kind, u64 scale, u64 row) { atomicMax(status, ~(kind << 56 | scale << 40 | row)); }

// --- noise

// The 24-bit draw of one position, by Philox4x32-10. streams: seed low, seed high, index low, index high of each image.
DEVICE u32 draw_of(const u32 *streams, u32 image, u32 position, u32 scale) {
  u32 c0 = position, c1 = scale, c2 = streams[4 * image + 2], c3 = streams[4 * image + 3];
  u32 k0 = streams[4 * image], k1 = streams[4 * image + 1];
  UNROLL
  for (int round = 0; round < 10; round++) {
    const u64 product0 = (u64)c0 * 0xD2511F53u, product1 = (u64)c2 * 0xCD9E8D57u;
    c0 = (u32)(product1 >> 32) ^ c1 ^ k0;
    c1 = (u32)product1;
    c2 = (u32)(product0 >> 32) ^ c3 ^ k1;
    c3 = (u32)product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0 >> 8;
}

// The draws of one scale: (images, positions), `count` in all.
KERNEL(256) draws(const u32 *__restrict__ streams, u32 *__restrict__ out, u32 count, u32 positions, u32 scale) {
  const u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
  if (i < count) out[i] = draw_of(streams, (u32)i / positions, (u32)i % positions, scale);
}

// --- numbers

// floor(2**40 * exp(x)) for x <= 0, with the same operations in the same order as sampling.py.
DEVICE u64 weight_of(float difference) {
  const double x = fmax((double)difference, -28.0);
  const double rounded = __dadd_rn(__dmul_rn(x, 1.4426950408889634), 6755399441055744.0);
  const double k = __dadd_rn(rounded, -6755399441055744.0);
  const double high = __dmul_rn(k, -0.6931471803691238), low = __dmul_rn(k, -1.9082149292705877e-10);
  const double r = __dadd_rn(__dadd_rn(x, high), low);
  double p = 1.0 / 6227020800.0;
#define HORNER(factorial) p = __dadd_rn(__dmul_rn(p, r), 1.0 / factorial)
  HORNER(479001600.0);
  HORNER(39916800.0);
  HORNER(3628800.0);
  HORNER(362880.0);
  HORNER(40320.0);
  HORNER(5040.0);
  HORNER(720.0);
  HORNER(120.0);
  HORNER(24.0);
  HORNER(6.0);
  HORNER(2.0);
#undef HORNER
  p = __dadd_rn(__dadd_rn(__dmul_rn(__dmul_rn(p, r), r), r), 1.0);
  const u64 exponent = (u64)__double_as_longlong(rounded) + 1023 + WEIGHT_BITS;
  return (u64)__dmul_rn(p, __longlong_as_double((long long)(exponent << 52)));
}

// An integer that orders as the floats do. NaN is above all.
DEVICE u32 key_of(float value) {
  const u32 bits = (u32)__float_as_int(value);
  if (value != value) return ALL_LANES;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DEVICE float value_of(u32 key) { return __int_as_float((int)(key >> 31 ? key & 0x7fffffffu : ~key)); }

// --- warps: all lanes of a warp must call each of these, and all get the result

DEVICE u32 warp_max(u32 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int step = 16; step; step >>= 1) value = max(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
#else
  return __reduce_max_sync(ALL_LANES, value);
#endif
}

// The sum must be below 2**59.
DEVICE u64 warp_sum(u64 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(ALL_LANES, value, step);
  return value;
#else
  const u32 low = __reduce_add_sync(ALL_LANES, (u32)value & 0x7ffffffu);
  return low + ((u64)__reduce_add_sync(ALL_LANES, (u32)(value >> 27)) << 27);
#endif
}

// The sum over this lane and all lanes below it.
DEVICE u64 warp_scan(u64 value) {
  const u32 lane = threadIdx.x & 31;
  UNROLL
  for (u32 step = 1; step < 32; step *= 2) {
    const u64 below = __shfl_up_sync(ALL_LANES, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// --- top-k and top-p: both need the first value, in ascending order, at which a cumulative sum exceeds a limit

// The shared memory of a block. Arrays are written before a barrier and read after it. No array is written again before
// one more barrier.
typedef struct {
  u64 chunk_sums[32];
  u64 warp_sums[2][32];
  u64 candidates[CANDIDATES];
  u64 boundary[2];
  u32 candidate_count[2];
  u32 warp_tops[32];
  u32 warp_kept[32];
  u32 draw;
  u32 bins[1 + LIMBS][BINS];
  u32 kept_keys[SLOTS];
  int kept_places[SLOTS];
} Scratch;

// Each thread holds `items` values in registers. Item i of a lane is 32 places behind its item i - 1, and the items of
// a warp are consecutive places. So access is coalesced, and places are in the order of the row.
#define PLACE(i) (((int)(threadIdx.x >> 5) * items + (i)) * 32 + (int)(threadIdx.x & 31))
#define EACH_ITEM(i) for (int i = 0; i < ITEMS && i < items; i++)

// Without weights, ranks are keys of logits, and each has mass 1. With weights, ranks are the weights, and each is its
// own mass. Values are ordered by (rank, place) in one integer.
DEVICE u64 ordered(u64 rank, int place) { return rank << INDEX_BITS | (u64)place; }

// ordered(rank, place) < bound. Written so that the compiler keeps no 64-bit integer per item.
DEVICE int before_bound(u64 rank, int place, u64 bound) {
  const u64 bound_rank = bound >> INDEX_BITS;
  return rank < bound_rank || (rank == bound_rank && place < (int)(bound & ((1u << INDEX_BITS) - 1)));
}

DEVICE u64 mass_of(u64 rank, int place, int weighted) { return weighted ? rank : (u64)(place < VOCABULARY); }

// Bins have the order of ranks. Logits: 32 bins per power of 2 of the distance to the top, so that a bin has a similar
// number of values however wide the logits spread. Weights: 16 bins per power of 2.
DEVICE u32 bin_of(u64 rank, float top, int weighted) {
  if (weighted) {
    const int power = 63 - __clzll((long long)rank);
    return (u32)(power * 16) + ((u32)(power < 4 ? rank << (4 - power) : rank >> (power - 4)) & 15);
  }
  const int step = (__float_as_int(__fsub_rn(top, value_of((u32)rank))) >> 18) - ((127 - 16) << 5);
  return BINS - 1 - (u32)min(max(step, 0), BINS - 1);
}

DEVICE u64 bin_mass(const Scratch *s, u32 bin, int weighted) {
  if (!weighted) return s->bins[0][bin];
  return s->bins[1][bin] + ((u64)s->bins[2][bin] << LIMB_BITS) + ((u64)s->bins[3][bin] << 2 * LIMB_BITS);
}

// The sum of `value` over a block. Has one barrier. `turn` must alternate between 0 and 1 from call to call.
DEVICE u64 block_sum(Scratch *s, u64 value, int turn) {
  const u32 lane = threadIdx.x & 31;
  value = warp_sum(value);
  if (lane == 0) s->warp_sums[turn][threadIdx.x >> 5] = value;
  __syncthreads();
  return warp_sum(lane < WARPS ? s->warp_sums[turn][lane] : 0);
}

// The first (rank, place) in ascending order whose cumulative mass exceeds a limit. All threads get it. The limit is
// V - top_k without weights. With weights it is floor(drop * sum), but less than the sum, so that the last exceeds it.
DEVICE u64 boundary_of(Scratch *s, const u64 *ranks, int items, int weighted, float top, int top_k, double drop) {
  const u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;

  UNROLL
  EACH_ITEM(i) {
    const u64 mass = mass_of(ranks[i], PLACE(i), weighted);
    if (mass == 0) continue;
    const u32 bin = bin_of(ranks[i], top, weighted);
    if (!weighted) {
      atomicAdd(&s->bins[0][bin], 1u);
    } else {
      UNROLL
      for (int limb = 0; limb < LIMBS; limb++)
        atomicAdd(&s->bins[1 + limb][bin], (u32)(mass >> limb * LIMB_BITS) & ((1u << LIMB_BITS) - 1));
    }
  }
  __syncthreads();

  for (u32 chunk = warp; chunk < 32; chunk += WARPS) {
    const u64 sum = warp_sum(bin_mass(s, chunk * 32 + lane, weighted));
    if (lane == 0) s->chunk_sums[chunk] = sum;
  }
  __syncthreads();

  // Every warp finds the bin itself, which saves a barrier
  const u64 chunks = warp_scan(s->chunk_sums[lane]);
  u64 limit = (u64)(VOCABULARY - top_k);
  if (weighted) {
    const u64 sum = __shfl_sync(ALL_LANES, chunks, 31);
    limit = (u64)__dmul_rn(drop, __ull2double_rn(sum));
    if (limit >= sum) limit = sum - 1;
  }
  const u32 chunk = (u32)__ffs((int)__ballot_sync(ALL_LANES, chunks > limit)) - 1;
  const u64 here = bin_mass(s, chunk * 32 + lane, weighted);
  const u64 inside = warp_scan(here);
  const u64 before_chunk = __shfl_sync(ALL_LANES, chunks, chunk) - __shfl_sync(ALL_LANES, inside, 31);
  const u32 owner = (u32)__ffs((int)__ballot_sync(ALL_LANES, before_chunk + inside > limit)) - 1;
  const u32 bin = chunk * 32 + owner;
  const u64 before = before_chunk + __shfl_sync(ALL_LANES, inside - here, owner);

  UNROLL
  EACH_ITEM(i) {
    if (mass_of(ranks[i], PLACE(i), weighted) && bin_of(ranks[i], top, weighted) == bin) {
      const u32 slot = atomicAdd(&s->candidate_count[weighted], 1u);
      if (slot < CANDIDATES) s->candidates[slot] = ordered(ranks[i], PLACE(i));
    }
  }
  __syncthreads();

  const u32 count = s->candidate_count[weighted];
  if (count <= CANDIDATES) {
    for (u32 c = thread; c < count; c += BLOCK) {
      const u64 mine = s->candidates[c], mass = weighted ? mine >> INDEX_BITS : 1;
      u64 cumulative = before;
      for (u32 other = 0; other < count; other++) {
        const u64 theirs = s->candidates[other];
        if (theirs <= mine) cumulative += weighted ? theirs >> INDEX_BITS : 1;
      }
      if (cumulative > limit && cumulative - mass <= limit) s->boundary[weighted] = mine;
    }
    __syncthreads();
    return s->boundary[weighted];
  }

  // Too many values in one bin (a nearly flat row): find the largest integer with at most `limit` below, bit by bit
  u64 answer = 0;
  for (int bit = INDEX_BITS + (weighted ? WEIGHT_BITS : 31); bit >= 0; bit--) {
    const u64 trial = answer | 1ull << bit;
    u64 below = 0;
    UNROLL
    EACH_ITEM(i) if (before_bound(ranks[i], PLACE(i), trial)) below += mass_of(ranks[i], PLACE(i), weighted);
    if (block_sum(s, below, bit & 1) <= limit) answer = trial;
  }
  return answer;
}

// --- sampling

// Samples tokens (rows,) from logits (rows, V). One block per row; each image has `positions` rows. A row without a
// finite maximum gets token 0 and sets the status. *top_k_option and *drop_option = 1 - top_p are in device memory, so
// that one captured graph serves all values. 0 switches either off.
KERNEL(BLOCK)
sample_rows(const float *__restrict__ logits, const u32 *__restrict__ streams, int *__restrict__ tokens,
            u64 *__restrict__ status, const int *__restrict__ top_k_option, const double *__restrict__ drop_option,
            u32 positions, u32 scale) {
  SHARED Scratch scratch;
  Scratch *const s = &scratch;
  const u32 row = blockIdx.x, thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const float lowest = __int_as_float((int)0xff800000u);
  const int top_k = *top_k_option;
  const double drop = *drop_option;
  int items = ITEMS;
  u64 ranks[ITEMS];  // keys of logits, then weights

  logits += (u64)row * VOCABULARY;
  UNROLL
  EACH_ITEM(i) {
    const float value = PLACE(i) < VOCABULARY ? logits[PLACE(i)] : lowest;
    ranks[i] = key_of(__fadd_rn(value, 0.0f));  // -0 becomes 0, so that both have one key
  }

  for (u32 i = thread; i < (1 + LIMBS) * BINS; i += BLOCK) s->bins[i / BINS][i % BINS] = 0;
  if (thread == 0) {
    s->candidate_count[0] = s->candidate_count[1] = 0;
    s->draw = draw_of(streams, row / positions, row % positions, scale);
  }
  u32 top_key = 0;
  UNROLL
  EACH_ITEM(i) top_key = max(top_key, (u32)ranks[i]);
  top_key = warp_max(top_key);
  if (lane == 0) s->warp_tops[warp] = top_key;
  __syncthreads();
  top_key = warp_max(lane < WARPS ? s->warp_tops[lane] : 0);
  const float top = value_of(top_key);
  if (top_key <= key_of(lowest) || top_key >= key_of(-lowest)) {
    if (thread == 0) {
      tokens[row] = 0;
      refuse(status, LOGITS_REFUSED, scale, row);
    }
    return;
  }

  int moved = 0;
  if (0 < top_k && top_k < VOCABULARY) {
    u32 threshold = top_key;
    if (top_k > 1) threshold = (u32)(boundary_of(s, ranks, items, 0, top, top_k, 0.0) >> INDEX_BITS);
    u32 kept = 0;
    UNROLL
    EACH_ITEM(i) kept += (u32)__popc(__ballot_sync(ALL_LANES, (u32)ranks[i] >= threshold));
    if (lane == 0) s->warp_kept[warp] = kept;
    __syncthreads();
    const u32 upto = (u32)warp_scan(lane < WARPS ? s->warp_kept[lane] : 0);
    u32 slot = (u32)__shfl_sync(ALL_LANES, upto, warp) - kept;
    kept = (u32)__shfl_sync(ALL_LANES, upto, 31);
    const int needed = (int)(kept + BLOCK - 1) / BLOCK;
    moved = needed < ITEMS && kept <= SLOTS;
    UNROLL
    EACH_ITEM(i) {
      const int keep = (u32)ranks[i] >= threshold;
      if (kept == 1) {
        if (keep) tokens[row] = PLACE(i);
      } else if (moved) {
        const u32 votes = __ballot_sync(ALL_LANES, keep);
        if (keep) {
          const u32 own = slot + (u32)__popc(votes & ((1u << lane) - 1));
          s->kept_keys[own] = (u32)ranks[i];
          s->kept_places[own] = PLACE(i);
        }
        slot += (u32)__popc(votes);
      } else if (!keep) {
        ranks[i] = key_of(lowest);
      }
    }
    if (kept == 1) return;
    if (moved) {
      items = needed;
      __syncthreads();
      UNROLL
      EACH_ITEM(i) ranks[i] = PLACE(i) < (int)kept ? s->kept_keys[PLACE(i)] : key_of(lowest);
    }
  }

  UNROLL
  EACH_ITEM(i) ranks[i] = weight_of(__fsub_rn(value_of((u32)ranks[i]), top));
  if (drop > 0.0) {
    const u64 boundary = boundary_of(s, ranks, items, 1, top, 0, drop);
    UNROLL
    EACH_ITEM(i) if (before_bound(ranks[i], PLACE(i), boundary)) ranks[i] = 0;
  }

  u64 sum = 0;
  UNROLL
  EACH_ITEM(i) sum += ranks[i];
  sum = warp_sum(sum);
  if (lane == 0) s->warp_sums[1][warp] = sum;  // not 0, which boundary_of may have read last
  __syncthreads();
  const u64 upto = warp_scan(lane < WARPS ? s->warp_sums[1][lane] : 0);
  const double uniform = __dmul_rn(__dadd_rn((double)s->draw, 0.5), 1.0 / 16777216.0);
  const u64 target = (u64)__dmul_rn(uniform, __ull2double_rn(__shfl_sync(ALL_LANES, upto, 31)));
  const u64 end = __shfl_sync(ALL_LANES, upto, warp);
  if (end <= target || end - sum > target) return;
  u64 before = end - sum;
  UNROLL
  EACH_ITEM(i) {
    const u64 cumulative = before + warp_scan(ranks[i]);
    const u32 beyond = __ballot_sync(ALL_LANES, cumulative > target);
    if (beyond) {
      if ((int)lane == __ffs((int)beyond) - 1) tokens[row] = moved ? s->kept_places[PLACE(i)] : PLACE(i);
      return;
    }
    before = __shfl_sync(ALL_LANES, cumulative, 31);
  }
}

// --- inputs

// Copies `count` floats with all threads of a block, 16 bytes at a time if the addresses are aligned.
DEVICE void copy_floats(float *__restrict__ target, const float *__restrict__ source, u32 count, u32 threads) {
  if ((((u64)target | (u64)source | (u64)count * sizeof(float)) & 15) == 0) {
    for (u32 i = threadIdx.x; i < count / 4; i += threads) ((float4 *)target)[i] = ((const float4 *)source)[i];
  } else {
    for (u32 i = threadIdx.x; i < count; i += threads) target[i] = source[i];
  }
}

// The input of a scale (h', w') from the tokens (B, h, w) of the scale before it. codes (copies * B, h' * w', D): the
// codebook's rows, resized first along the columns of the image, then along its rows. offset (copies * B, h' * w', C):
// the same for all images. Blocks: (h' * w', B). *_index, *_weight: (outputs, 4), the inputs of each output.
KERNEL(128)
next_inputs(const int *__restrict__ tokens, const float *__restrict__ codebook, const int *__restrict__ y_index,
            const float *__restrict__ y_weight, const int *__restrict__ x_index, const float *__restrict__ x_weight,
            const float *__restrict__ positions, float *__restrict__ codes, float *__restrict__ offset, u32 height,
            u32 width, u32 new_width, u32 copies) {
  const u32 position = blockIdx.x, image = blockIdx.y, images = gridDim.y;
  const u32 y = position / new_width * 4, x = position % new_width * 4;
  tokens += (u64)image * height * width;
  for (u32 copy = 0; copy < copies; copy++) {
    const u64 row = (u64)(copy * images + image) * gridDim.x + position;
    copy_floats(offset + row * WIDTH, positions + (u64)position * WIDTH, WIDTH, 128);
  }
  for (u32 d = threadIdx.x; d < CODE_DIM; d += 128) {
    float code = 0.0f;
    UNROLL
    for (int j = 0; j < 4; j++) {
      float tall = 0.0f;
      UNROLL
      for (int i = 0; i < 4; i++) {
        const int token = tokens[y_index[y + i] * width + x_index[x + j]];
        tall += y_weight[y + i] * codebook[(u64)token * CODE_DIM + d];
      }
      code += x_weight[x + j] * tall;
    }
    for (u32 copy = 0; copy < copies; copy++)
      codes[((u64)(copy * images + image) * gridDim.x + position) * CODE_DIM + d] = code;
  }
}

// target[k][i] = source[k][rows[i]]. A row has `columns` floats, and source[k] has `source_rows` rows.
// Blocks: (ceil(columns / 4096), target rows, tables).
KERNEL(256)
gather_rows(const float *__restrict__ source, const int *__restrict__ rows, float *__restrict__ target, u32 columns,
            u32 source_rows) {
  const u32 start = blockIdx.x * 4096, count = min(columns - start, 4096u);
  const u64 from = (u64)blockIdx.z * source_rows + rows[blockIdx.y], to = (u64)blockIdx.z * gridDim.y + blockIdx.y;
  copy_floats(target + to * columns + start, source + from * columns + start, count, 256);
}

// target[k][rows[i]] = source[k][i] for the first gridDim.y of the `source_rows` rows of source[k].
// Blocks: (ceil(columns / 4096), rows written, tables).
KERNEL(256)
scatter_rows(const float *__restrict__ source, const int *__restrict__ rows, float *__restrict__ target, u32 columns,
             u32 source_rows, u32 target_rows) {
  const u32 start = blockIdx.x * 4096, count = min(columns - start, 4096u);
  const u64 from = (u64)blockIdx.z * source_rows + blockIdx.y, to = (u64)blockIdx.z * target_rows + rows[blockIdx.y];
  copy_floats(target + to * columns + start, source + from * columns + start, count, 256);
}

// --- pixels

// pixels (B, plane, 3) of image (B, 3, plane): x * gain - shift + 0.5, clamped to 0...255 and truncated. NaN and
// infinities become 0 and set the status. Four pixels per thread. Blocks: (ceil(plane / 1024), B).
KERNEL(256)
to_uint8(const float *__restrict__ image, u8 *__restrict__ pixels, u64 *__restrict__ status, u32 plane, float gain,
         float shift) {
  const u32 first = (blockIdx.x * 256 + threadIdx.x) * 4;
  if (first >= plane) return;
  const u32 count = min(plane - first, 4u);
  image += (u64)blockIdx.y * 3 * plane + first;
  pixels += ((u64)blockIdx.y * plane + first) * 3;
  u32 words[3] = {0, 0, 0};
  int finite = 1;
  UNROLL
  for (u32 channel = 0; channel < 3; channel++) {
    UNROLL
    for (u32 i = 0; i < 4; i++) {
      const float value = i < count ? image[(u64)channel * plane + i] : 0.0f;
      if (((u32)__float_as_int(value) & 0x7f800000u) == 0x7f800000u) {
        finite = 0;
        continue;
      }
      const float scaled = __fadd_rn(__fsub_rn(__fmul_rn(value, gain), shift), 0.5f);
      const u32 byte = i * 3 + channel;
      words[byte / 4] |= (u32)fminf(fmaxf(scaled, 0.0f), 255.0f) << byte % 4 * 8;
    }
  }
  if (!finite) refuse(status, PIXELS_REFUSED, 0, blockIdx.y);
  if (count == 4 && ((u64)pixels & 3) == 0) {
    UNROLL
    for (int i = 0; i < 3; i++) ((u32 *)pixels)[i] = words[i];
  } else {
    for (u32 byte = 0; byte < count * 3; byte++) pixels[byte] = (u8)(words[byte / 4] >> byte % 4 * 8);
  }
}
