/* A kernel that grants the device's header and refuses whatever is written with it; linked with refusals.c and --wrap=ioctl.
 * A socket pair stands for the device. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <linux/if_tun.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "refusals.h"
#include "worker.h"

#define CHECK(condition) do { if (!(condition)) { perror(#condition); abort(); } } while (0)

static int device;
static bool up;

int __real_ioctl(int descriptor, unsigned long request, void *argument);
int __wrap_ioctl(int descriptor, unsigned long request, void *argument)
{
    struct ifreq *asked = argument;
    switch (request) {
    case TUNGETIFF:
        asked->ifr_flags = IFF_TUN | IFF_VNET_HDR;
        return 0;
    case SIOCGIFFLAGS:
        asked->ifr_flags = up ? IFF_UP : 0;
        return 0;
    case TUNSETOFFLOAD:
        return 0;
    default:
        return __real_ioctl(descriptor, request, argument);
    }
}

/* What comes of so many writes of a plain packet, which fail with this errno, or do not: whether the device is then taken for
 * one that refuses the header. */
static int after_writes(struct worker *worker, unsigned writes, int refusal)
{
    uint8_t packet[20] = {0x45, [3] = 20};
    refusals[REFUSE_WRITE].error = refusal;
    for (unsigned i = 0; i < writes; i++)
        CHECK(worker_write_packet(worker, packet, sizeof packet) == refusal);
    return worker_header_refused(worker);
}

/* Write what the device is to take for a run of packets. */
static int write_run(struct worker *worker)
{
    static const struct offload_header run = {.type = OFFLOAD_UDP};
    uint8_t packet[20] = {0x45, [3] = 20};
    struct iovec pieces[2] = {[1] = {packet, sizeof packet}};
    refusals[REFUSE_WRITE].error = 0;
    return worker_write(worker, &run, pieces, 2);
}

static void start(struct worker *worker, int wire)
{
    struct queue queue = {.tun = device, .sockets = {wire}, .socket_count = 1};
    memset(worker, 0, sizeof *worker);
    CHECK(worker_start(worker, &queue, 1, 1472, true, -1) == 0 && worker->device_header);
}

/* Datagrams of a peer come in, none can be written: the engine ends, and says why. */
static void run_engine(void)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof here;
    int wire = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0), none, error;
    CHECK(bind(wire, (struct sockaddr *)&here, size) == 0 && getsockname(wire, (struct sockaddr *)&here, &size) == 0);
    struct queue queue = {.tun = device, .sockets = {wire}, .socket_count = 1};
    struct subnet own[2] = {{24, {10, 244, 1, 0}}, {.length = NO_SUBNET}};
    struct peer_entry peer = {.version = 4, .port = 1, .address = {127, 0, 0, 1}, .subnet4 = {24, {10, 244, 2, 0}},
                              .subnet6.length = NO_SUBNET};
    struct peer_counters *counters = calloc(1, sizeof *counters);
    struct engine *engine = engine_new(&queue, 1, 1472, true, -1);
    CHECK(engine != NULL);
    engine_set_table(engine, table_new(own, &peer, 1, &counters, 1, true, false));
    uint8_t packet[20] = {0x45, [3] = 20, [8] = 64, [9] = 99, [12] = 10, 244, 2, 1, 10, 244, 1, 1};
    for (unsigned i = 0; i < HEADER_REFUSALS; i++)
        CHECK(sendto(wire, packet, sizeof packet, 0, (struct sockaddr *)&here, size) == sizeof packet);
    CHECK(engine_start(engine, &none) == 1);
    CHECK(engine_run(engine, &error) == ENDED_HEADER_REFUSED && error == EINVAL);
    CHECK(engine_drops(engine, DROP_DEVICE_FAILED) == HEADER_REFUSALS);
    engine_free(engine);
    close(wire);
}

int main(void)
{
    static struct worker worker;
    int pair[2], wire = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK(wire >= 0 && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair) == 0);
    device = pair[0];
    static const int errors[] = {EINVAL, EIO};
    for (unsigned i = 0; i < 2; i++) {
        start(&worker, wire);
        up = false; /* it refuses for that reason, then */
        CHECK(after_writes(&worker, HEADER_REFUSALS, errors[i]) == 0);
        up = true;
        CHECK(after_writes(&worker, HEADER_REFUSALS - 1, errors[i]) == 0);
        CHECK(after_writes(&worker, 1, errors[i]) == errors[i]);
        worker_free(&worker);

        /* One that has taken a packet has another reason. */
        start(&worker, wire);
        CHECK(after_writes(&worker, 1, 0) == 0);
        CHECK(after_writes(&worker, 2 * HEADER_REFUSALS, errors[i]) == 0);
        worker_free(&worker);

        /* So has one that has taken a run. */
        start(&worker, wire);
        CHECK(write_run(&worker) == 0);
        CHECK(after_writes(&worker, 2 * HEADER_REFUSALS, errors[i]) == 0);
        worker_free(&worker);
    }
    start(&worker, wire);
    CHECK(after_writes(&worker, 2 * HEADER_REFUSALS, ENOMEM) == 0);
    worker_free(&worker);
    refusals[REFUSE_WRITE].error = EINVAL;
    run_engine();
    close(pair[0]);
    close(pair[1]);
    close(wire);
    return 0;
}
