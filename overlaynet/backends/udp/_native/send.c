/* Out of the device, onto the wire: packets are sorted into messages, and messages sent with as few calls as it takes. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "worker.h"

#include <errno.h>
#include <stddef.h>
#include <unistd.h>

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

static int socket_for(const struct worker *worker, const struct peer *peer)
{
    return worker->families[0] == peer->endpoint.any.sa_family ? worker->sockets[0] : worker->sockets[1];
}

static void sent(struct peer *peer, uint64_t packets, uint64_t bytes)
{
    add(&peer->counters->sent_packets, packets);
    add(&peer->counters->sent_bytes, bytes);
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
static void send_singly(struct worker *worker, struct message *message, int refusal)
{
    int descriptor = socket_for(worker, message->peer);
    struct msghdr header;
    bool any = false;
    address_message(message, &header, false);
    for (uint32_t i = 0, next; i < message->pieces; i = next) {
        uint32_t bytes = 0;
        for (next = i; next < message->pieces && bytes < message->segment_size; next++)
            bytes += (uint32_t)message->piece[next].iov_len;
        header.msg_iov = &message->piece[i];
        header.msg_iovlen = next - i;
        ssize_t done;
        do
            done = sendmsg(descriptor, &header, MSG_DONTWAIT);
        while (done < 0 && errno == EINTR);
        if (done < 0) {
            drop(worker, send_error(errno), 1);
        } else {
            any = true;
            sent(message->peer, 1, bytes);
        }
    }
    if (any) {
        /* It was the offload, then. It is the way to this peer that lacks it: its device, or its MTU. */
        offload_failed(worker, OFFLOAD_UDP_SEGMENT, refusal);
        atomic_store_explicit(&message->peer->segment_after, worker->now + RETRY, memory_order_relaxed);
    }
}

static bool may_join(const struct message *message, uint32_t ecn, uint32_t size)
{
    return !message->closed && message->ecn == ecn && size <= message->segment_size && size > 0 &&
           message->segments < SEGMENTS && message->bytes + size <= SEGMENTED_BYTES;
}

/* Send the first messages. */
static void send_first(struct worker *worker, uint32_t total)
{
    for (uint32_t i = 0; i < total; i++)
        address_message(&worker->messages[i], &worker->outgoing[i].msg_hdr, worker->messages[i].segments > 1);
    for (uint32_t i = 0; i < total;) {
        int descriptor = socket_for(worker, worker->messages[i].peer);
        uint32_t same = 1;
        while (i + same < total && socket_for(worker, worker->messages[i + same].peer) == descriptor)
            same++;
        int done = same == 1 ? (sendmsg(descriptor, &worker->outgoing[i].msg_hdr, MSG_DONTWAIT) < 0 ? -1 : 1)
                             : sendmmsg(descriptor, &worker->outgoing[i], same, MSG_DONTWAIT);
        if (done < 0) {
            struct message *message = &worker->messages[i];
            if (errno == EINTR)
                continue;
            /* The error is the first message's. */
            if (message->segments > 1 && is_refusal(errno))
                send_singly(worker, message, errno);
            else
                drop(worker, send_error(errno), message->segments);
            i++;
            continue;
        }
        for (int n = 0; n < done; n++, i++) {
            struct message *message = &worker->messages[i];
            sent(message->peer, message->segments, message->bytes);
            if (message->segments > 1)
                offload_worked(worker, OFFLOAD_UDP_SEGMENT);
        }
    }
}

static void send_messages(struct worker *worker)
{
    send_first(worker, worker->message_count);
    worker->message_count = 0;
    worker->headers_used = 0;
}

/* Send all but the last message if more may join that: a run of 64 KiB fills one message and begins a second, which the
 * next run, if it is there already, goes on with. */
static void send_full_messages(struct worker *worker)
{
    uint32_t last = worker->message_count - 1;
    struct message *tail = &worker->messages[last];
    if (!may_join(tail, tail->ecn, tail->segment_size)) {
        send_messages(worker);
        return;
    }
    send_first(worker, last);
    if (last > 0) {
        struct message *kept = &worker->messages[0];
        memcpy(kept, tail, offsetof(struct message, piece));
        memcpy(kept->piece, tail->piece, tail->pieces * sizeof *tail->piece);
    }
    worker->message_count = 1;
}

