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
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "engine.h"

#include <errno.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Of Linux 4.18, 5.0 and 6.2: what this is built with may be older than what it runs on. */
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

enum {
    /* Packets or runs taken from one direction before the other, and control, have their turn. */
    BURST = 64,
    BURST_BYTES = 4 * 65536,
    MESSAGES = 64,
    /* Segments in one send: UDP_MAX_SEGMENTS of all kernels; and bytes: the payload of the largest datagram. */
    SEGMENTS = 64,
    SEGMENTED_BYTES = 65507,
    HEADERS_BYTES = 4 * SEGMENTS * LARGEST_HEADERS,
    /* What is read out of the device in one burst lies here, closely packed. */
    ARENA_BYTES = 512 * 1024,
    DATAGRAMS = 8,
    /* Not a power of two, or all datagrams' headers would compete for one set of the cache. */
    DATAGRAM_BYTES = 65536 + 192,
    /* How many earlier messages of a burst a packet may join. */
    LOOK_BACK = 8,
    UNREACHABLES_PER_SECOND = 1000,
    UNREACHABLES_AT_ONCE = 100,
};
#define SECOND UINT64_C(1000000000)
/* How long an offload that failed is left alone. */
#define RETRY SECOND

struct message {
    struct peer *peer;
    uint32_t ecn;
    uint32_t segment_size, segments, bytes, pieces;
    bool closed;
    struct iovec piece[2 * SEGMENTS];
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(uint16_t)) + CMSG_SPACE(sizeof(int))];
};

struct datagram {
    uint8_t *data;
    struct iovec piece;
    struct sockaddr_storage sender;
    _Alignas(struct cmsghdr) uint8_t control[128];
};

struct engine {
    int tun, wake;
    int sockets[SOCKETS];
    int families[SOCKETS];
    unsigned socket_count;
    uint32_t mtu;
    bool batching, device_header;
    _Atomic bool stopping;

    _Atomic(struct table *) table;
    /* The table that the loop reads, or NULL. */
    _Atomic(struct table *) reading;
    struct table *retired;

    _Atomic uint64_t drops[DROPS];
    _Atomic uint64_t unreachables;
    struct offload_state offloads[OFFLOADS];
    uint64_t tun_retry[2];

    /* All from here on is the loop's alone. */
    uint64_t now;
    uint64_t tokens, filled; /* of errors that may be sent; in billionths of one */
    uint32_t message_count, headers_used;
    struct message *messages;
    struct mmsghdr *outgoing;
    uint8_t *headers;
    uint8_t *arena;
    struct datagram *datagrams;
    struct mmsghdr *incoming;
    struct coalescer *coalescer;
};

/* Counters have one writer, so that no locked instruction is needed. */
static inline void count(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + by, memory_order_relaxed);
}

static void drop(struct engine *engine, enum drop reason, uint64_t packets)
{
    count(&engine->drops[reason], packets);
}

static uint64_t clock_now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
    return (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
}

/* ---- Offloads: what works, what does not, and what is tried again later. */

static void offload_set(struct engine *engine, enum offload offload, int state, int reason)
{
    atomic_store_explicit(&engine->offloads[offload].reason, reason, memory_order_relaxed);
    atomic_store_explicit(&engine->offloads[offload].state, state, memory_order_relaxed);
}

static bool offload_is_off(const struct engine *engine, enum offload offload)
{
    return atomic_load_explicit(&engine->offloads[offload].state, memory_order_relaxed) == OFFLOAD_OFF;
}

static void offload_failed(struct engine *engine, enum offload offload, int reason)
{
    count(&engine->offloads[offload].failures, 1);
    offload_set(engine, offload, OFFLOAD_FAILING, reason);
}

static void offload_worked(struct engine *engine, enum offload offload)
{
    if (atomic_load_explicit(&engine->offloads[offload].state, memory_order_relaxed) == OFFLOAD_FAILING)
        offload_set(engine, offload, OFFLOAD_ON, 0);
}

static bool is_refusal(int error)
{
    return error == EIO || error == EINVAL || error == EMSGSIZE || error == EOPNOTSUPP || error == ENOPROTOOPT;
}

