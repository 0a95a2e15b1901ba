#include "segment.h"

static enum drop complete_checksum(const struct offload_header *offload, struct packet *packet)
{
    size_t start = offload->checksum_start, field = start + offload->checksum_offset;
    if (start > packet->size || field + 2 > packet->size)
        return DROP_MALFORMED;
    uint16_t sum = checksum(packet->data + start, packet->size - start);
    /* To UDP, zero would say that there is no checksum (RFC 768), and UDP may hide in a tunnel's packet. To all others both
     * are the same, so do as the kernel does (skb_checksum_help). */
    if (sum == 0)
        sum = 0xFFFF;
    memcpy(packet->data + field, &sum, 2);
    return DROP_NONE;
}

static uint32_t count_segments(uint32_t size, uint32_t headers, uint32_t segment_size)
{
    return headers >= size || segment_size == 0 ? 1 : (size - headers + segment_size - 1) / segment_size;
}

/* Bytes before the payload, by the transport header at `transport`; zero if there is none. */
static uint32_t headers_at(unsigned type, const uint8_t *data, size_t size, uint32_t transport)
{
    if (transport + (type == OFFLOAD_UDP ? 8u : 20u) > size)
        return 0;
    if (type == OFFLOAD_UDP)
        return transport + 8;
    uint32_t tcp = (data[transport + 12] >> 4) * 4u;
    return tcp < 20 || transport + tcp > size ? 0 : transport + tcp;
}

enum drop segments_read(const struct offload_header *offload, uint8_t *data, size_t size, struct segments *segments)
{
    struct packet *packet = &segments->packet;
    unsigned type = offload->type & ~OFFLOAD_ECN;
    segments->header_length = 0;
    segments->payload_size = (uint32_t)size;
    segments->count = 1;
    if (type != OFFLOAD_NONE) {
        /* By what the device says alone, should the packet make no sense. */
        uint32_t headers = headers_at(type, data, size, offload->checksum_start);
        if (headers != 0)
            segments->count = count_segments((uint32_t)size, headers, offload->segment_size);
    }
    enum drop refused = packet_read(data, size, packet);
    if (refused != DROP_NONE)
        return refused;
    if (type == OFFLOAD_NONE)
        return offload->flags & OFFLOAD_NEEDS_CHECKSUM ? complete_checksum(offload, packet) : DROP_NONE;
    if (type != OFFLOAD_TCP4 && type != OFFLOAD_TCP6 && type != OFFLOAD_UDP)
        return DROP_UNSUPPORTED;

    uint32_t transport = packet->ip_length;
    uint8_t protocol = packet->protocol;
    if (packet->version == 6)
        transport = packet_walk(packet, false, &protocol);
    bool partial = offload->flags & OFFLOAD_NEEDS_CHECKSUM;
    if (transport == 0 || protocol != (type == OFFLOAD_UDP ? PROTOCOL_UDP : PROTOCOL_TCP) ||
        (partial && transport != offload->checksum_start))
        return DROP_MALFORMED;
    uint32_t headers = headers_at(type, data, size, transport);
    if (headers == 0 || headers > LARGEST_HEADERS || offload->segment_size == 0)
        return DROP_MALFORMED;
    segments->transport = transport;
    segments->header_length = headers;
    segments->protocol = protocol;
    segments->payload_size = offload->segment_size;
    segments->count = count_segments((uint32_t)size, headers, offload->segment_size);
    uint32_t length = (uint32_t)size - transport;
    if (partial) {
        /* The field has the sum of the pseudo-header. With source routing, that is of the last destination, and not of the
         * one in the IP header; so take it, and the length off it. */
        uint16_t sum, less;
        memcpy(&sum, data + transport + (protocol == PROTOCOL_TCP ? 16 : 6), 2);
        write16((uint8_t *)&less, ~length & 0xFFFF);
        segments->pseudo_header = checksum_fold((uint64_t)sum + less);
    } else {
        segments->pseudo_header = checksum_fold(packet_pseudo_header(packet, protocol, 0));
    }
    return DROP_NONE;
}

void segments_cut(const struct segments *segments, uint32_t index, uint8_t *header, uint8_t **payload, uint32_t *size)
{
    const struct packet *packet = &segments->packet;
    uint32_t headers = segments->header_length;
    uint32_t offset = index * segments->payload_size;
    uint32_t length = packet->size - headers - offset;
    if (length > segments->payload_size)
        length = segments->payload_size;
    *payload = packet->data + headers + offset;
    *size = length;
    if (headers == 0)
        return;

    memcpy(header, packet->data, headers);
    if (packet->version == 4) {
        write16(header + 2, headers + length);
        write16(header + 4, (read16(header + 4) + index) & 0xFFFF);
        header[10] = header[11] = 0;
        uint16_t sum = checksum(header, packet->ip_length);
        memcpy(header + 10, &sum, 2);
    } else {
        write16(header + 4, headers + length - 40);
    }

    uint8_t *transport = header + segments->transport, *field;
    uint32_t transport_length = headers - segments->transport;
    if (segments->protocol == PROTOCOL_TCP) {
        field = transport + 16;
        write32(transport + 4, read32(transport + 4) + offset);
        if (index + 1 < segments->count)
            transport[13] &= (uint8_t) ~(TCP_FIN | TCP_PSH);
        if (index > 0)
            transport[13] &= (uint8_t)~TCP_CWR;
    } else {
        field = transport + 6;
        write16(transport + 4, 8 + length);
    }
    field[0] = field[1] = 0;
    uint8_t whole[2];
    write16(whole, transport_length + length);
    uint64_t sum = checksum_add(segments->pseudo_header, whole, 2);
    /* Headers are of even length, so the sums of both pieces may be added. */
    sum = checksum_add(sum, transport, transport_length);
    sum = checksum_add(sum, *payload, length);
    uint16_t folded = (uint16_t)~checksum_fold(sum);
    if (folded == 0 && segments->protocol == PROTOCOL_UDP)
        folded = 0xFFFF;
    memcpy(field, &folded, 2);
}
