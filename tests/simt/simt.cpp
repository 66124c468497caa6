/* The fibers behind cuda_runtime.h. Blocks run one after the other, in a shuffled order; within a
 * block a scheduler on the caller's stack resumes a random runnable fiber, which runs until it
 * waits or its kernel returns. Fibers outlive blocks and launches: their loop calls one kernel
 * after another on the same stack. */
#include "cuda_runtime.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void **, const void *, size_t) {}
static void __sanitizer_finish_switch_fiber(void *, const void **, size_t *) {}
#endif

enum { WARP = 32, MAX_THREADS = 1024, MAX_SHARED = 232448 };
enum { STACK = 256 << 10, GUARD = 64 << 10 };
enum fiber_state { RUNNABLE, AT_BARRIER, AT_WARP, EXITED };

struct fiber {
    void *stack_pointer;
    char *stack;
    void *fake_stack; /* AddressSanitizer's */
    uint3 thread;
    fiber_state state;
    simt_site site;
    simt_operation operation;
    unsigned mask;
    uint64_t value; /* in: what the lane brings to a warp operation; out: what it gets */
    int source;
};

simt_place simt_here;

static pthread_mutex_t launching = PTHREAD_MUTEX_INITIALIZER;
static fiber fibers[MAX_THREADS];
static int thread_count, running, at_barrier, first_at_barrier;
static int runnable[MAX_THREADS], runnable_count;
static void (*call_kernel)(const void *);
static const void *kernel;
static cudaError_t last_error;

static void *scheduler_stack_pointer, *scheduler_fake_stack;
static const void *scheduler_stack;
static size_t scheduler_stack_size;

static uint64_t seed, random_state;

/* ---- failure ---- */

static uint64_t seed_from_environment() {
    const char *const text = getenv("SELFKD_SIMT_SEED");
    return text ? strtoull(text, NULL, 10) : 1;
}

[[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "simt: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, " (block %u,%u,%u; SELFKD_SIMT_SEED=%llu)\n", simt_here.block.x,
            simt_here.block.y, simt_here.block.z, (unsigned long long)seed);
    va_end(arguments);
    abort();
}

/* No fiber can run, yet not all have returned: says what one waits for and what the one it waits
 * for does. */
[[noreturn]] static void fail_stuck() {
    static const char *const doing[] = {"runs", "waits at __syncthreads",
                                        "waits at a warp operation", "has returned"};
    for (int i = 0; i < thread_count; i++) {
        const fiber *const f = &fibers[i];
        if (f->state == EXITED) continue;
        for (int k = 0; k < thread_count; k++) {
            const fiber *const other = &fibers[k];
            const bool awaited = f->state == AT_BARRIER
                                     ? other->state != AT_BARRIER
                                     : i / WARP == k / WARP && (f->mask >> k % WARP & 1) &&
                                           (other->state != AT_WARP || other->mask != f->mask);
            if (awaited)
                fail("thread %d %s at %s:%d for thread %d, which %s", i, doing[f->state],
                     f->site.file, f->site.line, k, doing[other->state]);
        }
        fail("thread %d %s at %s:%d with mask %08x, which names lanes beyond the block", i,
             doing[f->state], f->site.file, f->site.line, f->mask);
    }
    abort();
}

/* ---- fibers ---- */

/* Saves the callee-saved registers on the running stack and continues where `to` was saved. */
extern "C" void simt_switch(void **from, void *to);
#ifdef __x86_64__
asm(".text\n.globl simt_switch\n.hidden simt_switch\n.type simt_switch, @function\nsimt_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size simt_switch, .-simt_switch\n");
static void *first_frame(char *stack_end, void (*entry)()) {
    void **const frame =
        (void **)stack_end - 8; /* six registers, the address to return to, a gap for alignment */
    memset(frame, 0, 8 * sizeof *frame);
    memcpy(&frame[6], &entry, sizeof entry);
    return frame;
}
#elif defined __aarch64__
asm(".text\n.globl simt_switch\n.hidden simt_switch\n.type simt_switch, %function\nsimt_switch:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, "
    "#48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, "
    "#144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, "
    "#48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, "
    "#144]\n"
    "add sp, sp, #160\nret\n.size simt_switch, .-simt_switch\n");
static void *first_frame(char *stack_end, void (*entry)()) {
    void **const frame = (void **)stack_end - 20;
    memset(frame, 0, 20 * sizeof *frame);
    memcpy(&frame[11], &entry, sizeof entry);
    return frame;
}
#else
#error "simt_switch is written for x86-64 and AArch64"
#endif

