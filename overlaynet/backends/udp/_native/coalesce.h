/* Coalescing: packets of one flow that follow each other, put together into one that the kernel handles as a whole.
 *
 * It is the inverse of segmentation, by the rules of the kernel's own generic receive offload (net/ipv4/af_inet.c,
 * tcp_offload.c, udp_offload.c): only what segmentation would turn back into the same packets is put together. The
 * packets of a flow keep their order; where the ports cannot be read, as in fragments, that is the order among all between
 * the same addresses. Payload is not copied: the result points into the packets.
 */
#ifndef OVERLAYNET_COALESCE_H
#define OVERLAYNET_COALESCE_H

#include <sys/uio.h>

#include "segment.h"

enum { COALESCED_FLOWS = 32, COALESCED_TCP = 128, COALESCED_UDP = 64 };

/* A run of packets, or a single one. */
struct run {
    /* The headers of all: with one packet its own, with more those of the whole, in the order of writing:
     * this, headers, payload pieces. */
    struct offload_header offload;
    uint8_t headers[LARGEST_PLAIN_HEADERS];
    uint32_t header_length;
    uint32_t count;
    /* Bytes in all the packets, each with its own headers. */
    uint32_t bytes;
    /* The payload of each packet; its headers lie before it, untouched. */
    struct iovec payload[COALESCED_TCP];
    /* Whatever the caller gave with the first packet; packets with another are not put together with it. */
    void *owner;

    /* Bytes of the whole; and what the next packet must continue with. */
    uint32_t size;
    uint32_t next_sequence;
    uint32_t hash;
    bool verified;
    /* What the IPv4 identification does from packet to packet: stays, or counts up; known from the second on. */
    enum { IDENTIFICATION_UNKNOWN, IDENTIFICATION_FIXED, IDENTIFICATION_COUNTS } identification;
    struct packet first;
};

/* Called with each finished run, and with each packet that is not put together with others (as a run of one). */
typedef void coalesce_sink(void *context, struct run *run);

struct coalescer {
    bool tcp, udp;
    coalesce_sink *sink;
    void *context;
    uint32_t open;
    uint32_t oldest;
    struct run runs[COALESCED_FLOWS];
    /* For packets that pass without stopping. */
    struct run passing;
};

/* `tcp` and `udp` say which runs the sink can take. */
void coalescer_start(struct coalescer *coalescer, bool tcp, bool udp, coalesce_sink *sink, void *context);

/* Add a packet that packet_read accepted. Its bytes must stay until its run reached the sink. */
void coalescer_add(struct coalescer *coalescer, const struct packet *packet, void *owner);

/* Finish all runs. */
void coalescer_flush(struct coalescer *coalescer);

/* The header of run->offload and run->headers for all of its packets; called for runs of more than one. */
void run_finish(struct run *run);

#endif