static void probe_device(struct engine *engine, bool wanted, int device_header)
{
    if (device_header < 0) {
        struct ifreq request;
        memset(&request, 0, sizeof request);
        /* What is no TUN device, as in tests, has no header either. */
        device_header = ioctl(engine->tun, TUNGETIFF, &request) == 0 && (request.ifr_flags & IFF_VNET_HDR);
        if (device_header && wanted) {
            unsigned tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN, udp = TUN_F_USO4 | TUN_F_USO6;
            if (ioctl(engine->tun, TUNSETOFFLOAD, tcp | udp) != 0) {
                offload_set(engine, OFFLOAD_TUN_UDP, OFFLOAD_OFF, errno);
                if (ioctl(engine->tun, TUNSETOFFLOAD, tcp) != 0)
                    offload_set(engine, OFFLOAD_TUN_TCP, OFFLOAD_OFF, errno);
            }
        }
    }
    engine->device_header = device_header != 0;
    if (!engine->device_header || !wanted) {
        offload_set(engine, OFFLOAD_TUN_TCP, OFFLOAD_OFF, wanted ? EOPNOTSUPP : 0);
        offload_set(engine, OFFLOAD_TUN_UDP, OFFLOAD_OFF, wanted ? EOPNOTSUPP : 0);
    }
}

static int probe_socket(struct engine *engine, int descriptor, int family, bool wanted)
{
    int yes = 1, no = 0;
    /* The outer header's ECN bits, for the inner one. */
    int failed = family == AF_INET ? setsockopt(descriptor, IPPROTO_IP, IP_RECVTOS, &yes, sizeof yes)
                                   : setsockopt(descriptor, IPPROTO_IPV6, IPV6_RECVTCLASS, &yes, sizeof yes);
    if (failed)
        return -1;
    if (!wanted) {
        offload_set(engine, OFFLOAD_UDP_SEGMENT, OFFLOAD_OFF, 0);
        offload_set(engine, OFFLOAD_UDP_GRO, OFFLOAD_OFF, 0);
        return 0;
    }
    if (setsockopt(descriptor, IPPROTO_UDP, UDP_SEGMENT, &no, sizeof no) != 0)
        offload_set(engine, OFFLOAD_UDP_SEGMENT, OFFLOAD_OFF, errno);
    if (setsockopt(descriptor, IPPROTO_UDP, UDP_GRO, &yes, sizeof yes) != 0)
        offload_set(engine, OFFLOAD_UDP_GRO, OFFLOAD_OFF, errno);
    return 0;
}

/* ---- Out of the device, onto the wire. */

static enum drop send_error(int error)
{
    switch (error) {
    case EMSGSIZE:
        return DROP_TOO_BIG;
    case EAGAIN: case ENOBUFS: case ENOMEM:
        return DROP_SEND_CONGESTED;
    case EPERM: case EACCES:
        return DROP_SEND_REFUSED;
    case ENETUNREACH: case EHOSTUNREACH: case ENETDOWN: case ECONNREFUSED:
        return DROP_SEND_UNREACHABLE;
    default:
        return DROP_SEND_FAILED;
    }
}

static int socket_for(const struct engine *engine, const struct peer *peer)
{
    return engine->families[0] == peer->endpoint.any.sa_family ? engine->sockets[0] : engine->sockets[1];
}

static void sent(struct peer *peer, uint64_t packets, uint64_t bytes)
{
    count(&peer->counters->sent_packets, packets);
    count(&peer->counters->sent_bytes, bytes);
}

