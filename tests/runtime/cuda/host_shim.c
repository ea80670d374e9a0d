/* Runs a grid block by block, in an order that the caller selects. The threads of a block are fibers. This file is included after the kernels and after the
   table of kernels (`shim_kernels`) that host_kernels.py writes.

   Between two barriers the warps run one after another, each time in a new random order, so that a kernel that depends
   on the order fails. Shared memory is filled with rubbish before every block. Errors: a thread that returns while
   others wait, threads at different barriers, and a warp operation that not all lanes reach. */

enum { SHIM_LIMIT = 1024, SHIM_STACK = 1 << 16 };
enum { SHIM_READY, SHIM_IN_WARP, SHIM_AT_BARRIER, SHIM_LEFT };

static ShimFiber shim_fibers[SHIM_LIMIT];
static ShimExchange shim_exchanges[SHIM_LIMIT / 32][2];
static unsigned shim_ready[SHIM_LIMIT / 32], shim_order[SHIM_LIMIT / 32], shim_position, shim_warps, shim_threads;
static int shim_upwards, shim_made;
static uint64_t shim_random;
static char *shim_stacks, shim_message[200];
static jmp_buf shim_main;
static ucontext_t shim_maker;
static void (*shim_kernel)(void **);
static void **shim_arguments;

extern char __start_shared_memory[] __attribute__((weak)), __stop_shared_memory[] __attribute__((weak));

static uint64_t shim_next_random(void) {
  shim_random ^= shim_random << 13;
  shim_random ^= shim_random >> 7;
  shim_random ^= shim_random << 17;
  return shim_random;
}

static void shim_fail(const char *what, unsigned first, unsigned second) {
  if (!shim_message[0]) snprintf(shim_message, sizeof shim_message, what, first, second);
}

/* The next thread that can run, of this warp or else of the next warp in the order; NULL if there is none. */
static ShimFiber *shim_pick(void) {
  while (shim_position < shim_warps) {
    unsigned warp = shim_order[shim_position], mask = shim_ready[warp];
    if (mask) {
      unsigned lane = (unsigned)(shim_upwards ? __builtin_ctz(mask) : 31 - __builtin_clz(mask));
      shim_ready[warp] &= ~(1u << lane);
      return &shim_fibers[warp * 32 + lane];
    }
    shim_position++;
  }
  return NULL;
}

static __attribute__((noinline)) void shim_go(ShimFiber *next) {
  if (next == NULL) _longjmp(shim_main, 1);
  shim_now = next;
  _longjmp(next->env, 1);
}

static __attribute__((noinline)) void shim_wait(ShimFiber *self) {
  ShimFiber *next = shim_pick();
  if (_setjmp(self->env) == 0) shim_go(next);
}

static __attribute__((noinline)) void shim_barrier(unsigned site) {
  ShimFiber *self = shim_now;
  self->state = SHIM_AT_BARRIER;
  self->barrier = site;
  shim_wait(self);
}

static __attribute__((noinline)) ShimExchange *shim_exchange(unsigned mask, unsigned site, unsigned long long value) {
  ShimFiber *self = shim_now;
  /* Two exchanges in turn, so that a lane that is one operation ahead does not overwrite what others still read */
  ShimExchange *exchange = &shim_exchanges[self->warp][self->turn];
  self->turn ^= 1;
  if (exchange->arrived == 0) {
    exchange->votes = exchange->sum = exchange->top = 0;
    exchange->site = site;
  }
  if (mask != 0xffffffffu || exchange->site != site)
    shim_fail("lanes of a warp at different operations (lines %u and %u)", exchange->site / 8, site / 8);
  exchange->values[self->lane] = value;
  exchange->votes |= (unsigned)(value & 1) << self->lane;
  exchange->sum += (unsigned)value;
  if ((unsigned)value > exchange->top) exchange->top = (unsigned)value;
  self->state = SHIM_IN_WARP;
  if (++exchange->arrived == 32) {
    exchange->arrived = 0;
    for (unsigned lane = 0; lane < 32; lane++) shim_fibers[self->warp * 32 + lane].state = SHIM_READY;
    shim_ready[self->warp] = ~(1u << self->lane);
    return exchange;
  }
  shim_wait(self);
  return exchange;
}

static void shim_live(void) {
  ShimFiber *self = shim_now;
  if (_setjmp(self->env) == 0) setcontext(&shim_maker);
  for (;;) {
    shim_kernel(shim_arguments);
    self->state = SHIM_LEFT;
    shim_wait(self);
  }
}

