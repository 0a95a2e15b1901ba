#include "coalesce.h"

#include <stddef.h>

void coalescer_start(struct coalescer *coalescer, bool tcp, bool udp, coalesce_sink *sink, void *context)
{
    coalescer->tcp = tcp;
    coalescer->udp = udp;
    coalescer->sink = sink;
    coalescer->context = context;
    coalescer->open = 0;
    coalescer->oldest = 0;
}

static uint32_t flow_hash(const struct packet *packet)
{
    uint64_t hash = packet->source.high ^ packet->source.low * 3 ^ packet->destination.high * 5;
    hash ^= packet->destination.low * 7 ^ read32(packet->data + packet->ip_length) ^ (uint64_t)packet->protocol << 32;
    hash *= 0x9E3779B97F4A7C15u;
    return (uint32_t)(hash >> 32);
}

static bool same_addresses(const struct run *run, const struct packet *packet)
{
    return run->first.version == packet->version && same_address(run->first.source, packet->source) &&
           same_address(run->first.destination, packet->destination);
}

static bool same_flow(const struct run *run, const struct packet *packet, uint32_t hash)
{
    return run->hash == hash && run->first.protocol == packet->protocol && same_addresses(run, packet) &&
           memcmp(run->first.data + run->first.ip_length, packet->data + packet->ip_length, 4) == 0;
}

static void finish(struct coalescer *coalescer, uint32_t index)
{
    struct run *run = &coalescer->runs[index];
    uint32_t count = run->count;
    run->count = 0;
    coalescer->open--;
    if (count == 0)
        return;
    run->count = count;
    if (count > 1)
        run_finish(run);
    coalescer->sink(coalescer->context, run);
    run->count = 0;
}

/* Finish the runs between the addresses of a packet: where its ports cannot be read, as those of fragments and behind
 * extension headers, it may be of the flow of any of them. */
static void finish_between(struct coalescer *coalescer, const struct packet *packet)
{
    for (uint32_t i = 0, seen = 0, open = coalescer->open; seen < open; i++) {
        if (coalescer->runs[i].count == 0)
            continue;
        seen++;
        if (same_addresses(&coalescer->runs[i], packet))
            finish(coalescer, i);
    }
}

void coalescer_flush(struct coalescer *coalescer)
{
    /* Oldest first. */
    for (uint32_t i = 0; coalescer->open > 0 && i < COALESCED_FLOWS; i++) {
        uint32_t index = (coalescer->oldest + i) % COALESCED_FLOWS;
        if (coalescer->runs[index].count > 0)
            finish(coalescer, index);
    }
    coalescer->oldest = 0;
}

/* Hand a packet on by itself. */
static void pass(struct coalescer *coalescer, const struct packet *packet, void *owner)
{
    struct run *run = &coalescer->passing;
    memset(&run->offload, 0, sizeof run->offload);
    run->header_length = 0;
    run->count = 1;
    run->bytes = packet->size;
    run->payload[0] = (struct iovec){packet->data, packet->size};
    run->owner = owner;
    coalescer->sink(coalescer->context, run);
}

/* The length of a packet's IP and transport headers if it may be part of a run, and zero if it is to pass. */
static uint32_t mergeable_headers(const struct coalescer *coalescer, const struct packet *packet)
{
    const uint8_t *transport = packet->data + packet->ip_length;
    if (packet->version == 4) {
        if (packet->ip_length != 20 || checksum(packet->data, 20) != 0)
            return 0;
        /* The bit that RFC 791 reserves would be lost. */
        if (packet->data[6] & 0x80)
            return 0;
    }
    if (packet->protocol == PROTOCOL_TCP && coalescer->tcp) {
        if (packet->size < packet->ip_length + 20u)
            return 0;
        uint32_t headers = packet->ip_length + (transport[12] >> 4) * 4u;
        /* Only data with ACK and without urgency; CWR belongs to the first segment of a run alone, so it ends one. */
        if ((transport[12] >> 4) < 5 || headers >= packet->size || (transport[12] & 0x0F) != 0 ||
            (transport[13] & ~(TCP_PSH | TCP_FIN | TCP_ECE)) != TCP_ACK || read16(transport + 18) != 0)
            return 0;
        return headers;
    }
    if (packet->protocol == PROTOCOL_UDP && coalescer->udp) {
        uint32_t headers = packet->ip_length + 8u;
        /* Without a checksum there is nothing to verify, and segmentation would make one. */
        if (headers >= packet->size || read16(transport + 4) != packet->size - packet->ip_length ||
            read16(transport + 6) == 0)
            return 0;
        return headers;
    }
    return 0;
}

