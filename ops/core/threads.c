/* Tasks run on PyTorch's threads when the process has them, else on a small pool of our own. Every
 * thread has the caller's floating-point mode meanwhile, so that results do not show which thread
 * did a task. */
#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "library.h"
#include "mode.h"

/* ---- a job ---- */

typedef struct job {
    sk_part tasks;
    const void *params;
    uint64_t mode; /* the caller's */
} job;

static void run_range(int64_t begin, int64_t end, void *context) {
    const job *const j = context;
    const uint64_t own = sk_mode();
    if (own != j->mode) sk_set_mode(j->mode);
    j->tasks(j->params, begin, end);
    if (own != j->mode) sk_set_mode(own);
}

/* The pool: workers sleep until `ticket` changes, take pieces of the job until none is left, and
 * report back. */
enum { POOL_MAX = 256 };
static struct {
    pthread_mutex_t one_job, lock;
    pthread_cond_t wake, done;
    int workers;
    uint64_t ticket;
    job job; /* tasks NULL: none */
    int64_t count, piece;
    _Atomic int64_t next;
    int busy;
} pool = {.one_job = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static _Atomic int limit = 0; /* selfkd_set_num_threads(); 0: not called */
static _Atomic int forked =
    0; /* in a child the workers and PyTorch's pool are gone: run on the calling thread */
static _Atomic(sk_parallel_for) torch_parallel_for;

static void after_fork(void) { atomic_store(&forked, 1); }
__attribute__((constructor)) static void watch_fork(void) {
    pthread_atfork(NULL, NULL, after_fork);
}

void sk_use_parallel_for(sk_parallel_for parallel_for) {
    atomic_store(&torch_parallel_for, parallel_for);
}

int selfkd_set_num_threads(int n) {
    if (n < 1)
        return sk_fail(SELFKD_ERROR_VALUE, "selfkd_set_num_threads: n is %d, expected at least 1",
                       n);
    atomic_store(&limit, n);
    return SELFKD_OK;
}

static int num_threads(void) {
    const int set = atomic_load(&limit);
    if (set) return set;
    const char *const omp = getenv("OMP_NUM_THREADS");
    const int asked = omp ? atoi(omp) : 0;
    if (asked > 0) return asked;
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
}

static void take_pieces(job j, int64_t count, int64_t piece) {
    for (;;) {
        const int64_t begin = atomic_fetch_add(&pool.next, piece);
        if (begin >= count) return;
        run_range(begin, count - begin < piece ? count : begin + piece, &j);
    }
}

static void *work(void *unused) {
    (void)unused;
    uint64_t seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.ticket == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        seen = pool.ticket;
        if (!pool.job.tasks) continue; /* woke after the job had ended */
        pool.busy++;
        const job j = pool.job;
        const int64_t count = pool.count, piece = pool.piece;
        pthread_mutex_unlock(&pool.lock);
        take_pieces(j, count, piece);
        pthread_mutex_lock(&pool.lock);
        if (--pool.busy == 0) pthread_cond_signal(&pool.done);
    }
    return NULL;
}

static void grow_pool(int workers) {
    if (workers > POOL_MAX) workers = POOL_MAX;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    while (pool.workers < workers && pthread_create(&thread, &attributes, work, NULL) == 0)
        pool.workers++;
    pthread_attr_destroy(&attributes);
}

static void run_on_pool(int64_t count, int64_t piece, int threads, job j) {
    pthread_mutex_lock(&pool.lock);
    grow_pool(threads - 1);
    pool.job = j;
    pool.count = count;
    pool.piece = piece;
    atomic_store(&pool.next, 0);
    pool.ticket++;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_pieces(j, count, piece);
    pthread_mutex_lock(&pool.lock);
    pool.job.tasks = NULL;
    while (pool.busy) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

void sk_parallel(int64_t count, int64_t grain, sk_part tasks, const void *params) {
    if (count <= 0) return;
    if (count <= grain) { /* one piece for any number of threads: nobody is asked for it */
        tasks(params, 0, count);
        return;
    }
    const sk_parallel_for torch = atomic_load(&torch_parallel_for);
    const int threads = torch && !atomic_load(&limit) ? POOL_MAX : num_threads();
    int64_t piece = (count + threads - 1) / threads;
    if (piece < grain) piece = grain;
    if (piece >= count || threads == 1 || atomic_load(&forked)) {
        tasks(params, 0, count);
    } else if (torch) {
        job j = {tasks, params, sk_mode()};
        torch(0, count, piece, run_range, &j);
    } else if (pthread_mutex_trylock(&pool.one_job) == 0) {
        run_on_pool(count, piece, threads, (job){tasks, params, sk_mode()});
        pthread_mutex_unlock(&pool.one_job);
    } else {
        tasks(params, 0, count); /* the pool serves another caller */
    }
}