/* Fill in the header of a message; with the size of its segments only if it has several. */
static void address_message(struct message *message, struct msghdr *header, bool segmented)
{
    struct peer *peer = message->peer;
    *header = (struct msghdr){
        .msg_name = &peer->endpoint,
        .msg_namelen = peer->endpoint_size,
        .msg_iov = message->piece,
        .msg_iovlen = message->pieces,
    };
    size_t used = 0;
    if (segmented) {
        struct cmsghdr *control = (struct cmsghdr *)message->control;
        uint16_t size = (uint16_t)message->segment_size;
        control->cmsg_level = IPPROTO_UDP;
        control->cmsg_type = UDP_SEGMENT;
        control->cmsg_len = CMSG_LEN(sizeof size);
        memcpy(CMSG_DATA(control), &size, sizeof size);
        used = CMSG_SPACE(sizeof size);
    }
    if (message->ecn != 0) {
        struct cmsghdr *control = (struct cmsghdr *)(message->control + used);
        bool v4 = peer->endpoint.any.sa_family == AF_INET;
        int ecn = (int)message->ecn;
        control->cmsg_level = v4 ? IPPROTO_IP : IPPROTO_IPV6;
        control->cmsg_type = v4 ? IP_TOS : IPV6_TCLASS;
        control->cmsg_len = CMSG_LEN(sizeof ecn);
        memcpy(CMSG_DATA(control), &ecn, sizeof ecn);
        used += CMSG_SPACE(sizeof ecn);
    }
    if (used > 0) {
        header->msg_control = message->control;
        header->msg_controllen = used;
    }
}

/* Send the segments of a message, for which the kernel refused to do the segmentation, one by one. */
static void send_singly(struct engine *engine, struct message *message, int refusal)
{
    int descriptor = socket_for(engine, message->peer);
    struct msghdr header;
    bool any = false;
    address_message(message, &header, false);
    for (uint32_t i = 0, next; i < message->pieces; i = next) {
        uint32_t bytes = 0;
        for (next = i; next < message->pieces && bytes < message->segment_size; next++)
            bytes += (uint32_t)message->piece[next].iov_len;
        header.msg_iov = &message->piece[i];
        header.msg_iovlen = next - i;
        if (sendmsg(descriptor, &header, MSG_DONTWAIT) < 0) {
            drop(engine, send_error(errno), 1);
        } else {
            any = true;
            sent(message->peer, 1, bytes);
        }
    }
    if (any) {
        /* It was the offload, then. It is the way to this peer that lacks it: its device, or its MTU. */
        offload_failed(engine, OFFLOAD_UDP_SEGMENT, refusal);
        atomic_store_explicit(&message->peer->segment_after, engine->now + RETRY, memory_order_relaxed);
    }
}

static void send_messages(struct engine *engine)
{
    uint32_t total = engine->message_count;
    for (uint32_t i = 0; i < total; i++)
        address_message(&engine->messages[i], &engine->outgoing[i].msg_hdr, engine->messages[i].segments > 1);
    for (uint32_t i = 0; i < total;) {
        int descriptor = socket_for(engine, engine->messages[i].peer);
        uint32_t same = 1;
        while (i + same < total && socket_for(engine, engine->messages[i + same].peer) == descriptor)
            same++;
        int done = same == 1 ? (sendmsg(descriptor, &engine->outgoing[i].msg_hdr, MSG_DONTWAIT) < 0 ? -1 : 1)
                             : sendmmsg(descriptor, &engine->outgoing[i], same, MSG_DONTWAIT);
        if (done < 0) {
            struct message *message = &engine->messages[i];
            if (errno == EINTR)
                continue;
            /* The error is the first message's. */
            if (message->segments > 1 && is_refusal(errno))
                send_singly(engine, message, errno);
            else
                drop(engine, send_error(errno), message->segments);
            i++;
            continue;
        }
        for (int n = 0; n < done; n++, i++) {
            struct message *message = &engine->messages[i];
            sent(message->peer, message->segments, message->bytes);
            if (message->segments > 1)
                offload_worked(engine, OFFLOAD_UDP_SEGMENT);
        }
    }
    engine->message_count = 0;
    engine->headers_used = 0;
}

static bool may_join(const struct message *message, uint32_t ecn, uint32_t size)
{
    return !message->closed && message->ecn == ecn && size <= message->segment_size && size > 0 &&
           message->segments < SEGMENTS && message->bytes + size <= SEGMENTED_BYTES;
}

