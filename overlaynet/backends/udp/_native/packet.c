#include "packet.h"

struct address address_read(const uint8_t *at, unsigned version)
{
    struct address address = {(uint64_t)read32(at) << 32, 0};
    if (version == 6) {
        address.high |= read32(at + 4);
        address.low = (uint64_t)read32(at + 8) << 32 | read32(at + 12);
    }
    return address;
}

enum drop packet_read(uint8_t *data, size_t size, struct packet *packet)
{
    if (size < 20)
        return DROP_MALFORMED;
    packet->data = data;
    packet->size = (uint32_t)size;
    packet->version = data[0] >> 4;
    if (packet->version == 4) {
        packet->ip_length = (data[0] & 0xF) * 4;
        if (packet->ip_length < 20 || packet->ip_length > size || read16(data + 2) != size)
            return DROP_MALFORMED;
        packet->protocol = (read16(data + 6) & 0x3FFF) == 0 ? data[9] : 0;
        packet->source = address_read(data + 12, 4);
        packet->destination = address_read(data + 16, 4);
        return DROP_NONE;
    }
    if (packet->version == 6) {
        if (size < 40 || read16(data + 4) + 40u != size)
            return DROP_MALFORMED;
        packet->ip_length = 40;
        packet->protocol = data[6];
        packet->source = address_read(data + 8, 6);
        packet->destination = address_read(data + 24, 6);
        return DROP_NONE;
    }
    return DROP_MALFORMED;
}

uint32_t packet_walk(const struct packet *packet, bool all, uint8_t *protocol)
{
    const uint8_t *data = packet->data;
    uint32_t at = 40;
    for (uint8_t next = data[6];; next = *protocol) {
        *protocol = next;
        bool options = next == EXTENSION_HOP_BY_HOP || next == EXTENSION_ROUTING || next == EXTENSION_DESTINATION;
        if (!options && !(all && (next == EXTENSION_FRAGMENT || next == EXTENSION_AUTHENTICATION)))
            return at;
        if (at + 8 > packet->size || (next == EXTENSION_FRAGMENT && (read16(data + at + 2) & 0xFFF8) != 0))
            return 0;
        *protocol = data[at];
        if (next == EXTENSION_FRAGMENT)
            at += 8;
        else if (next == EXTENSION_AUTHENTICATION)
            at += (data[at + 1] + 2u) * 4;
        else
            at += (data[at + 1] + 1u) * 8;
    }
}

uint64_t packet_pseudo_header(const struct packet *packet, unsigned protocol, uint32_t length)
{
    uint8_t tail[8];
    write32(tail, length);
    write32(tail + 4, protocol);
    uint64_t sum = checksum_add(0, tail, 8);
    if (packet->version == 4)
        return checksum_add(sum, packet->data + 12, 8);
    return checksum_add(sum, packet->data + 8, 32);
}

unsigned packet_ecn(const struct packet *packet)
{
    return packet->version == 4 ? packet->data[1] & 3 : (packet->data[1] >> 4) & 3;
}

bool packet_decapsulate_ecn(struct packet *packet, unsigned outer)
{
    enum { NOT_CAPABLE = 0, CAPABLE_1 = 1, CAPABLE_0 = 2, CONGESTION = 3 };
    unsigned inner = packet_ecn(packet), marked = inner;
    uint8_t *data = packet->data;

    if (outer == CONGESTION) {
        if (inner == NOT_CAPABLE)
            return false;
        marked = CONGESTION;
    } else if (outer == CAPABLE_1 && inner == CAPABLE_0) {
        marked = CAPABLE_1;
    }
    if (marked == inner)
        return true;
    if (packet->version == 6) {
        data[1] = (uint8_t)((data[1] & 0xCF) | marked << 4);
        return true;
    }
    /* Update the header's checksum instead of making a new one (RFC 1624), so that a damaged header stays damaged. */
    uint16_t before, after, sum;
    memcpy(&before, data, 2);
    data[1] = (uint8_t)((data[1] & 0xFC) | marked);
    memcpy(&after, data, 2);
    memcpy(&sum, data + 10, 2);
    sum = (uint16_t)~checksum_fold((uint64_t)(uint16_t)~sum + (uint16_t)~before + after);
    memcpy(data + 10, &sum, 2);
    return true;
}

