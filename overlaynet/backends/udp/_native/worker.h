/* A worker: the loop of one thread between one queue of the TUN device and UDP sockets of its own. */
#ifndef OVERLAYNET_WORKER_H
#define OVERLAYNET_WORKER_H

#include <errno.h>
#include <netinet/udp.h>
#include <sys/socket.h>

#include "engine.h"

/* Of Linux 4.18 and 5.0: what this is built with may be older than what it runs on. */
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum {
    /* Packets or runs taken from one direction before the other, and control, have their turn. */
    BURST = 64,
    BURST_BYTES = 4 * 65536,
    MESSAGES = 64,
    /* Segments in one send: UDP_MAX_SEGMENTS of all kernels; and bytes: the payload of the largest datagram. */
    SEGMENTS = 64,
    SEGMENTED_BYTES = 65507,
    /* The headers of segments lie here, closely packed. */
    HEADERS_BYTES = 32 * 1024,
    /* What is read out of the device in one burst lies here, closely packed. */
    ARENA_BYTES = 512 * 1024,
    DATAGRAMS = 8,
    /* Not a power of two, or all datagrams' headers would compete for one set of the cache. */
    DATAGRAM_BYTES = 65536 + 192,
    /* How many earlier messages of a burst a packet may join. */
    LOOK_BACK = 8,
    /* Of all workers together. */
    UNREACHABLES_PER_SECOND = 1000,
    UNREACHABLES_AT_ONCE = 100,
    /* Packets that the device refuses one after the other, before it is given up. */
    HEADER_REFUSALS = 4,
};
#define SECOND UINT64_C(1000000000)
/* How long an offload that failed is left alone. */
#define RETRY SECOND

/* What one sendmsg carries: packets of one size for one peer, of which the last may be smaller. */
struct message {
    struct peer *peer;
    uint32_t ecn;
    uint32_t segment_size, segments, bytes, pieces;
    bool closed;
    struct iovec piece[2 * SEGMENTS];
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(uint16_t)) + CMSG_SPACE(sizeof(int))];
};

/* Room for what one recvmsg brings. */
struct datagram {
    uint8_t *data;
    struct iovec piece;
    struct sockaddr_storage sender;
    _Alignas(struct cmsghdr) uint8_t control[128];
};

struct worker {
    int tun;
    int sockets[SOCKETS];
    int families[SOCKETS];
    unsigned socket_count;
    uint32_t mtu;
    /* How many workers share what the engine may do as a whole. */
    unsigned sharers;
    bool batching, device_header;

    /* The table that the loop reads, or NULL. */
    _Atomic(struct table *) reading;
    /* Written by the loop alone, and read by anyone. */
    _Atomic uint64_t drops[DROPS];
    _Atomic uint64_t unreachables;
    struct offload_state offloads[OFFLOADS];

    /* All from here on is the loop's alone. */
    uint64_t now;
    uint64_t tokens, filled; /* of errors that may be sent; in billionths of one */
    uint64_t tun_retry[2];
    /* How many packets the device has refused with its header, since it last took one; and whether it ever did. */
    unsigned header_refusals;
    bool header_taken;
    int header_refusal;
    uint32_t message_count, headers_used;
    struct message *messages;
    struct mmsghdr *outgoing;
    uint8_t *headers;
    uint8_t *arena;
    struct datagram *datagrams;
    struct mmsghdr *incoming;
    struct coalescer *coalescer;
};

/* Zero, or -1 with errno set; either way worker_free is due. */
int worker_start(struct worker *worker, const struct queue *queue, unsigned sharers, uint32_t mtu, bool offload,
                 int device_header);
void worker_free(struct worker *worker);

/* The IP versions of its sockets. */
void worker_serves(const struct worker *worker, bool *v4, bool *v6);

/* Take packets out of the device and send them, until there is none or the burst is full. Zero, or an errno. */
int worker_send(struct worker *worker, const struct table *table);

/* Take datagrams off the wire and write what may be delivered to the device. Zero, or an errno. */
int worker_receive(struct worker *worker, const struct table *table, int descriptor);

/* Write a packet, or a run in pieces, to the device. pieces[0] is left free, for the header. Zero, or an errno. */
int worker_write(struct worker *worker, const struct offload_header *offload, struct iovec *pieces, int count);
int worker_write_packet(struct worker *worker, uint8_t *data, size_t size);

/* Some kernels grant the device's header and then refuse all that is written with it. An errno if this is one: the device is up,
 * has refused packets that ask for nothing, several in a row, and never took one. Zero otherwise. */
int worker_header_refused(struct worker *worker);

/* Counters of one writer need no locked instruction. */
static inline void count(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + by, memory_order_relaxed);
}

/* A peer's counters have as many writers as there are workers. */
static inline void add(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

static inline void drop(struct worker *worker, enum drop reason, uint64_t packets)
{
    count(&worker->drops[reason], packets);
}

static inline bool carried(const struct table *table, const struct packet *packet)
{
    return packet->version == 4 ? table->carries4 : table->carries6;
}

/* ---- Offloads: what works, what does not, and what is tried again later. */

static inline bool offload_is_off(const struct worker *worker, enum offload offload)
{
    return atomic_load_explicit(&worker->offloads[offload].state, memory_order_relaxed) == OFFLOAD_OFF;
}

static inline void offload_set(struct worker *worker, enum offload offload, int state, int reason)
{
    atomic_store_explicit(&worker->offloads[offload].reason, reason, memory_order_relaxed);
    atomic_store_explicit(&worker->offloads[offload].state, state, memory_order_relaxed);
}

static inline void offload_failed(struct worker *worker, enum offload offload, int reason)
{
    count(&worker->offloads[offload].failures, 1);
    offload_set(worker, offload, OFFLOAD_FAILING, reason);
}

static inline void offload_worked(struct worker *worker, enum offload offload)
{
    if (atomic_load_explicit(&worker->offloads[offload].state, memory_order_relaxed) == OFFLOAD_FAILING)
        offload_set(worker, offload, OFFLOAD_ON, 0);
}

/* True if the kernel says so because of an offload: without it, the same packets may pass. */
static inline bool is_refusal(int error)
{
    return error == EIO || error == EINVAL || error == EMSGSIZE || error == EOPNOTSUPP || error == ENOPROTOOPT;
}

#endif
