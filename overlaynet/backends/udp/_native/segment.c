#include "segment.h"

static enum drop complete_checksum(const struct offload_header *offload, struct packet *packet)
{
    size_t start = offload->checksum_start, field = start + offload->checksum_offset;
    if (start > packet->size || field + 2 > packet->size)
        return DROP_MALFORMED;
    uint16_t sum = checksum(packet->data + start, packet->size - start);
    if (sum == 0 && packet->protocol == PROTOCOL_UDP)
        sum = 0xFFFF; /* zero would say that there is none (RFC 768) */
    memcpy(packet->data + field, &sum, 2);
    return DROP_NONE;
}

enum drop segments_read(const struct offload_header *offload, uint8_t *data, size_t size, struct segments *segments)
{
    struct packet *packet = &segments->packet;
    enum drop refused = packet_read(data, size, packet);
    if (refused != DROP_NONE)
        return refused;
    unsigned type = offload->type & ~OFFLOAD_ECN;
    segments->header_length = 0;
    segments->payload_size = packet->size;
    segments->count = 1;
    if (type == OFFLOAD_NONE)
        return offload->flags & OFFLOAD_NEEDS_CHECKSUM ? complete_checksum(offload, packet) : DROP_NONE;

    uint32_t ip = packet->ip_length, headers;
    if (type == OFFLOAD_TCP4 || type == OFFLOAD_TCP6) {
        if (packet->protocol != PROTOCOL_TCP || size < ip + 20u)
            return DROP_MALFORMED;
        uint32_t tcp = (data[ip + 12] >> 4) * 4u;
        if (tcp < 20)
            return DROP_MALFORMED;
        headers = ip + tcp;
    } else if (type == OFFLOAD_UDP) {
        if (packet->protocol != PROTOCOL_UDP)
            return DROP_MALFORMED;
        headers = ip + 8;
    } else {
        return DROP_UNSUPPORTED;
    }
    if (headers > size || offload->segment_size == 0)
        return DROP_MALFORMED;
    uint32_t payload = packet->size - headers;
    segments->header_length = headers;
    segments->payload_size = offload->segment_size;
    segments->count = payload == 0 ? 1 : (payload + offload->segment_size - 1) / offload->segment_size;
    return DROP_NONE;
}

void segments_cut(const struct segments *segments, uint32_t index, uint8_t *header, uint8_t **payload, uint32_t *size)
{
    const struct packet *packet = &segments->packet;
    uint32_t headers = segments->header_length, ip = packet->ip_length;
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
        uint16_t sum = checksum(header, ip);
        memcpy(header + 10, &sum, 2);
    } else {
        write16(header + 4, headers + length - 40);
    }

    uint8_t *transport = header + ip, *field;
    if (packet->protocol == PROTOCOL_TCP) {
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
    uint64_t sum = packet_pseudo_header(packet, packet->protocol, headers - ip + length);
    /* Headers are of even length, so the sums of both pieces may be added. */
    sum = checksum_add(sum, transport, headers - ip);
    sum = checksum_add(sum, *payload, length);
    uint16_t folded = (uint16_t)~checksum_fold(sum);
    if (folded == 0 && packet->protocol == PROTOCOL_UDP)
        folded = 0xFFFF;
    memcpy(field, &folded, 2);
}
