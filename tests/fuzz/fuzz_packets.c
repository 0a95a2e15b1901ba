/* Fuzzes what reads packets: parser, segmentation, checksums, coalescing, ECN, ICMP errors. A target for libFuzzer.
 *
 * An input is a byte that tells what may be put together, and a sequence of packets, each behind one byte of flags, two of
 * length and a struct offload_header. Of a large one only the beginning is in the input, and of the last one perhaps less than
 * its length: the rest is zeros.
 */
#include "coalesce.h"
#include "oracle.h"

enum { TCP = 1, UDP = 2 };
enum { COMPLETE = 1, OUTER_ECN = 6, CUT = 8, PARTIAL = 16, OTHER_OWNER = 32, FLUSH = 64, LARGE = 128 };
enum { BEGINNING = 100, MOST = 100, MOST_CUT = 300, MOST_CHECKED = 1000 };

static void *memory[MOST_EXPECTED + MOST];
static unsigned memory_count;
static char owners[2];

/* Memory of its own for each packet, of its exact size, so that a step too far is seen. */
static void *keep(size_t size)
{
    CHECK(memory_count < sizeof memory / sizeof *memory);
    return memory[memory_count++] = malloc(size ? size : 1);
}

static unsigned sink_owner;

static void came_out(struct expected *each)
{
    CHECK(each->owner == sink_owner);
}

static void sink(void *context, struct run *run)
{
    const bool *accepted = context;
    sink_owner = (unsigned)((char *)run->owner - owners);
    CHECK(run->count > 0);
    if (run->count == 1) {
        came_out(oracle_came_out((uint8_t *)run->payload[0].iov_base - run->header_length, run->bytes));
        CHECK(run->bytes == run->header_length + run->payload[0].iov_len);
        return;
    }
    CHECK(accepted[run->offload.type == OFFLOAD_UDP]);
    uint8_t *whole = malloc(run->size), *at = whole;
    memcpy(at, run->headers, run->header_length);
    at += run->header_length;
    for (uint32_t i = 0; i < run->count; i++) {
        CHECK((size_t)(at - whole) + run->payload[i].iov_len <= run->size);
        memcpy(at, run->payload[i].iov_base, run->payload[i].iov_len);
        at += run->payload[i].iov_len;
    }
    CHECK((size_t)(at - whole) == run->size);
    CHECK(run->bytes == run->size + (run->count - 1) * run->header_length);
    CHECK(oracle_run_came_out(&run->offload, whole, run->size, came_out) == run->count);
    free(whole);
}

static void feed(struct coalescer *coalescer, uint8_t *data, size_t size, unsigned owner)
{
    struct packet packet;
    if (expected_count == MOST_EXPECTED || packet_read(data, size, &packet) != DROP_NONE)
        return;
    expected[expected_count++] = (struct expected){data, size, owner, false};
    coalescer_add(coalescer, &packet, &owners[owner]);
}

/* Cut a packet as the device's other end must, compare with the oracle, and put together again what came of it. */
static void cut(struct coalescer *coalescer, struct offload_header *offload, uint8_t *data, size_t size, unsigned flags,
                bool complete)
{
    static uint8_t whole[LARGEST_PACKET], wanted[LARGEST_PACKET + 1], got[LARGEST_PACKET + 1];
    unsigned owner = (flags & OTHER_OWNER) != 0;
    bool single = (offload->type & ~OFFLOAD_ECN) == OFFLOAD_NONE, partial = complete && (flags & PARTIAL);
    size_t field;
    struct segments segments;
    struct packet packet;
    if (partial) {
        struct oracle_transport transport = oracle_transport(data, size);
        offload->flags |= OFFLOAD_NEEDS_CHECKSUM;
        offload->checksum_start = (uint16_t)transport.at;
        offload->checksum_offset = (uint16_t)(transport.field - transport.at);
    }
    /* What else asks for a checksum gets one, of whatever there is. */
    bool any_checksum = (offload->flags & OFFLOAD_NEEDS_CHECKSUM) && !partial;
    memcpy(whole, data, size);
    if (segments_read(offload, data, size, &segments) != DROP_NONE)
        return;
    if (single) {
        CHECK(segments.count == 1 && segments.header_length == 0 && segments.packet.size == size);
        if (partial)
            CHECK(oracle_transport_is_right(data, size));
        field = (size_t)offload->checksum_start + offload->checksum_offset;
        for (size_t i = 0; i < size; i++)
            CHECK(data[i] == whole[i] || ((offload->flags & OFFLOAD_NEEDS_CHECKSUM) && (i == field || i == field + 1)));
        feed(coalescer, data, size, owner);
        return;
    }
    size_t offset = 0, headers = segments.header_length;
    CHECK(segments.count > 0 && headers <= size && memcmp(whole, data, size) == 0);
    CHECK(segments.payload_size == offload->segment_size);
    for (uint32_t i = 0; i < segments.count; i++) {
        /* Of very many, the first and the last; for time's sake. */
        if (i == MOST_CHECKED && segments.count > 2 * MOST_CHECKED) {
            offset += (size_t)(segments.count - 2 * MOST_CHECKED) * segments.payload_size;
            i += segments.count - 2 * MOST_CHECKED;
        }
        uint8_t header[LARGEST_HEADERS], *payload;
        uint32_t length;
        segments_cut(&segments, i, header, &payload, &length);
        CHECK(payload == data + headers + offset && length <= size - headers - offset);
        size_t total = oracle_segment(whole, size, headers, segments.payload_size, offset, wanted);
        offset += length;
        CHECK(total == headers + length);
        memcpy(got, header, headers);
        memcpy(got + headers, payload, length);
        CHECK(packet_read(got, total, &packet) == DROP_NONE);
        field = oracle_transport(wanted, total).field;
        if (any_checksum)
            memcpy(wanted + field, got + field, 2);
        else
            CHECK(oracle_transport_is_right(got, total));
        CHECK(oracle_same(got, wanted, total));
        if (i < MOST_CUT && memory_count < MOST_EXPECTED) {
            uint8_t *own = keep(total);
            memcpy(own, got, total);
            feed(coalescer, own, total, owner);
        }
    }
    CHECK(offset == size - headers && "nothing is lost");
}