/* Add a packet, in one piece or two, to what is to be sent. */
static void enqueue(struct engine *engine, struct peer *peer, uint32_t ecn, struct iovec first, struct iovec second)
{
    uint32_t size = (uint32_t)(first.iov_len + second.iov_len);
    struct message *message = NULL;
    if (!offload_is_off(engine, OFFLOAD_UDP_SEGMENT) &&
        atomic_load_explicit(&peer->segment_after, memory_order_relaxed) <= engine->now) {
        /* Only the last message to the peer, or packets would overtake each other. */
        for (uint32_t back = 1; back <= LOOK_BACK && back <= engine->message_count; back++) {
            struct message *last = &engine->messages[engine->message_count - back];
            if (last->peer == peer) {
                if (may_join(last, ecn, size))
                    message = last;
                break;
            }
        }
    }
    if (message == NULL) {
        message = &engine->messages[engine->message_count++];
        message->peer = peer;
        message->ecn = ecn;
        message->segment_size = size;
        message->segments = message->bytes = message->pieces = 0;
        message->closed = false;
    }
    message->piece[message->pieces++] = first;
    if (second.iov_len > 0)
        message->piece[message->pieces++] = second;
    message->segments++;
    message->bytes += size;
    if (size < message->segment_size)
        message->closed = true; /* only the last segment may be smaller */
}

/* ---- Into the device. */

static int write_device(struct engine *engine, const struct offload_header *offload, struct iovec *pieces, int count)
{
    /* pieces[0] is free for the header, if there is one. */
    pieces[0] = (struct iovec){(void *)offload, sizeof *offload};
    int skip = engine->device_header ? 0 : 1;
    for (;;) {
        ssize_t written = count - skip == 1 ? write(engine->tun, pieces[1].iov_base, pieces[1].iov_len)
                                            : writev(engine->tun, pieces + skip, count - skip);
        if (written >= 0)
            return 0;
        if (errno != EINTR)
            return errno;
    }
}

static int write_packet(struct engine *engine, uint8_t *data, size_t size)
{
    static const struct offload_header none;
    struct iovec pieces[2] = {[1] = {data, size}};
    return write_device(engine, &none, pieces, 2);
}

static void received(struct peer *peer, uint64_t packets, uint64_t bytes)
{
    count(&peer->counters->received_packets, packets);
    count(&peer->counters->received_bytes, bytes);
}

/* The coalescer's sink. */
static void deliver(void *context, struct run *run)
{
    struct engine *engine = context;
    struct peer *peer = run->owner;
    int failed = 0;

    if (run->count > 1) {
        struct iovec pieces[2 + COALESCED_TCP];
        pieces[1] = (struct iovec){run->headers, run->header_length};
        memcpy(pieces + 2, run->payload, run->count * sizeof *pieces);
        failed = write_device(engine, &run->offload, pieces, (int)run->count + 2);
        enum offload kind = run->offload.type == OFFLOAD_UDP ? OFFLOAD_TUN_UDP : OFFLOAD_TUN_TCP;
        if (failed == 0) {
            offload_worked(engine, kind);
            received(peer, run->count, run->bytes);
            return;
        }
        if (!is_refusal(failed)) {
            drop(engine, DROP_DEVICE_FAILED, run->count);
            return;
        }
        /* Some kernels take the header and fail when it asks for something. The packets themselves are whole still. */
        bool any = false;
        for (uint32_t i = 0; i < run->count; i++) {
            uint8_t *data = (uint8_t *)run->payload[i].iov_base - run->header_length;
            size_t size = run->payload[i].iov_len + run->header_length;
            if (write_packet(engine, data, size) == 0) {
                any = true;
                received(peer, 1, size);
            } else {
                drop(engine, DROP_DEVICE_FAILED, 1);
            }
        }
        if (any) {
            offload_failed(engine, kind, failed);
            engine->tun_retry[kind] = engine->now + RETRY;
        }
        return;
    }
    struct iovec *whole = &run->payload[0];
    failed = write_packet(engine, (uint8_t *)whole->iov_base - run->header_length, whole->iov_len + run->header_length);
    if (failed == 0)
        received(peer, 1, run->bytes);
    else
        drop(engine, DROP_DEVICE_FAILED, 1);
}

