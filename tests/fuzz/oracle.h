/* What the fuzzers compare with: IP, checksums and segmentation once more, one byte after the other, by the RFCs alone.
 *
 * Nothing here uses the engine's own functions: a mistake would be on both sides. */
#ifndef OVERLAYNET_ORACLE_H
#define OVERLAYNET_ORACLE_H

#include <stdio.h>
#include <stdlib.h>

#include "segment.h"

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "violated: %s\n", #condition); abort(); } } while (0)

static inline unsigned oracle16(const uint8_t *at)
{
    return (unsigned)at[0] << 8 | at[1];
}

static inline void oracle_write16(uint8_t *at, unsigned value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

/* RFC 1071: the sum of all 16-bit words, in the byte order of the network, on top of another. */
static inline unsigned oracle_sum(unsigned sum, const uint8_t *data, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        sum += i % 2 ? data[i] : (unsigned)data[i] << 8;
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    sum = (sum & 0xFFFF) + (sum >> 16);
    return (sum & 0xFFFF) + (sum >> 16);
}

static inline size_t oracle_ip_length(const uint8_t *data)
{
    return data[0] >> 4 == 4 ? (data[0] & 0xFu) * 4 : 40;
}

static inline size_t oracle_addresses_size(const uint8_t *data)
{
    return data[0] >> 4 == 4 ? 8 : 32;
}

static inline const uint8_t *oracle_addresses(const uint8_t *data)
{
    return data + (data[0] >> 4 == 4 ? 12 : 8);
}

/* The protocol that follows the IP header at once, or 0 for a fragment. */
static inline unsigned oracle_protocol(const uint8_t *data)
{
    if (data[0] >> 4 == 6)
        return data[6];
    return oracle16(data + 6) & 0x3FFF ? 0 : data[9];
}

/* The transport header, also behind the extension headers of IPv6 that a sender may segment behind (RFC 8200 section 4): the
 * offset of it, and its protocol; and of its checksum, or 0 if there is none of TCP or UDP to look at. */
struct oracle_transport {
    size_t at, field;
    unsigned protocol;
};

static inline struct oracle_transport oracle_transport(const uint8_t *data, size_t size)
{
    struct oracle_transport found = {oracle_ip_length(data), 0, oracle_protocol(data)};
    while (data[0] >> 4 == 6 && (found.protocol == 0 || found.protocol == 43 || found.protocol == 60)) {
        if (found.at + 8 > size)
            return found;
        found.protocol = data[found.at];
        found.at += 8u * (data[found.at + 1] + 1u);
    }
    if (found.protocol == PROTOCOL_TCP && size >= found.at + 20)
        found.field = found.at + 16;
    if (found.protocol == PROTOCOL_UDP && size >= found.at + 8)
        found.field = found.at + 6;
    return found;
}

static inline unsigned oracle_pseudo_header(const uint8_t *data, unsigned protocol, size_t length)
{
    return oracle_sum((unsigned)(protocol + length), oracle_addresses(data), oracle_addresses_size(data));
}

static inline bool oracle_ip_is_right(const uint8_t *data)
{
    return data[0] >> 4 == 6 || oracle_sum(0, data, oracle_ip_length(data)) == 0xFFFF;
}

/* True if a receiver would find the checksum of TCP or UDP right; one of UDP that says it is none is not. */
static inline bool oracle_transport_is_right(const uint8_t *data, size_t size)
{
    struct oracle_transport transport = oracle_transport(data, size);
    size_t length = size - transport.at;
    if (transport.protocol == PROTOCOL_UDP && oracle16(data + transport.field) == 0)
        return false;
    return oracle_sum(oracle_pseudo_header(data, transport.protocol, length), data + transport.at, length) == 0xFFFF;
}

/* Fill in lengths and checksums as a sender does. With `partial`, that of TCP or UDP as a sender leaves it to a device that
 * completes checksums: the pseudo-header's sum alone. False if the packet is none that has all of them. */
static inline bool oracle_complete(uint8_t *data, size_t size, bool partial)
{
    if (size < 20)
        return false;
    if (data[0] >> 4 == 4) {
        size_t ip = oracle_ip_length(data);
        if (ip < 20 || ip > size)
            return false;
        oracle_write16(data + 2, (unsigned)size);
        data[10] = data[11] = 0;
        oracle_write16(data + 10, ~oracle_sum(0, data, ip));
    } else {
        if (data[0] >> 4 != 6 || size < 40)
            return false;
        oracle_write16(data + 4, (unsigned)size - 40);
    }
    struct oracle_transport transport = oracle_transport(data, size);
    if (transport.field == 0)
        return false;
    size_t length = size - transport.at;
    unsigned sum = oracle_pseudo_header(data, transport.protocol, length);
    if (transport.protocol == PROTOCOL_UDP)
        oracle_write16(data + transport.at + 4, (unsigned)length);
    data[transport.field] = data[transport.field + 1] = 0;
    if (!partial) {
        sum = ~oracle_sum(sum, data + transport.at, length) & 0xFFFF;
        if (sum == 0 && transport.protocol == PROTOCOL_UDP)
            sum = 0xFFFF;
    }
    oracle_write16(data + transport.field, sum);
    return true;
}

/* Write the segment of a larger packet that begins `offset` bytes into its payload, of at most `most` bytes, and return its
 * size: RFC 9293 for TCP, RFC 768 for UDP, and for the rest what Linux does (net/ipv4/tcp_offload.c). */
static inline size_t oracle_segment(const uint8_t *whole, size_t size, size_t headers, size_t most, size_t offset, uint8_t *segment)
{
    size_t left = size - headers - offset, length = left < most ? left : most;
    struct oracle_transport transport = oracle_transport(whole, size);
    memcpy(segment, whole, headers);
    memcpy(segment + headers, whole + headers + offset, length);
    if (whole[0] >> 4 == 4)
        oracle_write16(segment + 4, oracle16(whole + 4) + (unsigned)(offset / most));
    if (transport.protocol == PROTOCOL_TCP) {
        uint8_t *tcp = segment + transport.at;
        uint32_t sequence = ((uint32_t)oracle16(tcp + 4) << 16 | oracle16(tcp + 6)) + (uint32_t)offset;
        oracle_write16(tcp + 4, sequence >> 16);
        oracle_write16(tcp + 6, sequence);
        if (length < left)
            tcp[13] &= (uint8_t)~(TCP_FIN | TCP_PSH);
        if (offset > 0)
            tcp[13] &= (uint8_t)~TCP_CWR;
    }
    CHECK(oracle_complete(segment, headers + length, false));
    return headers + length;
}

/* True if the packets are equal, but for what means nothing: an IPv4 identification under "don't fragment" (RFC 6864), and so
 * its checksum; and which of the two zeros of the one's complement a checksum has. */
static inline bool oracle_same(const uint8_t *one, const uint8_t *other, size_t size)
{
    size_t field = oracle_transport(one, size).field, next = 0;
    bool v4 = one[0] >> 4 == 4, any_identification = v4 && (one[6] & 0x40);
    if (v4) {
        if (memcmp(one, other, 4) != 0 || (!any_identification && memcmp(one + 4, other + 4, 2) != 0) ||
            memcmp(one + 6, other + 6, 4) != 0)
            return false;
        if (any_identification ? oracle_ip_is_right(one) != oracle_ip_is_right(other)
                               : oracle16(one + 10) % 0xFFFF != oracle16(other + 10) % 0xFFFF)
            return false;
        next = 12;
    }
    if (field != 0) {
        if (memcmp(one + next, other + next, field - next) != 0 ||
            oracle16(one + field) % 0xFFFF != oracle16(other + field) % 0xFFFF)
            return false;
        next = field + 2;
    }
    return memcmp(one + next, other + next, size - next) == 0;
}

/* ---- What went in, and must come out: once, whole, and in order. */

struct expected {
    const uint8_t *data;
    size_t size;
    unsigned owner;
    bool came_out;
};
enum { MOST_EXPECTED = 1024 };
static struct expected expected[MOST_EXPECTED];
static unsigned expected_count;

static inline bool oracle_has_ports(const struct expected *each)
{
    unsigned protocol = oracle_protocol(each->data);
    return (protocol == PROTOCOL_TCP || protocol == PROTOCOL_UDP) && each->size >= oracle_ip_length(each->data) + 8;
}

/* True if one must not overtake the other: they are of one flow; or neither tells which flow between its addresses it is of,
 * as a fragment does not. */
static inline bool oracle_ordered(const struct expected *one, const struct expected *other)
{
    if (one->data[0] >> 4 != other->data[0] >> 4 ||
        memcmp(oracle_addresses(one->data), oracle_addresses(other->data), oracle_addresses_size(one->data)) != 0)
        return false;
    if (!oracle_has_ports(one) || !oracle_has_ports(other))
        return oracle_has_ports(one) == oracle_has_ports(other);
    return oracle_protocol(one->data) == oracle_protocol(other->data) &&
           memcmp(one->data + oracle_ip_length(one->data), other->data + oracle_ip_length(other->data), 4) == 0;
}

/* A packet came out: find it. */
static inline struct expected *oracle_came_out(const uint8_t *data, size_t size)
{
    struct expected *found = NULL;
    for (unsigned i = 0; i < expected_count && found == NULL; i++)
        if (!expected[i].came_out && expected[i].size == size && oracle_same(expected[i].data, data, size))
            found = &expected[i];
    CHECK(found != NULL && "a packet came out that did not go in, or came out twice");
    for (struct expected *each = expected; each < found; each++)
        CHECK((each->came_out || !oracle_ordered(each, found)) && "a packet overtook an earlier one");
    found->came_out = true;
    return found;
}

/* Packets that were put together came out, as the kernel would be given them: cut them again. */
static inline unsigned oracle_run_came_out(const struct offload_header *offload, const uint8_t *whole, size_t size,
                                    void (*each_came_out)(struct expected *))
{
    static uint8_t segment[LARGEST_PACKET + 1];
    unsigned protocol = oracle_protocol(whole), segments = 0;
    bool v4 = whole[0] >> 4 == 4;
    size_t ip = oracle_ip_length(whole), headers = protocol == PROTOCOL_TCP ? ip + (whole[ip + 12] >> 4) * 4u : ip + 8;
    CHECK(size <= LARGEST_PACKET && (v4 ? oracle16(whole + 2) : oracle16(whole + 4) + 40) == size);
    CHECK(oracle_ip_is_right(whole));
    CHECK(offload->type == (protocol == PROTOCOL_UDP ? OFFLOAD_UDP : v4 ? OFFLOAD_TCP4 : OFFLOAD_TCP6));
    CHECK(protocol == PROTOCOL_TCP || protocol == PROTOCOL_UDP);
    CHECK(offload->flags == OFFLOAD_NEEDS_CHECKSUM);
    CHECK(offload->header_length == headers && offload->segment_size > 0);
    CHECK(offload->checksum_start == ip && offload->checksum_offset == (protocol == PROTOCOL_TCP ? 16 : 6));
    CHECK(oracle16(whole + ip + offload->checksum_offset) == oracle_pseudo_header(whole, protocol, size - ip));
    for (size_t offset = 0; offset < size - headers; offset += offload->segment_size) {
        size_t length = oracle_segment(whole, size, headers, offload->segment_size, offset, segment);
        each_came_out(oracle_came_out(segment, length));
        segments++;
    }
    return segments;
}

#endif