/* Errors and marks, on a copy. */
static void answer(const uint8_t *original, size_t size, unsigned outer)
{
    /* RFC 6040, figure 4: by the inner bits and the outer. */
    enum { DROPPED = 4 };
    static const unsigned marks[4][4] = {{0, 0, 0, DROPPED}, {1, 1, 1, 3}, {2, 1, 2, 3}, {3, 3, 3, 3}};
    static const uint8_t source[16] = {10, 244, 1, 0};
    uint8_t *data = malloc(size ? size : 1), error[LARGEST_ERROR];
    struct packet packet, read;
    memcpy(data, original, size);
    if (packet_read(data, size, &packet) == DROP_NONE) {
        size_t written = packet_unreachable(&packet, source, error);
        CHECK(written <= LARGEST_ERROR);
        if (written > 0) {
            CHECK(packet_read(error, written, &read) == DROP_NONE);
            size_t ip = oracle_ip_length(error);
            CHECK(oracle_ip_is_right(error));
            CHECK(oracle_sum(packet.version == 4 ? 0 : oracle_pseudo_header(error, PROTOCOL_ICMPV6, written - ip), error + ip,
                             written - ip) == 0xFFFF);
            CHECK(memcmp(error + ip + 8, data, written - ip - 8) == 0);
        }
        bool intact = oracle_ip_is_right(data);
        unsigned inner = packet_ecn(&packet);
        CHECK(packet_decapsulate_ecn(&packet, outer) == (marks[inner][outer] != DROPPED));
        CHECK(packet_ecn(&packet) == (marks[inner][outer] == DROPPED ? inner : marks[inner][outer]));
        CHECK(oracle_ip_is_right(data) == intact);
    }
    free(data);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t left)
{
    static struct coalescer coalescer;
    expected_count = memory_count = 0;
    if (left == 0)
        return 0;
    bool accepted[2] = {input[0] & TCP, input[0] & UDP};
    input++;
    left--;
    memset(&coalescer, 0, sizeof coalescer);
    coalescer_start(&coalescer, accepted[0], accepted[1], sink, accepted);
    for (unsigned n = 0; n < MOST && left >= 13; n++) {
        unsigned flags = input[0];
        size_t size = (size_t)(input[1] << 8 | input[2]);
        struct offload_header offload;
        memcpy(&offload, input + 3, sizeof offload);
        input += 13;
        left -= 13;
        uint8_t *data = keep(size);
        size_t given = (flags & LARGE) && size > BEGINNING ? BEGINNING : size;
        if (given > left)
            given = left;
        memcpy(data, input, given);
        memset(data + given, 0, size - given);
        input += given;
        left -= given;

        /* Or hardly anything that was mutated would be read any further. */
        bool complete = (flags & COMPLETE) && oracle_complete(data, size, (flags & CUT) && (flags & PARTIAL));
        answer(data, size, (flags & OUTER_ECN) >> 1);
        if (flags & CUT)
            cut(&coalescer, &offload, data, size, flags, complete);
        else
            feed(&coalescer, data, size, (flags & OTHER_OWNER) != 0);
        if (flags & FLUSH)
            coalescer_flush(&coalescer);
    }
    coalescer_flush(&coalescer);
    for (unsigned i = 0; i < expected_count; i++)
        CHECK(expected[i].came_out && "nothing is lost");
    for (unsigned i = 0; i < memory_count; i++)
        free(memory[i]);
    return 0;
}