static void shim_make(unsigned threads) {
  static ucontext_t context;
  if (!shim_stacks) {
    const size_t bytes = (size_t)SHIM_LIMIT * SHIM_STACK;
    shim_stacks = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (shim_stacks == MAP_FAILED) abort();
  }
  for (; (unsigned)shim_made < threads; shim_made++) {
    ShimFiber *fiber = shim_now = &shim_fibers[shim_made];
    fiber->warp = (unsigned)shim_made / 32;
    fiber->lane = (unsigned)shim_made % 32;
    getcontext(&context);
    context.uc_stack.ss_sp = shim_stacks + (size_t)shim_made * SHIM_STACK;
    context.uc_stack.ss_size = SHIM_STACK;
    makecontext(&context, shim_live, 0);
    swapcontext(&shim_maker, &context);
  }
}

/* Makes all waiting threads ready, in a new order of warps and of lanes. */
static void shim_release(void) {
  for (unsigned i = shim_warps; i > 1; i--) {
    unsigned j = (unsigned)(shim_next_random() % i), other = shim_order[i - 1];
    shim_order[i - 1] = shim_order[j];
    shim_order[j] = other;
  }
  shim_upwards = (int)(shim_next_random() >> 32 & 1);
  for (unsigned i = 0; i < shim_threads; i++) {
    shim_fibers[i].state = SHIM_READY;
    shim_ready[i / 32] |= 1u << i % 32;
  }
  shim_position = 0;
}

/* Whether threads wait at a barrier. Sets the error message unless all of them wait at the same one. */
static int shim_waiting(void) {
  unsigned left = 0, at = 0, site = 0;
  for (unsigned i = 0; i < shim_threads; i++) {
    const ShimFiber *fiber = &shim_fibers[i];
    if (fiber->state == SHIM_IN_WARP) shim_fail("thread %u waits for a lane that never comes (%u)", i, fiber->lane);
    if (fiber->state == SHIM_LEFT) left++;
    if (fiber->state != SHIM_AT_BARRIER) continue;
    if (at++ && fiber->barrier != site) shim_fail("threads at the barriers of lines %u and %u", site, fiber->barrier);
    site = fiber->barrier;
  }
  if (left && at) shim_fail("%u threads left while others wait at the barrier of line %u", left, site);
  return at != 0;
}

static void shim_run_block(void) {
  memset(__start_shared_memory, 0xA5, (size_t)(__stop_shared_memory - __start_shared_memory));
  memset(shim_exchanges, 0, sizeof shim_exchanges);
  for (unsigned i = 0; i < shim_threads; i++) shim_fibers[i].copies = shim_fibers[i].copies_ended = 0;
  do {
    shim_release();
    if (_setjmp(shim_main) == 0) shim_go(shim_pick());
    if (!shim_message[0] && !shim_waiting()) return;
  } while (!shim_message[0]);
  shim_made = 0; /* drops threads in the middle of a kernel */
}

static uint64_t shim_divisor(uint64_t a, uint64_t b) { return b ? shim_divisor(b, a % b) : a; }

/* Runs a kernel of `shim_kernels`. Returns NULL or an error message. */
const char *shim_run(const char *name, const unsigned *grid, const unsigned *block, void **arguments, uint64_t order) {
  shim_message[0] = 0;
  shim_kernel = NULL;
  for (unsigned i = 0; i < sizeof shim_kernels / sizeof *shim_kernels; i++)
    if (strcmp(shim_kernels[i].name, name) == 0) shim_kernel = shim_kernels[i].call;
  shim_threads = block[0];
  if (!shim_kernel) return "no such kernel";
  if (shim_threads % 32 || shim_threads > SHIM_LIMIT || block[1] != 1 || block[2] != 1) return "unsupported block";
  shim_warps = shim_threads / 32;
  shim_arguments = arguments;
  shim_random = order * 0x9E3779B97F4A7C15u + 0x1234567;
  for (unsigned i = 0; i < shim_warps; i++) shim_order[i] = i;
  shim_make(shim_threads);
  for (unsigned i = 0; i < shim_threads; i++) shim_fibers[i].index = (ShimIndex){i, 0, 0};
  shim_grid = (ShimIndex){grid[0], grid[1], grid[2]};
  /* Blocks run one after another, from a block that `order` selects, with a step that has no common divisor */
  const uint64_t blocks = (uint64_t)grid[0] * grid[1] * grid[2];
  uint64_t step = order ? (order * 7919u) % blocks + 1 : 1, at = order ? (order * 104729u) % blocks : 0;
  while (shim_divisor(step, blocks) != 1) step++;
  for (uint64_t i = 0; i < blocks; i++, at = (at + step) % blocks) {
    shim_block.x = (unsigned)(at % grid[0]);
    shim_block.y = (unsigned)(at / grid[0] % grid[1]);
    shim_block.z = (unsigned)(at / grid[0] / grid[1]);
    shim_run_block();
    if (shim_message[0]) return shim_message;
  }
  return NULL;
}