/* True if an error may be sent now (token bucket). */
static bool error_allowed(struct engine *engine)
{
    uint64_t passed = engine->now - engine->filled, most = UNREACHABLES_AT_ONCE * SECOND;
    engine->filled = engine->now;
    engine->tokens += passed < SECOND ? passed * UNREACHABLES_PER_SECOND : most;
    if (engine->tokens > most)
        engine->tokens = most;
    if (engine->tokens < SECOND)
        return false;
    engine->tokens -= SECOND;
    return true;
}

/* Tell the sender that there is no way to the destination, if it may be told. */
static void answer(struct engine *engine, const struct table *table, const struct segments *segments)
{
    uint8_t first[LARGEST_HEADERS + LARGEST_ERROR], error[LARGEST_ERROR];
    struct packet packet = segments->packet;
    if (segments->header_length != 0) {
        /* What the sender believes to have sent is the first segment. */
        uint8_t *payload;
        uint32_t size, room = sizeof first - segments->header_length;
        segments_cut(segments, 0, first, &payload, &size);
        memcpy(first + segments->header_length, payload, size < room ? size : room);
        packet.size = segments->header_length + (size < room ? size : room);
        packet.data = first;
    }
    size_t size = packet_unreachable(&packet, packet.version == 4 ? table->own4 : table->own6, error);
    if (size == 0 || !error_allowed(engine))
        return;
    if (write_packet(engine, error, size) == 0)
        count(&engine->unreachables, 1);
    else
        drop(engine, DROP_DEVICE_FAILED, 1);
}

/* ---- The two directions. */

static bool carried(const struct table *table, const struct packet *packet)
{
    return packet->version == 4 ? table->carries4 : table->carries6;
}

static void send_packet(struct engine *engine, const struct table *table, const struct offload_header *offload,
                        uint8_t *data, size_t size)
{
    struct segments segments;
    enum drop refused = segments_read(offload, data, size, &segments);
    const struct packet *packet = &segments.packet;
    if (refused == DROP_NONE && !carried(table, packet))
        refused = DROP_UNSUPPORTED;
    if (refused != DROP_NONE) {
        drop(engine, refused, 1);
        return;
    }
    if (segments.count > 1 ? segments.header_length + segments.payload_size > engine->mtu : size > engine->mtu) {
        drop(engine, DROP_TOO_BIG, segments.count);
        return;
    }
    uint32_t holder = table_find(table, SCOPE_DESTINATIONS, packet->version, packet->destination);
    if (holder == NOBODY) {
        drop(engine, DROP_NO_ROUTE, segments.count);
        answer(engine, table, &segments);
        return;
    }
    struct peer *peer = &table->peers[holder];
    uint32_t ecn = packet_ecn(packet);
    if (segments.header_length == 0) {
        enqueue(engine, peer, ecn, (struct iovec){data, size}, (struct iovec){NULL, 0});
        return;
    }
    for (uint32_t i = 0; i < segments.count; i++) {
        if (engine->message_count == MESSAGES || engine->headers_used + LARGEST_HEADERS > HEADERS_BYTES)
            send_messages(engine);
        uint8_t *header = engine->headers + engine->headers_used, *payload;
        uint32_t length;
        engine->headers_used += LARGEST_HEADERS;
        segments_cut(&segments, i, header, &payload, &length);
        enqueue(engine, peer, ecn, (struct iovec){header, segments.header_length}, (struct iovec){payload, length});
    }
    /* A run is worth a send of its own, and what was read before it has waited long enough. */
    send_messages(engine);
}

/* Take packets out of the device and send them, until there is none or the burst is full. Zero, or an errno. */
static int send_burst(struct engine *engine, const struct table *table)
{
    static const struct offload_header none;
    size_t prefix = engine->device_header ? sizeof(struct offload_header) : 0;
    size_t used = 0, bytes = 0;
    int result = 0;
    for (unsigned packets = 0; packets < BURST && bytes < BURST_BYTES; packets++) {
        if (used + prefix + LARGEST_PACKET > ARENA_BYTES || engine->message_count == MESSAGES || !engine->batching)
            send_messages(engine);
        if (engine->message_count == 0)
            used = 0; /* nothing that was read before is needed any more */
        uint8_t *at = engine->arena + used;
        ssize_t size = read(engine->tun, at, prefix + LARGEST_PACKET);
        if (size < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN)
                result = errno;
            break;
        }
        bytes += (size_t)size;
        if ((size_t)size < prefix) {
            drop(engine, DROP_MALFORMED, 1);
            continue;
        }
        struct offload_header offload = none;
        memcpy(&offload, at, prefix);
        send_packet(engine, table, &offload, at + prefix, (size_t)size - prefix);
        used += ((size_t)size + 63) & ~(size_t)63;
    }
    send_messages(engine);
    return result;
}

