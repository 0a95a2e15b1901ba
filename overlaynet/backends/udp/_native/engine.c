/* How the boundary between kernel and process is crossed seldom:
 *
 * - The device hands out runs of TCP and UDP packets of up to 64 KiB (TUN offloads, Documentation/networking/tuntap.rst).
 *   They are cut here and sent with one sendmsg for 64 segments (UDP_SEGMENT, udp(7)); single packets of one burst share
 *   such sends, too, and what cannot share shares at least the system call (sendmmsg).
 * - The socket hands out runs of datagrams (UDP_GRO), several at once (recvmmsg). They are put together by flow and
 *   written to the device as runs.
 *
 * Nothing waits for more to come: as soon as no more is readable, all is sent. Runs of segments, and packets that are no
 * part of a run (acknowledgements above all), do not wait even for the end of the burst.
 *
 * With several workers, the kernel spreads the load: datagrams over the sockets by their addresses and ports
 * (SO_REUSEPORT), so what one socket of a peer sends is one worker's; and packets over the device's queues by flow. A flow
 * leaves by the queue that its answers were last written to (tun_flow_update), or while there has been none for three
 * seconds, by a hash of its addresses and ports. Either way its packets stay with one worker, and so in order. Only when an
 * answer moves a flow, or the lack of any moves it back, may those that wait in the one queue be overtaken by the first in
 * the other: of TCP, no more than the SYN, or what is sent again, is on its way then. Fragments have no ports to be hashed.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "worker.h"

struct engine {
    int wake;
    /* The process that the threads are in. A child that is forked off has a copy of this, but none of them, and shares what
     * wakes them. */
    pid_t process;
    _Atomic bool stopping;
    /* How the first worker to end by itself ended, and its errno. */
    _Atomic int ended;
    int error;

    _Atomic(struct table *) table;
    struct table *retired;

    /* Those that engine_start has made, and that were not yet waited for; threads[0] is engine_run's. */
    unsigned started;
    struct thread {
        struct engine *engine;
        pthread_t id;
    } threads[WORKERS];

    unsigned worker_count;
    struct worker workers[];
};

/* ---- The table. It is read without a lock, and freed when nobody can read it any more, by a hazard pointer
 * (M. Michael, "Hazard Pointers", 2004): a loop says in `reading` which table it is about to use, and then looks
 * whether that is still the one in force. All four accesses are sequentially consistent, so they have one order. If the
 * swap below did not see the loop's announcement of the old table, then the announcement came later than the swap, and
 * the loop's second look, later still, sees the new table and lets go of the old one. So what the swap frees is read by
 * nobody. While a loop waits for packets it announces nothing, so an old table does not outlive the next swap. */

static const struct table *table_acquire(struct engine *engine, struct worker *worker)
{
    for (;;) {
        struct table *table = atomic_load(&engine->table);
        atomic_store(&worker->reading, table);
        if (atomic_load(&engine->table) == table)
            return table;
    }
}

static void table_release(struct worker *worker)
{
    atomic_store(&worker->reading, NULL);
}

static bool is_read(struct engine *engine, const struct table *table)
{
    for (unsigned i = 0; i < engine->worker_count; i++)
        if (atomic_load(&engine->workers[i].reading) == table)
            return true;
    return false;
}

void engine_set_table(struct engine *engine, struct table *table)
{
    struct table *old = atomic_exchange(&engine->table, table);
    if (old != NULL) {
        old->next_retired = engine->retired;
        engine->retired = old;
    }
    for (struct table **link = &engine->retired; *link != NULL;) {
        struct table *retired = *link;
        if (is_read(engine, retired)) {
            link = &retired->next_retired;
        } else {
            *link = retired->next_retired;
            table_free(retired);
        }
    }
}

const struct table *engine_table(const struct engine *engine)
{
    return atomic_load(&engine->table);
}

/* ---- Life. */

static uint64_t clock_now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
    return (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
}

/* Serve what is ready of a worker's device and sockets, which `polled` begins with. */
static int serve(struct engine *engine, struct worker *worker, const struct pollfd *polled, int *error)
{
    if (polled[0].revents & ~POLLIN) {
        *error = ENODEV;
        return ENDED_DEVICE_GONE;
    }
    worker->now = clock_now();
    const struct table *table = table_acquire(engine, worker);
    *error = polled[0].revents ? worker_send(worker, table) : 0;
    int ended = *error != 0 ? ENDED_DEVICE_GONE : ENDED_STOPPED;
    for (unsigned i = 0; i < worker->socket_count && *error == 0; i++)
        if (polled[1 + i].revents && (*error = worker_receive(worker, table, worker->sockets[i])) != 0)
            ended = ENDED_FAILED;
    table_release(worker);
    if (*error == 0 && (*error = worker_header_refused(worker)) != 0)
        ended = ENDED_HEADER_REFUSED;
    return ended;
}