static void resume(int index) {
    fiber *const f = &fibers[index];
    running = index;
    simt_here.thread = f->thread;
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, f->stack, STACK);
    simt_switch(&scheduler_stack_pointer, f->stack_pointer);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, NULL, NULL);
}

static void back_to_scheduler() {
    fiber *const f = &fibers[running];
    __sanitizer_start_switch_fiber(&f->fake_stack, scheduler_stack, scheduler_stack_size);
    simt_switch(&f->stack_pointer, scheduler_stack_pointer);
    __sanitizer_finish_switch_fiber(f->fake_stack, &scheduler_stack, &scheduler_stack_size);
}

static void fiber_main() {
    __sanitizer_finish_switch_fiber(NULL, &scheduler_stack, &scheduler_stack_size);
    for (;;) {
        call_kernel(kernel);
        fibers[running].state = EXITED;
        back_to_scheduler();
    }
}

static void make_fiber(fiber *f) {
    char *const memory =
        (char *)mmap(NULL, GUARD + STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + GUARD, STACK, PROT_READ | PROT_WRITE) != 0)
        fail("no memory for a fiber's stack");
    f->stack = memory + GUARD;
    f->stack_pointer = first_frame(f->stack + STACK, fiber_main);
}

static void make_runnable(int index) {
    fibers[index].state = RUNNABLE;
    runnable[runnable_count++] = index;
}

/* ---- barrier and warp operations ---- */

void simt_barrier(simt_site site) {
    fiber *const f = &fibers[running];
    const fiber *const first = &fibers[first_at_barrier];
    if (at_barrier == 0)
        first_at_barrier = running;
    else if (first->site.line != site.line || strcmp(first->site.file, site.file) != 0)
        fail("diverged: thread %d is at __syncthreads %s:%d, thread %d at %s:%d", running,
             site.file, site.line, first_at_barrier, first->site.file, first->site.line);
    f->state = AT_BARRIER;
    f->site = site;
    if (++at_barrier == thread_count) {
        at_barrier = 0;
        for (int i = 0; i < thread_count; i++) make_runnable(i);
    }
    back_to_scheduler();
}

int simt_lane() { return running % WARP; }

/* All lanes of the mask have arrived: gives each its result. */
static void complete(fiber *warp, const fiber *last) {
    uint64_t values[WARP], ballot = 0;
    for (int lane = 0; lane < WARP; lane++) {
        values[lane] = (last->mask >> lane & 1) ? warp[lane].value : 0;
        if (values[lane]) ballot |= 1u << lane;
    }
    for (int lane = 0; lane < WARP; lane++) {
        if (!(last->mask >> lane & 1)) continue;
        fiber *const f = &warp[lane];
        if (f->operation == SIMT_SHUFFLE &&
            (f->source < 0 || f->source >= WARP || !(f->mask >> f->source & 1)))
            fail("lane %d shuffles from lane %d, which is not in mask %08x, at %s:%d", lane,
                 f->source, f->mask, f->site.file, f->site.line);
        f->value = f->operation == SIMT_SHUFFLE ? values[f->source] : ballot;
        make_runnable((int)(f - fibers));
    }
}

uint64_t simt_warp(simt_operation operation, unsigned mask, uint64_t value, int source,
                   simt_site site) {
    fiber *const f = &fibers[running], *const warp = &fibers[running / WARP * WARP];
    if (!(mask >> simt_lane() & 1))
        fail("lane %d is not in its own mask %08x at %s:%d", simt_lane(), mask, site.file,
             site.line);
    f->state = AT_WARP;
    f->site = site;
    f->operation = operation;
    f->mask = mask;
    f->value = value;
    f->source = source;
    bool all = true;
    for (int lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1)) continue;
        const bool here = &warp[lane] < fibers + thread_count && warp[lane].state == AT_WARP &&
                          warp[lane].mask == mask;
        if (here && warp[lane].operation != operation)
            fail("diverged: lanes %d and %d meet in different operations at %s:%d and %s:%d",
                 simt_lane(), lane, site.file, site.line, warp[lane].site.file,
                 warp[lane].site.line);
        all = all && here;
    }
    if (all) complete(warp, f);
    back_to_scheduler();
    return f->value;
}

/* ---- shared memory: allocated by the first thread that asks, gone with the block ---- */

static struct {
    const void *key;
    void *data;
    size_t bytes;
} arrays[64];
static int array_count;
static size_t dynamic_bytes;