static bool transport_checksum_is_right(const struct packet *packet)
{
    uint32_t length = packet->size - packet->ip_length;
    uint64_t sum = packet_pseudo_header(packet, packet->protocol, length);
    return checksum_fold(checksum_add(sum, packet->data + packet->ip_length, length)) == 0xFFFF;
}

/* True if all of the IP headers that segmentation copies is the same, and the identification goes on as it would make it go on. */
static bool ip_continues(struct run *run, const struct packet *packet)
{
    const uint8_t *first = run->first.data, *next = packet->data;
    if (packet->version == 6)
        /* Version, traffic class, flow label, next header, hop limit. */
        return memcmp(first, next, 4) == 0 && first[7] == next[7];
    if (first[1] != next[1] || first[8] != next[8] || first[6] != next[6])
        return false;
    uint32_t step = (read16(next + 4) - read16(first + 4)) & 0xFFFFu;
    bool counts = step == (run->count & 0xFFFF);
    /* With "don't fragment" the identification means nothing (RFC 6864 section 4.1), and some senders leave it. */
    bool fixed = step == 0 && (first[6] & 0x40);
    switch (run->identification) {
    case IDENTIFICATION_COUNTS:
        return counts;
    case IDENTIFICATION_FIXED:
        return fixed;
    default:
        if (!counts && !fixed)
            return false;
        run->identification = counts ? IDENTIFICATION_COUNTS : IDENTIFICATION_FIXED;
        return true;
    }
}

/* True if `packet` continues `run`, as far as its headers tell. */
static bool continues(struct run *run, const struct packet *packet, uint32_t headers, void *owner)
{
    uint32_t payload = packet->size - headers;
    if (headers != run->header_length || owner != run->owner || payload > run->offload.segment_size ||
        run->size + payload > LARGEST_PACKET)
        return false;
    const uint8_t *first = run->first.data + run->first.ip_length, *next = packet->data + packet->ip_length;
    if (packet->protocol == PROTOCOL_TCP) {
        if (run->count >= COALESCED_TCP || read32(next + 4) != run->next_sequence ||
            memcmp(first + 8, next + 8, 5) != 0 ||   /* acknowledgement, data offset */
            memcmp(first + 14, next + 14, 2) != 0 || /* window */
            ((first[13] ^ next[13]) & ~(TCP_PSH | TCP_FIN)) != 0 ||
            memcmp(first + 20, next + 20, headers - packet->ip_length - 20u) != 0)
            return false;
    } else if (run->count >= COALESCED_UDP) {
        return false;
    }
    return ip_continues(run, packet);
}

/* True if nothing can follow `packet` in a run. */
static bool is_last(const struct run *run, const struct packet *packet, uint32_t payload)
{
    if (payload < run->offload.segment_size)
        return true;
    return packet->protocol == PROTOCOL_TCP &&
           (packet->data[packet->ip_length + 13] & (TCP_PSH | TCP_FIN)) != 0;
}