static int work(struct engine *engine, struct worker *const *workers, unsigned count, int *error)
{
    struct pollfd polled[1 + WORKERS * (1 + SOCKETS)] = {{engine->wake, POLLIN, 0}};
    unsigned used = 1;
    for (unsigned n = 0; n < count; n++) {
        struct worker *worker = workers[n];
        polled[used++] = (struct pollfd){worker->tun, POLLIN, 0};
        for (unsigned i = 0; i < worker->socket_count; i++)
            polled[used++] = (struct pollfd){worker->sockets[i], POLLIN, 0};
        worker->filled = clock_now();
    }
    for (;;) {
        if (poll(polled, used, -1) < 0 && errno != EINTR) {
            *error = errno;
            return ENDED_FAILED;
        }
        if (atomic_load_explicit(&engine->stopping, memory_order_relaxed))
            return ENDED_STOPPED;
        const struct pollfd *its = polled + 1;
        for (unsigned n = 0; n < count; its += 1 + workers[n]->socket_count, n++) {
            int ended = serve(engine, workers[n], its, error);
            if (ended != ENDED_STOPPED)
                return ended;
        }
    }
}

/* Let workers work in this thread; when that ends by itself, all end. */
static void work_and_tell(struct engine *engine, struct worker *const *workers, unsigned count)
{
    int error = 0, none = ENDED_STOPPED, ended = work(engine, workers, count, &error);
    if (ended != ENDED_STOPPED) {
        if (atomic_compare_exchange_strong(&engine->ended, &none, ended))
            engine->error = error;
        engine_stop(engine);
    }
}

static void *thread_main(void *argument)
{
    struct thread *thread = argument;
    struct engine *engine = thread->engine;
    struct worker *worker = &engine->workers[thread - engine->threads];
    work_and_tell(engine, &worker, 1);
    return NULL;
}

unsigned engine_start(struct engine *engine, int *refusal)
{
    sigset_t all, before;
    *refusal = 0;
    engine->started = 1;
    /* Signals are for the threads that Python knows. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (engine->started < engine->worker_count && *refusal == 0) {
        struct thread *thread = &engine->threads[engine->started];
        thread->engine = engine;
        *refusal = pthread_create(&thread->id, NULL, thread_main, thread);
        engine->started += *refusal == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return engine->started;
}

static void join(struct engine *engine)
{
    while (engine->started > 1)
        pthread_join(engine->threads[--engine->started].id, NULL);
}

int engine_run(struct engine *engine, int *error)
{
    struct worker *workers[WORKERS] = {&engine->workers[0]};
    unsigned count = 1;
    for (unsigned i = engine->started; i < engine->worker_count; i++)
        workers[count++] = &engine->workers[i];
    work_and_tell(engine, workers, count);
    join(engine);
    *error = engine->error;
    return atomic_load(&engine->ended);
}

void engine_stop(struct engine *engine)
{
    if (getpid() != engine->process)
        return;
    uint64_t one = 1;
    atomic_store_explicit(&engine->stopping, true, memory_order_relaxed);
    /* It can only fail when the counter is full, and then the workers are awake anyway. */
    ssize_t written = write(engine->wake, &one, sizeof one);
    (void)written;
}

struct engine *engine_new(const struct queue *queues, unsigned count, uint32_t mtu, bool offload, int device_header)
{
    struct engine *engine = calloc(1, sizeof *engine + count * sizeof *engine->workers);
    if (engine == NULL)
        return NULL;
    engine->worker_count = count;
    engine->process = getpid();
    engine->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    bool failed = engine->wake < 0;
    for (unsigned i = 0; i < count && !failed; i++)
        failed = worker_start(&engine->workers[i], &queues[i], count, mtu, offload, device_header) != 0;
    bool v4, v6, other4, other6;
    worker_serves(&engine->workers[0], &v4, &v6);
    for (unsigned i = 1; i < count && !failed; i++) {
        worker_serves(&engine->workers[i], &other4, &other6);
        if (v4 != other4 || v6 != other6) {
            failed = true;
            errno = EINVAL;
        }
    }
    if (failed) {
        int error = errno;
        engine_free(engine);
        errno = error;
        return NULL;
    }
    return engine;
}

void engine_serves(const struct engine *engine, bool *v4, bool *v6)
{
    worker_serves(&engine->workers[0], v4, v6);
}

uint64_t engine_drops(const struct engine *engine, enum drop reason)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < engine->worker_count; i++)
        sum += atomic_load_explicit(&engine->workers[i].drops[reason], memory_order_relaxed);
    return sum;
}

uint64_t engine_unreachables(const struct engine *engine)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < engine->worker_count; i++)
        sum += atomic_load_explicit(&engine->workers[i].unreachables, memory_order_relaxed);
    return sum;
}

void engine_offload(const struct engine *engine, enum offload offload, int *state, int *reason, uint64_t *failures)
{
    *state = OFFLOAD_ON;
    *reason = 0;
    *failures = 0;
    for (unsigned i = 0; i < engine->worker_count; i++) {
        const struct offload_state *each = &engine->workers[i].offloads[offload];
        int now = atomic_load_explicit(&each->state, memory_order_relaxed);
        if (now > *state) {
            *state = now;
            *reason = atomic_load_explicit(&each->reason, memory_order_relaxed);
        }
        *failures += atomic_load_explicit(&each->failures, memory_order_relaxed);
    }
}

void engine_free(struct engine *engine)
{
    if (engine == NULL)
        return;
    if (engine->started > 1 && getpid() == engine->process) {
        engine_stop(engine);
        join(engine);
    }
    if (engine->wake >= 0)
        close(engine->wake);
    table_free(atomic_load(&engine->table));
    while (engine->retired != NULL) {
        struct table *next = engine->retired->next_retired;
        table_free(engine->retired);
        engine->retired = next;
    }
    for (unsigned i = 0; i < engine->worker_count; i++)
        worker_free(&engine->workers[i]);
    free(engine);
}