static void receive_datagram(struct engine *engine, const struct table *table, const struct msghdr *header, size_t size)
{
    const struct sockaddr_storage *sender = header->msg_name;
    struct address outer;
    unsigned version = sender->ss_family == AF_INET6 ? 6 : 4;
    uint32_t segment = 0;
    unsigned ecn = 0;
    for (struct cmsghdr *control = CMSG_FIRSTHDR(header); control != NULL; control = CMSG_NXTHDR((struct msghdr *)header, control)) {
        if (control->cmsg_level == IPPROTO_UDP && control->cmsg_type == UDP_GRO) {
            int value;
            memcpy(&value, CMSG_DATA(control), sizeof value);
            segment = value > 0 ? (uint32_t)value : 0;
        } else if (control->cmsg_level == IPPROTO_IP && control->cmsg_type == IP_TOS) {
            ecn = *CMSG_DATA(control) & 3u;
        } else if (control->cmsg_level == IPPROTO_IPV6 && control->cmsg_type == IPV6_TCLASS) {
            int value;
            memcpy(&value, CMSG_DATA(control), sizeof value);
            ecn = (unsigned)value & 3;
        }
    }
    if (segment == 0 || segment > size)
        segment = (uint32_t)size;
    uint64_t packets = size == 0 ? 1 : (size + segment - 1) / segment;

    if (version == 6)
        outer = address_read((const uint8_t *)&((const struct sockaddr_in6 *)sender)->sin6_addr, 6);
    else
        outer = address_read((const uint8_t *)&((const struct sockaddr_in *)sender)->sin_addr, 4);
    uint32_t scope = table_find(table, SCOPE_SENDERS, version, outer);
    if (scope == NOBODY) {
        drop(engine, DROP_UNKNOWN_PEER, packets);
        return;
    }
    uint8_t *data = header->msg_iov->iov_base;
    /* Most runs are between one pair of addresses. */
    struct packet last = {.version = 0};
    uint32_t holder = NOBODY;
    for (size_t at = 0; packets > 0; packets--, at += segment) {
        struct packet packet;
        enum drop refused = packet_read(data + at, size - at < segment ? size - at : segment, &packet);
        if (refused == DROP_NONE && !carried(table, &packet))
            refused = DROP_UNSUPPORTED;
        if (refused == DROP_NONE && !(last.version == packet.version && same_address(last.source, packet.source) &&
                                      same_address(last.destination, packet.destination))) {
            last.version = 0;
            holder = table_find(table, scope, packet.version, packet.source);
            if (holder == NOBODY)
                refused = DROP_SPOOFED_SOURCE;
            else if (table_find(table, SCOPE_OWN, packet.version, packet.destination) == NOBODY)
                refused = DROP_FOREIGN_DESTINATION;
            else
                last = packet;
        }
        if (refused == DROP_NONE && ecn != 0 && !packet_decapsulate_ecn(&packet, ecn))
            refused = DROP_CONGESTION;
        if (refused != DROP_NONE)
            drop(engine, refused, 1);
        else
            coalescer_add(engine->coalescer, &packet, &table->peers[holder]);
    }
}

