/* Swaps the engine's table as fast as possible under traffic in both directions, for ThreadSanitizer and AddressSanitizer:
 * `swap_tables SWAPS`. Socket pairs stand for the queues of the device; the underlay is the loopback. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine.h"

#define CHECK(condition) do { if (!(condition)) { perror(#condition); abort(); } } while (0)

static struct engine *engine;
enum { QUEUES = 2 };
static int kernel[QUEUES], device[QUEUES], wire[QUEUES], far_end;
static _Atomic bool over;

static void *carry(void *unused)
{
    int refusal, error;
    CHECK(engine_start(engine, &refusal) == QUEUES);
    CHECK(engine_run(engine, &error) == ENDED_STOPPED);
    return unused;
}

static size_t packet(uint8_t *data, uint8_t from, uint8_t to)
{
    size_t size = 64;
    memset(data, 0, size);
    data[0] = 0x45;
    data[3] = (uint8_t)size;
    data[8] = 64;
    data[9] = PROTOCOL_UDP;
    memcpy(data + 12, (uint8_t[]){10, 244, from, 1, 10, 244, to, 1}, 8);
    return size;
}

static void *flood(void *unused)
{
    uint8_t out[64], in[64], sink[65536];
    packet(out, 1, 2);
    packet(in, 2, 1);
    struct sockaddr_in to;
    socklen_t size = sizeof to;
    CHECK(getsockname(wire[0], (struct sockaddr *)&to, &size) == 0);
    while (!atomic_load(&over)) {
        sendto(far_end, in, sizeof in, MSG_DONTWAIT, (struct sockaddr *)&to, size);
        for (int i = 0; i < QUEUES; i++) {
            (void)!send(kernel[i], out, sizeof out, MSG_DONTWAIT);
            while (recv(kernel[i], sink, sizeof sink, MSG_DONTWAIT) > 0)
                ;
        }
        while (recv(far_end, sink, sizeof sink, MSG_DONTWAIT) > 0)
            ;
    }
    return unused;
}

static int bound(const char *address, in_port_t port)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = port};
    int yes = 1, made = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    inet_pton(AF_INET, address, &name.sin_addr);
    CHECK(made >= 0 && setsockopt(made, SOL_SOCKET, SO_REUSEPORT, &yes, sizeof yes) == 0);
    CHECK(bind(made, (struct sockaddr *)&name, sizeof name) == 0);
    return made;
}

/* A few peers, so that tables change as fast as they can; or, now and then, as many as the largest networks have. */
enum { FEW = 20, MANY = 10000, MANY_EACH = 128 };

/* Our own subnets, the far end's, and others that differ from table to table; the far end's counts go on. */
static struct table *make(unsigned number)
{
    struct subnet own[2] = {{24, {10, 244, 1, 0}}, {64, {0xFD, 0, 0, 1}}};
    static struct peer_entry entries[MANY];
    static struct peer_counters *counters[MANY];
    unsigned count = number % MANY_EACH == 0 ? MANY : FEW;
    const struct table *before = engine_table(engine);
    struct sockaddr_in name;
    socklen_t size = sizeof name;
    CHECK(getsockname(far_end, (struct sockaddr *)&name, &size) == 0);
    memset(entries, 0, sizeof entries);
    for (unsigned i = 0; i < count; i++) {
        /* IPv4, IPv6 and both, of several lengths. */
        unsigned at = i == 0 ? 0 : i + number % 200;
        entries[i] = (struct peer_entry){.version = 4, .port = ntohs(name.sin_port), .counters = i,
                                         .address = {127, 0, (uint8_t)(i >> 8), (uint8_t)(2 + i)},
                                         .subnet4.length = i % 3 == 1 ? NO_SUBNET : i % 2 ? 26 : 24,
                                         .subnet6.length = i % 3 == 2 ? NO_SUBNET : i % 2 ? 72 : 64};
        memcpy(entries[i].subnet4.address, (uint8_t[]){10, (uint8_t)(244 + (at >> 8)), (uint8_t)(2 + at), 0}, 4);
        memcpy(entries[i].subnet6.address, (uint8_t[]){0xFD, 0, (uint8_t)(at >> 8), (uint8_t)(2 + at)}, 4);
        counters[i] = i == 0 && before != NULL ? before->counters[0] : calloc(1, sizeof *counters[i]);
    }
    struct table *table = table_new(own, entries, count, counters, count, true, false);
    CHECK(table != NULL);
    return table;
}

int main(int argc, char **argv)
{
    unsigned swaps = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 10) : 1000;
    pthread_t threads[2];
    struct queue queues[QUEUES];
    in_port_t port = 0;
    for (int i = 0; i < QUEUES; i++) {
        int pair[2];
        struct sockaddr_in name;
        socklen_t size = sizeof name;
        CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair) == 0);
        device[i] = pair[0];
        kernel[i] = pair[1];
        wire[i] = bound("127.0.0.1", port);
        CHECK(getsockname(wire[i], (struct sockaddr *)&name, &size) == 0);
        port = name.sin_port;
        queues[i] = (struct queue){.tun = device[i], .sockets = {wire[i]}, .socket_count = 1};
    }
    far_end = bound("127.0.0.2", 0);
    engine = engine_new(queues, QUEUES, 1472, true, 0);
    CHECK(engine != NULL);
    engine_set_table(engine, make(0));
    CHECK(pthread_create(&threads[0], NULL, carry, NULL) == 0 && pthread_create(&threads[1], NULL, flood, NULL) == 0);
    const _Atomic uint64_t *in = &engine_table(engine)->counters[0]->received_packets;
    const _Atomic uint64_t *out = &engine_table(engine)->counters[0]->sent_packets;
    /* At least so many swaps, and packets each way meanwhile. */
    for (unsigned n = 0; n < swaps || atomic_load(in) < 100 || atomic_load(out) < 100; n++)
        engine_set_table(engine, make(n));
    atomic_store(&over, true);
    engine_stop(engine);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    printf("%lu in, %lu out\n", (unsigned long)atomic_load(in), (unsigned long)atomic_load(out));
    for (enum drop reason = 0; reason < DROPS; reason++)
        if (reason != DROP_DEVICE_FAILED && reason != DROP_RECEIVE_FAILED)
            CHECK(engine_drops(engine, reason) == 0);
    engine_free(engine);
    for (int i = 0; i < QUEUES; i++) {
        close(kernel[i]);
        close(device[i]);
        close(wire[i]);
    }
    close(far_end);
    return 0;
}
