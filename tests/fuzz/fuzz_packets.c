/* Fuzzes what reads untrusted bytes: parser, segmentation, coalescing, ECN, ICMP errors.
 *
 * A target for libFuzzer (clang -fsanitize=fuzzer,address,undefined); with -DSTANDALONE a program of its own, for any
 * compiler, that mutates the files of a corpus: `fuzz_packets RUNS FILE...`.
 *
 * An input is a sequence of packets, each behind one byte of flags, two of length and a struct offload_header.
 */
#include <stdio.h>
#include <stdlib.h>

#include "coalesce.h"

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "violated: %s\n", #condition); abort(); } } while (0)

enum { MOST = 64, FIX_CHECKSUMS = 1, OUTER_ECN = 6, CUT = 8 };

struct fed {
    struct packet packet;
    bool came_out;
};
static struct fed fed[4096];
static unsigned fed_count;
static void *memory[4096];
static unsigned memory_count;

static void *keep(size_t size)
{
    CHECK(memory_count < sizeof memory / sizeof *memory);
    return memory[memory_count++] = malloc(size ? size : 1);
}

/* True if the packets are equal, but for an identification (and so a checksum) that means nothing: RFC 6864. */
static bool same(const uint8_t *one, const uint8_t *other, size_t size)
{
    if (one[0] >> 4 != 4 || !(one[6] & 0x40))
        return memcmp(one, other, size) == 0;
    return memcmp(one, other, 4) == 0 && memcmp(one + 6, other + 6, 4) == 0 && memcmp(one + 12, other + 12, size - 12) == 0;
}

static void expect(const uint8_t *data, size_t size)
{
    /* The first that is still missing of those that look like it: so the order within a flow is checked as well. */
    for (unsigned i = 0; i < fed_count; i++) {
        if (!fed[i].came_out && fed[i].packet.size == size && same(fed[i].packet.data, data, size)) {
            fed[i].came_out = true;
            return;
        }
    }
    CHECK(!"a packet came out that did not go in");
}

static void sink(void *context, struct run *run)
{
    (void)context;
    if (run->count == 1) {
        expect((uint8_t *)run->payload[0].iov_base - run->header_length, run->bytes);
        return;
    }
    uint8_t *whole = malloc(run->size), *at = whole;
    memcpy(at, run->headers, run->header_length);
    at += run->header_length;
    for (uint32_t i = 0; i < run->count; i++) {
        memcpy(at, run->payload[i].iov_base, run->payload[i].iov_len);
        at += run->payload[i].iov_len;
    }
    CHECK((size_t)(at - whole) == run->size);
    struct segments segments;
    CHECK(segments_read(&run->offload, whole, run->size, &segments) == DROP_NONE);
    CHECK(segments.count == run->count);
    for (uint32_t i = 0; i < segments.count; i++) {
        uint8_t packet[LARGEST_PACKET + 1], *payload;
        uint32_t size;
        segments_cut(&segments, i, packet, &payload, &size);
        memcpy(packet + segments.header_length, payload, size);
        expect(packet, segments.header_length + size);
    }
    free(whole);
}

static void fix_checksums(struct packet *packet)
{
    uint8_t *data = packet->data;
    uint16_t sum;
    if (packet->version == 4) {
        data[10] = data[11] = 0;
        sum = checksum(data, packet->ip_length);
        memcpy(data + 10, &sum, 2);
    }
    unsigned field = packet->protocol == PROTOCOL_TCP ? 16 : 6;
    if ((packet->protocol != PROTOCOL_TCP && packet->protocol != PROTOCOL_UDP) || packet->size < packet->ip_length + 20u)
        return;
    uint8_t *transport = data + packet->ip_length;
    uint32_t length = packet->size - packet->ip_length;
    if (packet->protocol == PROTOCOL_UDP)
        write16(transport + 4, length);
    transport[field] = transport[field + 1] = 0;
    sum = (uint16_t)~checksum_fold(checksum_add(packet_pseudo_header(packet, packet->protocol, length), transport, length));
    if (sum == 0 && packet->protocol == PROTOCOL_UDP)
        sum = 0xFFFF;
    memcpy(transport + field, &sum, 2);
}