/* Take datagrams off the wire and write what may be delivered to the device. Zero, or an errno. */
static int receive_burst(struct engine *engine, const struct table *table, int descriptor)
{
    unsigned most = engine->batching ? DATAGRAMS : 1;
    for (unsigned taken = 0; taken < BURST;) {
        for (unsigned i = 0; i < most; i++) {
            engine->incoming[i].msg_hdr.msg_namelen = sizeof engine->datagrams[i].sender;
            engine->incoming[i].msg_hdr.msg_controllen = sizeof engine->datagrams[i].control;
        }
        int got = recvmmsg(descriptor, engine->incoming, most, MSG_DONTWAIT, NULL);
        if (got < 0) {
            if (errno == EAGAIN || errno == EINTR)
                return 0;
            if (errno == EBADF || errno == ENOTSOCK)
                return errno;
            /* An ICMP error about what was sent earlier, say; to report it has cleared it. */
            drop(engine, DROP_RECEIVE_FAILED, 1);
            taken++;
            continue;
        }
        bool tcp = !offload_is_off(engine, OFFLOAD_TUN_TCP) && engine->tun_retry[OFFLOAD_TUN_TCP] <= engine->now;
        bool udp = !offload_is_off(engine, OFFLOAD_TUN_UDP) && engine->tun_retry[OFFLOAD_TUN_UDP] <= engine->now;
        coalescer_start(engine->coalescer, tcp, udp, deliver, engine);
        for (int i = 0; i < got; i++)
            receive_datagram(engine, table, &engine->incoming[i].msg_hdr, engine->incoming[i].msg_len);
        coalescer_flush(engine->coalescer);
        taken += (unsigned)got;
        /* Fewer than asked for: there are no more, and to ask again would only cost a call. */
        if ((unsigned)got < most)
            return 0;
        if (engine->batching)
            return 0; /* the other direction's turn */
    }
    return 0;
}

/* ---- The table. It is read without a lock, and freed when nobody can read it any more, by a hazard pointer
 * (M. Michael, "Hazard Pointers", 2004): the loop says in `reading` which table it is about to use, and then looks
 * whether that is still the one in force. All four accesses are sequentially consistent, so they have one order. If the
 * swap below did not see the loop's announcement of the old table, then the announcement came later than the swap, and
 * the loop's second look, later still, sees the new table and lets go of the old one. So what the swap frees is read by
 * nobody. While the loop waits for packets it announces nothing, so an old table does not outlive the next swap. */

static const struct table *table_acquire(struct engine *engine)
{
    for (;;) {
        struct table *table = atomic_load(&engine->table);
        atomic_store(&engine->reading, table);
        if (atomic_load(&engine->table) == table)
            return table;
    }
}

static void table_release(struct engine *engine)
{
    atomic_store(&engine->reading, NULL);
}

