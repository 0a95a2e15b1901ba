/* Segmentation: what the kernel left to the device, done here.
 *
 * With IFF_VNET_HDR, a TUN device hands out packets behind a header of virtio (virtio 1.2, section 5.1.6; Linux,
 * include/uapi/linux/virtio_net.h). It may ask for a checksum to be completed, and it may describe a packet of up to
 * 64 KiB that is to be cut into segments (TSO for TCP, USO for UDP).
 */
#ifndef OVERLAYNET_SEGMENT_H
#define OVERLAYNET_SEGMENT_H

#include "packet.h"

enum { OFFLOAD_NONE = 0, OFFLOAD_TCP4 = 1, OFFLOAD_TCP6 = 4, OFFLOAD_UDP = 5, OFFLOAD_ECN = 0x80 };
enum { OFFLOAD_NEEDS_CHECKSUM = 1 };

/* struct virtio_net_hdr, in the host's byte order, as TUN devices have it unless told otherwise. */
struct offload_header {
    uint8_t flags;
    uint8_t type;
    uint16_t header_length;
    uint16_t segment_size;
    uint16_t checksum_start;
    uint16_t checksum_offset;
};

/* A packet as a run of segments, all with headers of one length. */
struct segments {
    struct packet packet;
    /* Bytes before the TCP or UDP header: of IP, with IPv6 extension headers. */
    uint32_t transport;
    /* And with the TCP or UDP header. */
    uint32_t header_length;
    uint8_t protocol;
    /* The sum of the pseudo-header without the length in it, folded. */
    uint16_t pseudo_header;
    /* Bytes of payload in each segment; the last may have fewer. */
    uint32_t payload_size;
    uint32_t count;
};

/* Read what a TUN device gave: a packet, and the header before it.
 *
 * A packet that is no run of segments has its checksum completed in place if it asked for that, and counts as a run of
 * one, whose header is empty and whose payload the whole packet is. Of a packet that is refused, `count` is set all the same:
 * the number of segments if that could be made out, else one. */
enum drop segments_read(const struct offload_header *offload, uint8_t *data, size_t size, struct segments *segments);

/* Write the header of one segment to `header`, with all checksums right, and tell where its payload is. */
void segments_cut(const struct segments *segments, uint32_t index, uint8_t *header, uint8_t **payload, uint32_t *size);

#endif