static void feed(struct coalescer *coalescer, uint8_t *data, size_t size)
{
    struct packet packet;
    if (fed_count == sizeof fed / sizeof *fed || packet_read(data, size, &packet) != DROP_NONE)
        return;
    fed[fed_count++] = (struct fed){packet, false};
    coalescer_add(coalescer, &packet, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t left)
{
    static struct coalescer coalescer;
    static const uint8_t source[16] = {10, 244, 1, 0};
    fed_count = memory_count = 0;
    memset(&coalescer, 0, sizeof coalescer);
    coalescer_start(&coalescer, true, true, sink, NULL);
    for (unsigned n = 0; n < MOST && left >= 13; n++) {
        unsigned flags = input[0];
        size_t size = (size_t)(input[1] << 8 | input[2]);
        struct offload_header offload;
        memcpy(&offload, input + 3, sizeof offload);
        input += 13;
        left -= 13;
        if (size > left)
            size = left;
        /* In memory of its own, of its exact size, so that a step too far is seen. */
        uint8_t *data = keep(size);
        memcpy(data, input, size);
        input += size;
        left -= size;

        /* Or hardly anything that was mutated would be read any further. */
        if ((flags & FIX_CHECKSUMS) && size >= 40)
            data[0] >> 4 == 6 ? write16(data + 4, (unsigned)size - 40) : write16(data + 2, (unsigned)size);
        struct packet packet;
        if (packet_read(data, size, &packet) == DROP_NONE) {
            uint8_t error[LARGEST_ERROR];
            if (flags & FIX_CHECKSUMS)
                fix_checksums(&packet);
            bool intact = packet.version == 6 || checksum(data, packet.ip_length) == 0;
            if (packet_decapsulate_ecn(&packet, (flags & OUTER_ECN) >> 1))
                CHECK((packet.version == 6 || checksum(data, packet.ip_length) == 0) == intact);
            size_t written = packet_unreachable(&packet, source, error);
            CHECK(written <= LARGEST_ERROR);
            struct packet answer;
            if (written > 0)
                CHECK(packet_read(error, written, &answer) == DROP_NONE);
        }
        struct segments segments;
        if (!(flags & CUT)) {
            feed(&coalescer, data, size);
        } else if (segments_read(&offload, data, size, &segments) == DROP_NONE) {
            for (uint32_t i = 0; i < segments.count && i < 100; i++) {
                uint8_t header[LARGEST_HEADERS], *payload;
                uint32_t length;
                segments_cut(&segments, i, header, &payload, &length);
                CHECK(payload + length <= data + size);
                if (memory_count == sizeof memory / sizeof *memory)
                    break;
                uint8_t *cut = keep(segments.header_length + length);
                memcpy(cut, header, segments.header_length);
                memcpy(cut + segments.header_length, payload, length);
                if (segments.header_length > 0)
                    CHECK(packet_read(cut, segments.header_length + length, &packet) == DROP_NONE);
                feed(&coalescer, cut, segments.header_length + length);
            }
        }
    }
    coalescer_flush(&coalescer);
    for (unsigned i = 0; i < fed_count; i++)
        CHECK(fed[i].came_out);
    for (unsigned i = 0; i < memory_count; i++)
        free(memory[i]);
    return 0;
}

#ifdef STANDALONE
static uint64_t chance_state = 88172645463325252u;

static uint32_t chance(uint32_t below)
{
    chance_state ^= chance_state << 13;
    chance_state ^= chance_state >> 7;
    chance_state ^= chance_state << 17;
    return (uint32_t)(chance_state >> 32) % below;
}

int main(int argc, char **argv)
{
    enum { ROOM = 1 << 17 };
    static uint8_t original[ROOM], mutated[2 * ROOM];
    unsigned long runs = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
    for (int argument = 2; argument < argc; argument++) {
        FILE *file = fopen(argv[argument], "rb");
        if (file == NULL) {
            perror(argv[argument]);
            return 1;
        }
        size_t size = fread(original, 1, ROOM, file);
        fclose(file);
        LLVMFuzzerTestOneInput(original, size);
        for (unsigned long run = 0; run < runs && size > 0; run++) {
            static const uint8_t likely[] = {0, 1, 2, 4, 5, 0x10, 0x18, 0x40, 0x45, 0x60, 0x7F, 0x80, 0xFF};
            size_t now = size;
            memcpy(mutated, original, size);
            for (uint32_t change = chance(8); change > 0; change--) {
                uint32_t at = chance((uint32_t)now), from = chance((uint32_t)now);
                switch (chance(5)) {
                case 0:
                    mutated[at] ^= (uint8_t)(1u << chance(8));
                    break;
                case 1:
                    mutated[at] = likely[chance(sizeof likely)];
                    break;
                case 2:
                    mutated[at] = (uint8_t)chance(256);
                    break;
                case 3: { /* copy a piece elsewhere */
                    uint32_t length = chance(64);
                    if (at + length <= now && from + length <= now)
                        memmove(mutated + at, mutated + from, length);
                    break;
                }
                default:
                    if (chance(4) == 0 && at > 0)
                        now = at;
                }
            }
            LLVMFuzzerTestOneInput(mutated, now);
        }
    }
    return 0;
}
#endif