/* Add a packet, in one piece or two, to what is to be sent. */
static void enqueue(struct worker *worker, struct peer *peer, uint32_t ecn, struct iovec first, struct iovec second)
{
    uint32_t size = (uint32_t)(first.iov_len + second.iov_len);
    struct message *message = NULL;
    if (!offload_is_off(worker, OFFLOAD_UDP_SEGMENT) &&
        atomic_load_explicit(&peer->segment_after, memory_order_relaxed) <= worker->now) {
        /* Only the last message to the peer, or packets would overtake each other. */
        for (uint32_t back = 1; back <= LOOK_BACK && back <= worker->message_count; back++) {
            struct message *last = &worker->messages[worker->message_count - back];
            if (last->peer == peer) {
                if (may_join(last, ecn, size))
                    message = last;
                break;
            }
        }
    }
    if (message == NULL) {
        message = &worker->messages[worker->message_count++];
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

/* True if an error may be sent now (token bucket). */
static bool error_allowed(struct worker *worker)
{
    uint64_t passed = worker->now - worker->filled, most = UNREACHABLES_AT_ONCE * SECOND / worker->sharers;
    worker->filled = worker->now;
    worker->tokens += passed < SECOND ? passed * UNREACHABLES_PER_SECOND / worker->sharers : most;
    if (worker->tokens > most)
        worker->tokens = most;
    if (worker->tokens < SECOND)
        return false;
    worker->tokens -= SECOND;
    return true;
}

/* Tell the sender that there is no way to the destination, if it may be told. */
static void answer(struct worker *worker, const struct table *table, const struct segments *segments)
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
    if (size == 0 || !error_allowed(worker))
        return;
    if (worker_write_packet(worker, error, size) == 0)
        count(&worker->unreachables, 1);
    else
        drop(worker, DROP_DEVICE_FAILED, 1);
}

static void send_packet(struct worker *worker, const struct table *table, const struct offload_header *offload,
                        uint8_t *data, size_t size)
{
    struct segments segments;
    enum drop refused = segments_read(offload, data, size, &segments);
    const struct packet *packet = &segments.packet;
    if (refused == DROP_NONE && !carried(table, packet))
        refused = DROP_UNSUPPORTED;
    if (refused != DROP_NONE) {
        drop(worker, refused, segments.count);
        return;
    }
    if (segments.count > 1 ? segments.header_length + segments.payload_size > worker->mtu : size > worker->mtu) {
        drop(worker, DROP_TOO_BIG, segments.count);
        return;
    }
    uint32_t holder = table_find(table, SCOPE_DESTINATIONS, packet->version, packet->destination);
    if (holder == NOBODY) {
        drop(worker, DROP_NO_ROUTE, segments.count);
        answer(worker, table, &segments);
        return;
    }
    struct peer *peer = &table->peers[holder];
    uint32_t ecn = packet_ecn(packet);
    if (segments.header_length == 0) {
        enqueue(worker, peer, ecn, (struct iovec){data, size}, (struct iovec){NULL, 0});
        return;
    }
    for (uint32_t i = 0; i < segments.count; i++) {
        if (worker->message_count == MESSAGES || worker->headers_used + segments.header_length > HEADERS_BYTES)
            send_messages(worker);
        uint8_t *header = worker->headers + worker->headers_used, *payload;
        uint32_t length;
        worker->headers_used += (segments.header_length + 15) & ~15u;
        segments_cut(&segments, i, header, &payload, &length);
        enqueue(worker, peer, ecn, (struct iovec){header, segments.header_length}, (struct iovec){payload, length});
    }
    /* A run is worth a send of its own, and what was read before it has waited long enough. */
    send_full_messages(worker);
}

int worker_send(struct worker *worker, const struct table *table)
{
    static const struct offload_header none;
    size_t prefix = worker->device_header ? sizeof(struct offload_header) : 0;
    size_t used = 0, bytes = 0;
    int result = 0;
    for (unsigned packets = 0; packets < BURST && bytes < BURST_BYTES; packets++) {
        if (used + prefix + LARGEST_PACKET > ARENA_BYTES || worker->message_count == MESSAGES || !worker->batching)
            send_messages(worker);
        if (worker->message_count == 0)
            used = 0; /* nothing that was read before is needed any more */
        uint8_t *at = worker->arena + used;
        ssize_t size = read(worker->tun, at, prefix + LARGEST_PACKET);
        if (size < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EINVAL && prefix > 0) {
                /* The header has no word for what this packet is; the device has thrown it away (tun_put_user). */
                drop(worker, DROP_UNSUPPORTED, 1);
                continue;
            }
            if (errno != EAGAIN)
                result = errno;
            break;
        }
        bytes += (size_t)size;
        if ((size_t)size < prefix) {
            drop(worker, DROP_MALFORMED, 1);
            continue;
        }
        struct offload_header offload = none;
        memcpy(&offload, at, prefix);
        send_packet(worker, table, &offload, at + prefix, (size_t)size - prefix);
        used += ((size_t)size + 63) & ~(size_t)63;
    }
    send_messages(worker);
    return result;
}