void *simt_shared(const void *key, size_t bytes) {
    for (int i = 0; i < array_count; i++)
        if (arrays[i].key == key) return arrays[i].data;
    size_t total = bytes;
    for (int i = 0; i < array_count; i++) total += arrays[i].bytes;
    if (array_count == 64 || total > MAX_SHARED)
        fail("more than %d bytes of shared memory in a block", MAX_SHARED);
    void *const data = malloc(bytes);
    if (!data) fail("no memory");
    memset(data, 0xff, bytes);
    arrays[array_count++] = {key, data, bytes};
    return data;
}

void *simt_shared_dynamic() { return simt_shared(&dynamic_bytes, dynamic_bytes); }

/* ---- requests that a test has refused ---- */

static std::atomic<long> asked[SIMT_REQUESTS], refused[SIMT_REQUESTS], live_blocks;

void simt_refuse(simt_request kind, long n) {
    asked[kind] = 0;
    refused[kind] = n;
}
long simt_asked(simt_request kind) { return asked[kind]; }
long simt_live_blocks() { return live_blocks; }

static bool is_refused(simt_request kind) { return ++asked[kind] == refused[kind]; }

/* ---- launch ---- */

static uint64_t random_below(uint64_t n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % n;
}

static void run_block() {
    runnable_count = at_barrier = 0;
    for (int i = 0; i < thread_count; i++) make_runnable(i);
    int alive = thread_count;
    while (runnable_count > 0) {
        const uint64_t pick = random_below((uint64_t)runnable_count);
        const int index = runnable[pick];
        runnable[pick] = runnable[--runnable_count];
        resume(index);
        if (fibers[index].state == EXITED) alive--;
    }
    if (alive > 0) fail_stuck();
    while (array_count > 0) free(arrays[--array_count].data);
}

static void place_threads(dim3 block) {
    for (int i = 0; i < thread_count; i++) {
        if (!fibers[i].stack) make_fiber(&fibers[i]);
        const unsigned t = (unsigned)i;
        fibers[i].thread = {t % block.x, t / block.x % block.y, t / block.x / block.y};
    }
}

void simt_run(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void *),
              const void *body) {
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z,
                   threads = (uint64_t)block.x * block.y * block.z;
    if (is_refused(SIMT_LAUNCH)) {
        last_error = cudaErrorLaunchOutOfResources;
        return;
    }
    if (blocks == 0 || threads == 0 || threads > MAX_THREADS || shared_bytes > MAX_SHARED) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    pthread_mutex_lock(&launching);
    seed = seed_from_environment();
    random_state = seed * 0x9e3779b97f4a7c15u | 1;
    thread_count = (int)threads;
    dynamic_bytes = shared_bytes;
    call_kernel = call;
    kernel = body;
    simt_here.grid_size = grid;
    simt_here.block_size = block;
    place_threads(block);
    uint64_t *const order = (uint64_t *)malloc(blocks * sizeof *order);
    if (!order) fail("no memory");
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t k = random_below(i + 1);
        order[i] = order[k];
        order[k] = i;
    }
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t b = order[i];
        simt_here.block = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y),
                           (unsigned)(b / grid.x / grid.y)};
        run_block();
    }
    free(order);
    pthread_mutex_unlock(&launching);
}

/* ---- the runtime functions: one device, an H100 by its numbers ---- */

cudaError_t cudaMallocAsync(void **data, size_t bytes, cudaStream_t) {
    void *const block = is_refused(SIMT_ALLOCATION) ? NULL : malloc(bytes);
    if (!block) return last_error = cudaErrorMemoryAllocation;
    memset(block, 0xff, bytes);
    live_blocks++;
    *data = block;
    return cudaSuccess;
}
cudaError_t cudaFreeAsync(void *data, cudaStream_t) {
    if (data) live_blocks--;
    free(data);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *data, int value, size_t bytes, cudaStream_t) {
    if (is_refused(SIMT_MEMSET)) return last_error = cudaErrorInvalidValue;
    memset(data, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : (last_error = cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
        *value = 132;
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
        *value = 9;
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
        *value = 0;
        return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = MAX_SHARED;
        return cudaSuccess;
    }
    return last_error = cudaErrorInvalidValue;
}
cudaError_t cudaFuncSetAttribute(const void *, enum cudaFuncAttribute, int value) {
    return value <= MAX_SHARED ? cudaSuccess : (last_error = cudaErrorInvalidValue);
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "cudaSuccess";
    case cudaErrorInvalidValue:
        return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
        return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
        return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
        return "cudaErrorInvalidDevice";
    case cudaErrorLaunchOutOfResources:
        return "cudaErrorLaunchOutOfResources";
    }
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
