/* Runs a CUDA kernel on the CPU: g++ compiles the .cu with this in place of the device.
 *
 * A thread of a block is a fibre. Fibres run one after another, each until it waits: at a block's
 * barrier, or in a shuffle for its warp. So a missing barrier shows as a wrong number in one of two
 * orders: first thread first, or last thread first (blocks too). Shared memory is NaN when a block
 * begins. Threads that wait in different places, or leave while others wait, are an error.
 */
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>

#define EMULATOR
#define __global__
#define __device__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ __attribute__((section("block_memory"))) static
extern char __start_block_memory[] __attribute__((weak)), __stop_block_memory[] __attribute__((weak));

namespace emulator {
struct Index {
    unsigned x, y, z;
};
enum Status { READY, IN_SHUFFLE, AT_BARRIER, DONE };
enum { MAX_THREADS = 1024, STACK = 1 << 16, WARP = 32 };
struct Fibre {
    ucontext_t beginning;
    jmp_buf place;
    bool begun;
    Status status;
    unsigned shuffles;
    Index index;
};
static Fibre fibres[MAX_THREADS], *current;
static char stacks[MAX_THREADS][STACK] __attribute__((aligned(64)));
static uint64_t exchanged[2][MAX_THREADS];
static jmp_buf scheduler;
static Index block, grid, threads;
static void (*body)();

static void begin() {
    body();
    current->status = DONE;
    _longjmp(scheduler, 1);
}
static __attribute__((noinline)) void resume(Fibre *f) {
    current = f;
    if (_setjmp(scheduler)) return;
    if (f->begun) _longjmp(f->place, 1);
    f->begun = true;
    setcontext(&f->beginning);
}
static __attribute__((noinline)) void wait(Status status) {
    current->status = status;
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}
/* Two sets of places: who is one shuffle ahead does not overwrite what others still read. */
template <typename T> T shuffle(T value, unsigned from) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    unsigned me = current->index.x, set = current->shuffles++ % 2;
    memcpy(&exchanged[set][me], &value, sizeof value);
    wait(IN_SHUFFLE);
    memcpy(&value, &exchanged[set][me / WARP * WARP + from % WARP], sizeof value);
    return value;
}
static bool all(unsigned from, unsigned to, Status status) {
    for (unsigned i = from; i < to; i++)
        if (fibres[i].status != status) return false;
    return true;
}
static const char *run_block(bool reversed) {
    memset(__start_block_memory, 0xff, __stop_block_memory - __start_block_memory);
    for (unsigned i = 0; i < threads.x; i++) {
        Fibre *f = &fibres[i];
        f->begun = false, f->status = READY, f->shuffles = 0, f->index = {i, 0, 0};
        getcontext(&f->beginning);
        f->beginning.uc_stack.ss_sp = stacks[i], f->beginning.uc_stack.ss_size = STACK;
        makecontext(&f->beginning, begin, 0);
    }
    for (;;) {
        for (unsigned w = 0; w < threads.x; w += WARP) {
            unsigned first = reversed ? threads.x - WARP - w : w;
            for (;;) {
                for (unsigned i = 0; i < WARP; i++)
                    if (Fibre *f = &fibres[first + (reversed ? WARP - 1 - i : i)]; f->status == READY)
                        resume(f);
                if (!all(first, first + WARP, IN_SHUFFLE)) break;
                for (unsigned i = 0; i < WARP; i++) fibres[first + i].status = READY;
            }
        }
        if (all(0, threads.x, DONE)) return nullptr;
        if (!all(0, threads.x, AT_BARRIER)) return "threads of a block wait in different places";
        for (unsigned i = 0; i < threads.x; i++) fibres[i].status = READY;
    }
}
static const char *run_grid(bool reversed) {
    if (threads.x % WARP || threads.x > MAX_THREADS) return "a block is whole warps, 1024 threads";
    uint64_t count = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t j = reversed ? count - 1 - i : i;
        block = {unsigned(j % grid.x), unsigned(j / grid.x % grid.y), unsigned(j / grid.x / grid.y)};
        if (const char *error = run_block(reversed)) return error;
    }
    return nullptr;
}
} // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx emulator::block
#define gridDim emulator::grid
#define blockDim emulator::threads
#define __syncthreads() emulator::wait(emulator::AT_BARRIER)
#define __syncwarp() ((void)emulator::shuffle(0, 0))
template <typename T> T __shfl_sync(unsigned, T value, int lane) {
    return emulator::shuffle(value, lane);
}
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulator::shuffle(value, emulator::current->index.x % emulator::WARP ^ mask);
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __int_as_float(int a) {
    float f;
    memcpy(&f, &a, sizeof f);
    return f;
}
inline int __float_as_int(float a) {
    int i;
    memcpy(&i, &a, sizeof i);
    return i;
}
inline float half_to_float(unsigned short a) {
    _Float16 h;
    memcpy(&h, &a, sizeof h);
    return h;
}
inline unsigned short float_to_half(float a) {
    _Float16 h = (_Float16)a;
    unsigned short bits;
    memcpy(&bits, &h, sizeof h);
    return bits;
}

/* After the .cu: runs one of its kernels, whose one argument is an `Arguments`. */
#define EMULATE                                                                                    \
    static void (*kernel)(Arguments);                                                              \
    static Arguments arguments;                                                                    \
    static void call_kernel() { kernel(arguments); }                                               \
    extern "C" const char *emulate(void (*k)(Arguments), unsigned x, unsigned y, unsigned z,       \
                                   unsigned threads, int reversed, const void *words,              \
                                   uint64_t bytes) {                                               \
        if (bytes != sizeof arguments) return "the argument is not as long as Arguments";          \
        kernel = k, emulator::body = call_kernel;                                                  \
        emulator::grid = {x, y, z}, emulator::threads = {threads, 1, 1};                           \
        memcpy(&arguments, words, bytes);                                                          \
        return emulator::run_grid(reversed);                                                       \
    }
