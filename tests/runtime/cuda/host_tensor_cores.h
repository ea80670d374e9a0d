/* Stand-ins for the tensor-core instructions and asynchronous copies of attention.cu, with the layouts that the PTX
   manual documents. Errors: a lane that misses an instruction, bank conflicts between the rows of a matrix, and
   addresses that are not aligned or not in shared memory. */

static void shim_fail(const char *what, unsigned first, unsigned second);

extern char __start_shared_memory[] __attribute__((weak)), __stop_shared_memory[] __attribute__((weak));

/* Whether 16 bytes can be loaded from there or stored there at once. */
static int shim_is_shared(uintptr_t address) {
  return address % 16 == 0 && address >= (uintptr_t)__start_shared_memory &&
         address + 16 <= (uintptr_t)__stop_shared_memory;
}

/* --- mma.m16n8k16: the operands of a warp, by the turn of `shim_exchange` */

typedef struct {
  float a[16][16], b[8][16]; /* b is transposed */
} ShimOperands;

static ShimOperands shim_operands[32][2];

static inline void shim_spread(float *two, unsigned packed) {
  two[0] = float_of((unsigned short)packed);
  two[1] = float_of((unsigned short)(packed >> 16));
}

static void shim_multiply(unsigned line, float *c, const unsigned *a, unsigned b0, unsigned b1) {
  ShimOperands *const all = &shim_operands[shim_now->warp][shim_now->turn];
  const unsigned row = shim_now->lane / 4, column = shim_now->lane % 4 * 2;
  shim_spread(&all->a[row][column], a[0]);
  shim_spread(&all->a[row + 8][column], a[1]);
  shim_spread(&all->a[row][column + 8], a[2]);
  shim_spread(&all->a[row + 8][column + 8], a[3]);
  shim_spread(&all->b[row][column], b0);
  shim_spread(&all->b[row][column + 8], b1);
  shim_exchange(0xffffffffu, line * 8 + 6, 0);
  for (int i = 0; i < 4; i++) {
    const float *const left = all->a[row + i / 2 * 8], *const right = all->b[column + i % 2];
    float sum = c[i];
    for (int k = 0; k < 16; k++) sum += left[k] * right[k];
    c[i] = sum;
  }
}

/* --- ldmatrix.x4: lane 8 i + r gives the address of row r of matrix i */

static void shim_load(unsigned line, unsigned *m, const void *row, int transposed) {
  const unsigned lane = shim_now->lane;
  const ShimExchange *const exchange = shim_exchange(0xffffffffu, line * 8 + 7, (unsigned long long)(uintptr_t)row);
  for (unsigned i = 0; i < 4; i++) {
    const unsigned long long *const rows = exchange->values + 8 * i;
    unsigned banks = 0;
    for (unsigned r = 0; r < 8; r++) {
      if (!shim_is_shared((uintptr_t)rows[r])) {
        shim_fail("ldmatrix in line %u: the row of lane %u is not aligned or not in shared memory", line, 8 * i + r);
        memset(m, 0xff, 16);
        return;
      }
      banks |= 1u << rows[r] / 16 % 8;
    }
    if (banks != 255) shim_fail("ldmatrix in line %u: bank conflicts between the rows of matrix %u", line, i);
    if (transposed) {
      const unsigned short *const even = (const unsigned short *)(uintptr_t)rows[lane % 4 * 2];
      const unsigned short *const odd = (const unsigned short *)(uintptr_t)rows[lane % 4 * 2 + 1];
      m[i] = even[lane / 4] | (unsigned)odd[lane / 4] << 16;
    } else {
      m[i] = ((const unsigned *)(uintptr_t)rows[lane / 4])[lane % 4];
    }
  }
}

/* --- cp.async: a copy arrives when its thread waits for it. Until then its target holds NaN. */

enum { SHIM_COPIES = 64 };

typedef struct {
  void *target;
  const void *source;
  unsigned bytes;
} ShimCopy;

static ShimCopy shim_copies[1024][SHIM_COPIES];

static void shim_start_copy(unsigned line, void *target, const void *source, unsigned bytes) {
  if (!shim_is_shared((uintptr_t)target) || (uintptr_t)source % 16 || bytes > 16) {
    shim_fail("cp.async in line %u: an address is not aligned or not in shared memory, or %u bytes", line, bytes);
    return;
  }
  if (shim_now->copies == SHIM_COPIES) {
    shim_fail("cp.async in line %u: more than %u copies wait", line, SHIM_COPIES);
    return;
  }
  memset(target, 0xff, 16);
  shim_copies[shim_now->warp * 32 + shim_now->lane][shim_now->copies++] = (ShimCopy){target, source, bytes};
}

/* Copies after the last group stay in the queue. */
static void shim_wait_for_copies(void) {
  ShimCopy *const queue = shim_copies[shim_now->warp * 32 + shim_now->lane];
  const unsigned ended = shim_now->copies_ended;
  for (unsigned i = 0; i < ended; i++) {
    memset(queue[i].target, 0, 16);
    memcpy(queue[i].target, queue[i].source, queue[i].bytes);
  }
  shim_now->copies -= ended;
  shim_now->copies_ended = 0;
  memmove(queue, queue + ended, shim_now->copies * sizeof *queue);
}

static inline unsigned thread_again(void) { return shim_now->index.x; }

#define multiply_matrices(c, a, b0, b1) shim_multiply(__LINE__, c, a, b0, b1)
#define load_matrices(m, row) shim_load(__LINE__, m, row, 0)
#define load_transposed(m, row) shim_load(__LINE__, m, row, 1)
#define start_copy(target, source, bytes) shim_start_copy(__LINE__, target, source, bytes)
#define end_copies() ((void)(shim_now->copies_ended = shim_now->copies))
#define wait_for_copies() shim_wait_for_copies()
