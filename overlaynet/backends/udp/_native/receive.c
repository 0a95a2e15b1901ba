/* Off the wire, into the device: datagrams are checked, and their packets put together by flow. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "worker.h"

#include <errno.h>

static void received(struct peer *peer, uint64_t packets, uint64_t bytes)
{
    add(&peer->counters->received_packets, packets);
    add(&peer->counters->received_bytes, bytes);
}

/* The coalescer's sink. */
static void deliver(void *context, struct run *run)
{
    struct worker *worker = context;
    struct peer *peer = run->owner;
    int failed = 0;

    if (run->count > 1) {
        struct iovec pieces[2 + COALESCED_TCP];
        pieces[1] = (struct iovec){run->headers, run->header_length};
        memcpy(pieces + 2, run->payload, run->count * sizeof *pieces);
        failed = worker_write(worker, &run->offload, pieces, (int)run->count + 2);
        enum offload kind = run->offload.type == OFFLOAD_UDP ? OFFLOAD_TUN_UDP : OFFLOAD_TUN_TCP;
        if (failed == 0) {
            offload_worked(worker, kind);
            received(peer, run->count, run->bytes);
            return;
        }
        if (!is_refusal(failed)) {
            drop(worker, DROP_DEVICE_FAILED, run->count);
            return;
        }
        /* Some kernels take the header and fail when it asks for something. The packets themselves are whole still. */
        bool any = false;
        for (uint32_t i = 0; i < run->count; i++) {
            uint8_t *data = (uint8_t *)run->payload[i].iov_base - run->header_length;
            size_t size = run->payload[i].iov_len + run->header_length;
            if (worker_write_packet(worker, data, size) == 0) {
                any = true;
                received(peer, 1, size);
            } else {
                drop(worker, DROP_DEVICE_FAILED, 1);
            }
        }
        if (any) {
            offload_failed(worker, kind, failed);
            worker->tun_retry[kind] = worker->now + RETRY;
        }
        return;
    }
    struct iovec *whole = &run->payload[0];
    failed = worker_write_packet(worker, (uint8_t *)whole->iov_base - run->header_length, whole->iov_len + run->header_length);
    if (failed == 0)
        received(peer, 1, run->bytes);
    else
        drop(worker, DROP_DEVICE_FAILED, 1);
}

static void receive_datagram(struct worker *worker, const struct table *table, const struct msghdr *header, size_t size)
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
        drop(worker, DROP_UNKNOWN_PEER, packets);
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
            drop(worker, refused, 1);
        else
            coalescer_add(worker->coalescer, &packet, &table->peers[holder]);
    }
}

int worker_receive(struct worker *worker, const struct table *table, int descriptor)
{
    unsigned most = worker->batching ? DATAGRAMS : 1;
    for (unsigned taken = 0; taken < BURST;) {
        for (unsigned i = 0; i < most; i++) {
            worker->incoming[i].msg_hdr.msg_namelen = sizeof worker->datagrams[i].sender;
            worker->incoming[i].msg_hdr.msg_controllen = sizeof worker->datagrams[i].control;
        }
        int got = recvmmsg(descriptor, worker->incoming, most, MSG_DONTWAIT, NULL);
        if (got < 0) {
            if (errno == EAGAIN || errno == EINTR)
                return 0;
            if (errno == EBADF || errno == ENOTSOCK)
                return errno;
            /* An ICMP error about what was sent earlier, say; to report it has cleared it. */
            drop(worker, DROP_RECEIVE_FAILED, 1);
            taken++;
            continue;
        }
        bool tcp = !offload_is_off(worker, OFFLOAD_TUN_TCP) && worker->tun_retry[OFFLOAD_TUN_TCP] <= worker->now;
        bool udp = !offload_is_off(worker, OFFLOAD_TUN_UDP) && worker->tun_retry[OFFLOAD_TUN_UDP] <= worker->now;
        coalescer_start(worker->coalescer, tcp, udp, deliver, worker);
        for (int i = 0; i < got; i++)
            receive_datagram(worker, table, &worker->incoming[i].msg_hdr, worker->incoming[i].msg_len);
        coalescer_flush(worker->coalescer);
        taken += (unsigned)got;
        /* Fewer than asked for: there are no more, and to ask again would only cost a call. */
        if ((unsigned)got < most)
            return 0;
        if (worker->batching)
            return 0; /* the other direction's turn */
    }
    return 0;
}

