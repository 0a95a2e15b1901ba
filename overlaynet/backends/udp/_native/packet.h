/* IP packets (RFC 791, RFC 8200): strict reading, and the ICMP errors for those that cannot be delivered. */
#ifndef OVERLAYNET_PACKET_H
#define OVERLAYNET_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "checksum.h"

enum { PROTOCOL_ICMP = 1, PROTOCOL_TCP = 6, PROTOCOL_UDP = 17, PROTOCOL_ICMPV6 = 58 };
/* IPv6 extension headers (RFC 8200 section 4); the authentication header (RFC 4302) may stand before IPv4's transport, too. */
enum { EXTENSION_HOP_BY_HOP = 0, EXTENSION_ROUTING = 43, EXTENSION_FRAGMENT = 44, EXTENSION_AUTHENTICATION = 51,
       EXTENSION_DESTINATION = 60 };
enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_PSH = 8, TCP_ACK = 16, TCP_URG = 32, TCP_ECE = 64, TCP_CWR = 128 };

enum {
    LARGEST_PACKET = 65535,
    /* Of IP without extension headers, and TCP. */
    LARGEST_PLAIN_HEADERS = 60 + 60,
    /* With extension headers: four, as RFC 8200 section 4.1 orders them, each as long as one can be. */
    LARGEST_HEADERS = 40 + 4 * 2048 + 60,
};

/* Why a packet was not carried: the values of the class Drop in engine.py. */
enum drop {
    DROP_NONE = -1,
    DROP_MALFORMED = 0,
    DROP_UNSUPPORTED,
    DROP_NO_ROUTE,
    DROP_TOO_BIG,
    DROP_SEND_CONGESTED,
    DROP_SEND_REFUSED,
    DROP_SEND_UNREACHABLE,
    DROP_SEND_FAILED,
    DROP_UNKNOWN_PEER,
    DROP_SPOOFED_SOURCE,
    DROP_FOREIGN_DESTINATION,
    DROP_RECEIVE_FAILED,
    DROP_DEVICE_FAILED,
    DROP_CONGESTION,
    DROPS,
};

/* An address as one number of 128 bits; an IPv4 address is the upper 32 of them. */
struct address {
    uint64_t high, low;
};

struct packet {
    uint8_t *data;
    uint32_t size;
    uint8_t version;
    /* The transport protocol, if the packet is whole (no fragment) and its header follows the IP header at once, as it
     * does not after IPv6 extension headers; otherwise zero. */
    uint8_t protocol;
    /* Bytes of IP header. */
    uint16_t ip_length;
    struct address source, destination;
};

static inline uint16_t read16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static inline uint32_t read32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static inline void write16(uint8_t *at, unsigned value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline void write32(uint8_t *at, uint32_t value)
{
    write16(at, value >> 16);
    write16(at + 2, value & 0xFFFF);
}

static inline bool same_address(struct address one, struct address other)
{
    return one.high == other.high && one.low == other.low;
}

struct address address_read(const uint8_t *at, unsigned version);

/* Read the packet that `size` bytes at `data` are; DROP_NONE if they are one whole IP packet, no less and no more. */
enum drop packet_read(uint8_t *data, size_t size, struct packet *packet);

/* Walk the extension headers of an IPv6 packet. Returns the offset of what follows them, and sets `protocol` to what that is;
 * or returns zero if the packet ends before, or is a fragment other than the first. `all` false: walk only those that the
 * kernel itself segments behind, which are hop-by-hop options, routing and destination options. */
uint32_t packet_walk(const struct packet *packet, bool all, uint8_t *protocol);

/* The sum of a packet's pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1) with a transport length. */
uint64_t packet_pseudo_header(const struct packet *packet, unsigned protocol, uint32_t length);

/* The two ECN bits of the IP header. */
unsigned packet_ecn(const struct packet *packet);

/* Carry the outer header's ECN bits over to the packet, as a tunnel's end must (RFC 6040 section 4.2). False if the
 * packet is to be dropped: it met congestion, and its sender does not understand being told so. */
bool packet_decapsulate_ecn(struct packet *packet, unsigned outer);

enum { LARGEST_ERROR = 1280 };

/* Write the ICMP error "network unreachable" (or for IPv6 "no route to destination", RFC 4443) that answers `packet`, from the address
 * `source`, to `error`, which has room for LARGEST_ERROR bytes. Returns its size, or 0 where RFC 1122 section 3.2.2, RFC
 * 1812 section 4.3.2.7 and RFC 4443 section 2.4 (e) forbid one. */
size_t packet_unreachable(const struct packet *packet, const uint8_t *source, uint8_t *error);

#endif
