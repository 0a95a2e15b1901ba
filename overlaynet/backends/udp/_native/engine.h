/* The packet engine: workers between a TUN device and UDP sockets. See engine.py for what it promises. */
#ifndef OVERLAYNET_ENGINE_H
#define OVERLAYNET_ENGINE_H

#include "coalesce.h"
#include "table.h"

struct engine;

/* Offloads, as they are counted and told. */
enum offload { OFFLOAD_TUN_TCP, OFFLOAD_TUN_UDP, OFFLOAD_UDP_SEGMENT, OFFLOAD_UDP_GRO, OFFLOADS };
enum { OFFLOAD_ON, OFFLOAD_OFF, OFFLOAD_FAILING };
struct offload_state {
    /* One of the three above; why (an errno, or 0: not wanted); and how often it failed and was done without. */
    _Atomic int state, reason;
    _Atomic uint64_t failures;
};

enum { SOCKETS = 2, WORKERS = 64 };

/* What one worker serves: a queue of the device (IFF_MULTI_QUEUE), and sockets, at most one for each IP version. */
struct queue {
    int tun;
    int sockets[SOCKETS];
    unsigned socket_count;
};

/* How run ended. The last: the kernel has granted the device's header, but takes no packet with it (see worker_header_refused). */
enum { ENDED_STOPPED, ENDED_DEVICE_GONE, ENDED_FAILED, ENDED_HEADER_REFUSED };

/* An engine with a worker for each of `count` queues, at most WORKERS, on descriptors that stay the caller's; all queues have
 * sockets of the same IP versions. `offload` false: one packet in each system call. `device_header`: whether each packet of
 * the device is behind a struct offload_header; negative: ask the device. NULL with errno set. */
struct engine *engine_new(const struct queue *queues, unsigned count, uint32_t mtu, bool offload, int device_header);

/* Begin to carry packets, in a thread for each worker but the first. Returns the number of threads, with the one that is to call
 * engine_run. Where the kernel gives fewer, `*refusal` is an errno, and engine_run serves all that have none; else it is zero. */
unsigned engine_start(struct engine *engine, int *refusal);

/* Carry packets in this thread, too, until engine_stop; once, after engine_start. On an end of another kind, `*error` is an
 * errno. */
int engine_run(struct engine *engine, int *error);

/* Callable from any thread and from signal handlers; without effect in a child that was forked off. */
void engine_stop(struct engine *engine);

/* Make a table the one in force, and free those that are no longer read. Takes the table. One call at a time. */
void engine_set_table(struct engine *engine, struct table *table);

/* The table in force, for the caller of engine_set_table alone. */
const struct table *engine_table(const struct engine *engine);

/* The IP versions of the sockets. */
void engine_serves(const struct engine *engine, bool *v4, bool *v6);

uint64_t engine_drops(const struct engine *engine, enum drop reason);
uint64_t engine_unreachables(const struct engine *engine);
/* An offload's state with the worker that is worst off, and the failures of all. */
void engine_offload(const struct engine *engine, enum offload offload, int *state, int *reason, uint64_t *failures);

/* Not while engine_run runs; before it, threads that engine_start has made are ended. */
void engine_free(struct engine *engine);

#endif