void engine_set_table(struct engine *engine, struct table *table)
{
    struct table *old = atomic_exchange(&engine->table, table);
    if (old != NULL) {
        old->next_retired = engine->retired;
        engine->retired = old;
    }
    struct table *reading = atomic_load(&engine->reading);
    for (struct table **link = &engine->retired; *link != NULL;) {
        struct table *retired = *link;
        if (retired == reading) {
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

int engine_run(struct engine *engine, int *error)
{
    struct pollfd polled[2 + SOCKETS] = {{engine->wake, POLLIN, 0}, {engine->tun, POLLIN, 0}};
    for (unsigned i = 0; i < engine->socket_count; i++)
        polled[2 + i] = (struct pollfd){engine->sockets[i], POLLIN, 0};
    *error = 0;
    for (;;) {
        if (poll(polled, 2 + engine->socket_count, -1) < 0 && errno != EINTR) {
            *error = errno;
            return ENDED_FAILED;
        }
        if (atomic_load_explicit(&engine->stopping, memory_order_relaxed))
            return ENDED_STOPPED;
        if (polled[1].revents & ~POLLIN) {
            *error = ENODEV;
            return ENDED_DEVICE_GONE;
        }
        engine->now = clock_now();
        const struct table *table = table_acquire(engine);
        int failed = polled[1].revents ? send_burst(engine, table) : 0;
        if (failed == 0) {
            for (unsigned i = 0; i < engine->socket_count && failed == 0; i++)
                if (polled[2 + i].revents)
                    failed = receive_burst(engine, table, engine->sockets[i]);
            table_release(engine);
            if (failed == 0)
                continue;
            *error = failed;
            return ENDED_FAILED;
        }
        table_release(engine);
        *error = failed;
        return ENDED_DEVICE_GONE;
    }
}

void engine_stop(struct engine *engine)
{
    uint64_t one = 1;
    atomic_store_explicit(&engine->stopping, true, memory_order_relaxed);
    /* It can only fail when the counter is full, and then the loop is awake anyway. */
    ssize_t written = write(engine->wake, &one, sizeof one);
    (void)written;
}

static int allocate(struct engine *engine)
{
    engine->messages = calloc(MESSAGES, sizeof *engine->messages);
    engine->outgoing = calloc(MESSAGES, sizeof *engine->outgoing);
    engine->headers = malloc(HEADERS_BYTES);
    engine->arena = malloc(ARENA_BYTES);
    engine->datagrams = calloc(DATAGRAMS, sizeof *engine->datagrams);
    engine->incoming = calloc(DATAGRAMS, sizeof *engine->incoming);
    engine->coalescer = calloc(1, sizeof *engine->coalescer);
    if (!engine->messages || !engine->outgoing || !engine->headers || !engine->arena || !engine->datagrams ||
        !engine->incoming || !engine->coalescer)
        return -1;
    for (unsigned i = 0; i < DATAGRAMS; i++) {
        struct datagram *datagram = &engine->datagrams[i];
        datagram->data = malloc(DATAGRAM_BYTES);
        if (datagram->data == NULL)
            return -1;
        datagram->piece = (struct iovec){datagram->data, DATAGRAM_BYTES};
        engine->incoming[i].msg_hdr = (struct msghdr){
            .msg_name = &datagram->sender, .msg_iov = &datagram->piece, .msg_iovlen = 1, .msg_control = datagram->control};
    }
    return 0;
}

struct engine *engine_new(int tun, const int *sockets, unsigned socket_count, uint32_t mtu, bool offload, int device_header)
{
    struct engine *engine = calloc(1, sizeof *engine);
    if (engine == NULL)
        return NULL;
    engine->tun = tun;
    engine->mtu = mtu;
    engine->batching = offload;
    engine->socket_count = socket_count;
    engine->filled = clock_now();
    engine->tokens = UNREACHABLES_AT_ONCE * SECOND;
    engine->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    bool failed = engine->wake < 0 || allocate(engine) != 0;
    for (unsigned i = 0; i < socket_count && !failed; i++) {
        struct sockaddr_storage name;
        socklen_t size = sizeof name;
        failed = getsockname(sockets[i], (struct sockaddr *)&name, &size) != 0 ||
                 probe_socket(engine, sockets[i], name.ss_family, offload) != 0;
        engine->sockets[i] = sockets[i];
        engine->families[i] = name.ss_family;
    }
    if (failed) {
        int error = errno;
        engine_free(engine);
        errno = error;
        return NULL;
    }
    probe_device(engine, offload, device_header);
    return engine;
}

void engine_serves(const struct engine *engine, bool *v4, bool *v6)
{
    *v4 = *v6 = false;
    for (unsigned i = 0; i < engine->socket_count; i++)
        *(engine->families[i] == AF_INET6 ? v6 : v4) = true;
}

uint64_t engine_drops(const struct engine *engine, enum drop reason)
{
    return atomic_load_explicit(&engine->drops[reason], memory_order_relaxed);
}

uint64_t engine_unreachables(const struct engine *engine)
{
    return atomic_load_explicit(&engine->unreachables, memory_order_relaxed);
}

const struct offload_state *engine_offload(const struct engine *engine, enum offload offload)
{
    return &engine->offloads[offload];
}

void engine_free(struct engine *engine)
{
    if (engine == NULL)
        return;
    if (engine->wake >= 0)
        close(engine->wake);
    table_free(atomic_load(&engine->table));
    while (engine->retired != NULL) {
        struct table *next = engine->retired->next_retired;
        table_free(engine->retired);
        engine->retired = next;
    }
    for (unsigned i = 0; engine->datagrams != NULL && i < DATAGRAMS; i++)
        free(engine->datagrams[i].data);
    free(engine->messages);
    free(engine->outgoing);
    free(engine->headers);
    free(engine->arena);
    free(engine->datagrams);
    free(engine->incoming);
    free(engine->coalescer);
    free(engine);
}