static void begin(struct coalescer *coalescer, const struct packet *packet, uint32_t headers, uint32_t hash, void *owner)
{
    uint32_t index = 0;
    if (coalescer->open == COALESCED_FLOWS) {
        index = coalescer->oldest;
        coalescer->oldest = (coalescer->oldest + 1) % COALESCED_FLOWS;
        finish(coalescer, index);
    } else {
        while (coalescer->runs[index].count > 0)
            index++;
    }
    struct run *run = &coalescer->runs[index];
    uint32_t payload = packet->size - headers;
    memset(&run->offload, 0, sizeof run->offload);
    run->offload.segment_size = (uint16_t)payload;
    run->header_length = headers;
    run->count = 1;
    run->bytes = run->size = packet->size;
    run->payload[0] = (struct iovec){packet->data + headers, payload};
    run->owner = owner;
    run->hash = hash;
    run->verified = false;
    run->identification = IDENTIFICATION_UNKNOWN;
    run->first = *packet;
    memcpy(run->headers, packet->data, headers);
    if (packet->protocol == PROTOCOL_TCP)
        run->next_sequence = read32(packet->data + packet->ip_length + 4) + payload;
    coalescer->open++;
    if (packet->protocol == PROTOCOL_TCP && is_last(run, packet, payload))
        finish(coalescer, index);
}

void coalescer_add(struct coalescer *coalescer, const struct packet *packet, void *owner)
{
    uint32_t hash = 0, found = COALESCED_FLOWS;
    bool has_ports = (packet->protocol == PROTOCOL_TCP || packet->protocol == PROTOCOL_UDP) &&
                     packet->size >= packet->ip_length + 8u;
    if (has_ports) {
        hash = flow_hash(packet);
        for (uint32_t i = 0, seen = 0; seen < coalescer->open; i++) {
            if (coalescer->runs[i].count == 0)
                continue;
            seen++;
            if (same_flow(&coalescer->runs[i], packet, hash)) {
                found = i;
                break;
            }
        }
    } else {
        finish_between(coalescer, packet);
    }
    uint32_t headers = has_ports ? mergeable_headers(coalescer, packet) : 0;
    if (found < COALESCED_FLOWS) {
        struct run *run = &coalescer->runs[found];
        /* A lone packet is verified only when another wants to join it: the kernel will verify what stays alone. */
        if (headers != 0 && continues(run, packet, headers, owner) &&
            (run->verified || (run->verified = transport_checksum_is_right(&run->first))) &&
            transport_checksum_is_right(packet)) {
            uint32_t payload = packet->size - headers;
            run->payload[run->count++] = (struct iovec){packet->data + headers, payload};
            run->bytes += packet->size;
            run->size += payload;
            run->next_sequence += payload;
            if (packet->protocol == PROTOCOL_TCP)
                run->headers[packet->ip_length + 13] |= packet->data[packet->ip_length + 13] & (TCP_PSH | TCP_FIN);
            if (is_last(run, packet, payload))
                finish(coalescer, found);
            return;
        }
        finish(coalescer, found);
    }
    if (headers != 0)
        begin(coalescer, packet, headers, hash, owner);
    else
        pass(coalescer, packet, owner);
}

void run_finish(struct run *run)
{
    const struct packet *first = &run->first;
    uint8_t *ip = run->headers, *transport = ip + first->ip_length, *field;
    uint32_t length = run->size - first->ip_length;
    bool tcp = first->protocol == PROTOCOL_TCP;

    if (first->version == 4) {
        write16(ip + 2, run->size);
        ip[10] = ip[11] = 0;
        uint16_t sum = checksum(ip, first->ip_length);
        memcpy(ip + 10, &sum, 2);
        run->offload.type = tcp ? OFFLOAD_TCP4 : OFFLOAD_UDP;
    } else {
        write16(ip + 4, run->size - 40);
        run->offload.type = tcp ? OFFLOAD_TCP6 : OFFLOAD_UDP;
    }
    if (tcp) {
        field = transport + 16;
    } else {
        field = transport + 6;
        write16(transport + 4, length);
    }
    /* The rest of the checksum is the device's to do, or nobody's: each packet's was right. */
    uint16_t sum = checksum_fold(packet_pseudo_header(first, first->protocol, length));
    memcpy(field, &sum, 2);
    run->offload.flags = OFFLOAD_NEEDS_CHECKSUM;
    run->offload.header_length = (uint16_t)run->header_length;
    run->offload.checksum_start = first->ip_length;
    run->offload.checksum_offset = (uint16_t)(field - transport);
}
