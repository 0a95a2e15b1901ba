#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "worker.h"

#include <errno.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

/* Of Linux 6.2. */
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

static void probe_device(struct worker *worker, bool wanted, int device_header)
{
    if (device_header < 0) {
        struct ifreq request;
        memset(&request, 0, sizeof request);
        /* What is no TUN device, as in tests, has no header either. */
        device_header = ioctl(worker->tun, TUNGETIFF, &request) == 0 && (request.ifr_flags & IFF_VNET_HDR);
        if (device_header && wanted) {
            unsigned tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN, udp = TUN_F_USO4 | TUN_F_USO6;
            if (ioctl(worker->tun, TUNSETOFFLOAD, tcp | udp) != 0) {
                offload_set(worker, OFFLOAD_TUN_UDP, OFFLOAD_OFF, errno);
                if (ioctl(worker->tun, TUNSETOFFLOAD, tcp) != 0)
                    offload_set(worker, OFFLOAD_TUN_TCP, OFFLOAD_OFF, errno);
            }
        }
    }
    worker->device_header = device_header != 0;
    if (!worker->device_header || !wanted) {
        offload_set(worker, OFFLOAD_TUN_TCP, OFFLOAD_OFF, wanted ? EOPNOTSUPP : 0);
        offload_set(worker, OFFLOAD_TUN_UDP, OFFLOAD_OFF, wanted ? EOPNOTSUPP : 0);
    }
}

static int probe_socket(struct worker *worker, int descriptor, int family, bool wanted)
{
    int yes = 1, no = 0;
    /* The outer header's ECN bits, for the inner one. */
    int failed = family == AF_INET ? setsockopt(descriptor, IPPROTO_IP, IP_RECVTOS, &yes, sizeof yes)
                                   : setsockopt(descriptor, IPPROTO_IPV6, IPV6_RECVTCLASS, &yes, sizeof yes);
    if (failed)
        return -1;
    if (!wanted) {
        offload_set(worker, OFFLOAD_UDP_SEGMENT, OFFLOAD_OFF, 0);
        offload_set(worker, OFFLOAD_UDP_GRO, OFFLOAD_OFF, 0);
        return 0;
    }
    if (setsockopt(descriptor, IPPROTO_UDP, UDP_SEGMENT, &no, sizeof no) != 0)
        offload_set(worker, OFFLOAD_UDP_SEGMENT, OFFLOAD_OFF, errno);
    if (setsockopt(descriptor, IPPROTO_UDP, UDP_GRO, &yes, sizeof yes) != 0)
        offload_set(worker, OFFLOAD_UDP_GRO, OFFLOAD_OFF, errno);
    return 0;
}

static int allocate(struct worker *worker)
{
    worker->messages = calloc(MESSAGES, sizeof *worker->messages);
    worker->outgoing = calloc(MESSAGES, sizeof *worker->outgoing);
    worker->headers = malloc(HEADERS_BYTES);
    worker->arena = malloc(ARENA_BYTES);
    worker->datagrams = calloc(DATAGRAMS, sizeof *worker->datagrams);
    worker->incoming = calloc(DATAGRAMS, sizeof *worker->incoming);
    worker->coalescer = calloc(1, sizeof *worker->coalescer);
    if (!worker->messages || !worker->outgoing || !worker->headers || !worker->arena || !worker->datagrams ||
        !worker->incoming || !worker->coalescer)
        return -1;
    for (unsigned i = 0; i < DATAGRAMS; i++) {
        struct datagram *datagram = &worker->datagrams[i];
        datagram->data = malloc(DATAGRAM_BYTES);
        if (datagram->data == NULL)
            return -1;
        datagram->piece = (struct iovec){datagram->data, DATAGRAM_BYTES};
        worker->incoming[i].msg_hdr = (struct msghdr){
            .msg_name = &datagram->sender, .msg_iov = &datagram->piece, .msg_iovlen = 1, .msg_control = datagram->control};
    }
    return 0;
}

int worker_start(struct worker *worker, const struct queue *queue, unsigned sharers, uint32_t mtu, bool offload,
                 int device_header)
{
    worker->tun = queue->tun;
    worker->mtu = mtu;
    worker->batching = offload;
    worker->socket_count = queue->socket_count;
    worker->sharers = sharers;
    worker->tokens = UNREACHABLES_AT_ONCE * SECOND / sharers;
    if (allocate(worker) != 0)
        return -1;
    for (unsigned i = 0; i < queue->socket_count; i++) {
        struct sockaddr_storage name;
        socklen_t size = sizeof name;
        if (getsockname(queue->sockets[i], (struct sockaddr *)&name, &size) != 0 ||
            probe_socket(worker, queue->sockets[i], name.ss_family, offload) != 0)
            return -1;
        worker->sockets[i] = queue->sockets[i];
        worker->families[i] = name.ss_family;
    }
    probe_device(worker, offload, device_header);
    return 0;
}

void worker_free(struct worker *worker)
{
    for (unsigned i = 0; worker->datagrams != NULL && i < DATAGRAMS; i++)
        free(worker->datagrams[i].data);
    free(worker->messages);
    free(worker->outgoing);
    free(worker->headers);
    free(worker->arena);
    free(worker->datagrams);
    free(worker->incoming);
    free(worker->coalescer);
}

void worker_serves(const struct worker *worker, bool *v4, bool *v6)
{
    *v4 = *v6 = false;
    for (unsigned i = 0; i < worker->socket_count; i++)
        *(worker->families[i] == AF_INET6 ? v6 : v4) = true;
}

int worker_write(struct worker *worker, const struct offload_header *offload, struct iovec *pieces, int count)
{
    pieces[0] = (struct iovec){(void *)offload, sizeof *offload};
    int skip = worker->device_header ? 0 : 1;
    for (;;) {
        ssize_t written = count - skip == 1 ? write(worker->tun, pieces[1].iov_base, pieces[1].iov_len)
                                            : writev(worker->tun, pieces + skip, count - skip);
        if (written >= 0) {
            worker->header_taken = true;
            return 0;
        }
        if (errno != EINTR)
            return errno;
    }
}

int worker_write_packet(struct worker *worker, uint8_t *data, size_t size)
{
    static const struct offload_header none;
    struct iovec pieces[2] = {[1] = {data, size}};
    int failed = worker_write(worker, &none, pieces, 2);
    if (failed == EINVAL || failed == EIO) {
        worker->header_refusals++;
        worker->header_refusal = failed;
    }
    return failed;
}

int worker_header_refused(struct worker *worker)
{
    if (!worker->device_header || worker->header_taken || worker->header_refusals < HEADER_REFUSALS)
        return 0;
    /* A device that is down says EIO, too. */
    struct ifreq request;
    memset(&request, 0, sizeof request);
    bool up = worker->socket_count > 0 && ioctl(worker->tun, TUNGETIFF, &request) == 0 &&
              ioctl(worker->sockets[0], SIOCGIFFLAGS, &request) == 0 && (request.ifr_flags & IFF_UP);
    worker->header_refusals = 0;
    return up ? worker->header_refusal : 0;
}