/* True if the address can be a single host's: not 0/8, loopback, multicast, reserved or broadcast. */
static bool is_host4(const uint8_t *address)
{
    return address[0] != 0 && address[0] != 127 && address[0] < 224;
}

/* The same for IPv6: not unspecified, loopback or multicast. */
static bool is_host6(const uint8_t *address)
{
    struct address value = address_read(address, 6);
    return address[0] != 0xFF && !(value.high == 0 && value.low <= 1);
}

static bool is_icmp_query(uint8_t type)
{
    switch (type) {
    case 0: case 8: case 9: case 10: case 13: case 14: case 15: case 16: case 17: case 18: case 42: case 43:
        return true;
    default: /* It reports an error, or may do so one day. */
        return false;
    }
}

static size_t unreachable4(const struct packet *packet, const uint8_t *source, uint8_t *error)
{
    const uint8_t *data = packet->data;
    size_t header = packet->ip_length;
    if ((read16(data + 6) & 0x1FFF) != 0 || !is_host4(data + 12) || data[16] >= 224)
        return 0;
    size_t at = header;
    uint8_t protocol = data[9];
    while (protocol == EXTENSION_AUTHENTICATION) {
        if (at + 8 > packet->size)
            return 0;
        protocol = data[at];
        at += (data[at + 1] + 2u) * 4;
    }
    if (protocol == PROTOCOL_ICMP && (at >= packet->size || !is_icmp_query(data[at])))
        return 0;
    if (checksum(data, header) != 0)
        return 0;
    size_t quote = packet->size < 576 - 28 ? packet->size : 576 - 28; /* RFC 1812 section 4.3.2.3 */
    size_t total = 28 + quote;
    memset(error, 0, 28);
    error[0] = 0x45;
    error[1] = 0xC0; /* internetwork control: RFC 1812 section 4.3.2.5 */
    write16(error + 2, (unsigned)total);
    error[8] = 64;
    error[9] = PROTOCOL_ICMP;
    memcpy(error + 12, source, 4);
    memcpy(error + 16, data + 12, 4);
    error[20] = 3;
    memcpy(error + 28, data, quote);
    uint16_t sum = checksum(error, 20);
    memcpy(error + 10, &sum, 2);
    sum = checksum(error + 20, total - 20);
    memcpy(error + 22, &sum, 2);
    return total;
}

static size_t unreachable6(const struct packet *packet, const uint8_t *source, uint8_t *error)
{
    const uint8_t *data = packet->data;
    size_t size = packet->size;
    if (!is_host6(data + 8) || data[24] == 0xFF)
        return 0;
    /* An ICMP error may hide behind extension headers. */
    uint8_t protocol;
    uint32_t at = packet_walk(packet, true, &protocol);
    if (at == 0)
        return 0;
    /* Types below 128 are errors, 137 is a redirect. */
    if (protocol == PROTOCOL_ICMPV6 && (at >= size || data[at] < 128 || data[at] == 137))
        return 0;
    size_t quote = size < LARGEST_ERROR - 48 ? size : LARGEST_ERROR - 48;
    size_t total = 48 + quote;
    memset(error, 0, 48);
    error[0] = 0x60;
    write16(error + 4, (unsigned)(8 + quote));
    error[6] = PROTOCOL_ICMPV6;
    error[7] = 64;
    memcpy(error + 8, source, 16);
    memcpy(error + 24, data + 8, 16);
    error[40] = 1;
    memcpy(error + 48, data, quote);
    struct packet answer = {.data = error, .version = 6};
    uint64_t sum = packet_pseudo_header(&answer, PROTOCOL_ICMPV6, (uint32_t)(8 + quote));
    uint16_t folded = (uint16_t)~checksum_fold(checksum_add(sum, error + 40, 8 + quote));
    memcpy(error + 42, &folded, 2);
    return total;
}

size_t packet_unreachable(const struct packet *packet, const uint8_t *source, uint8_t *error)
{
    return packet->version == 4 ? unreachable4(packet, source, error) : unreachable6(packet, source, error);
}
