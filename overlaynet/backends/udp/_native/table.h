/* The peer table: who has an address. Built once and never changed, so that it is read without a lock.
 *
 * All prefixes are in one hash table. A scope tells the questions apart: the peers behind one outer address, say, are
 * looked for in the scope of that address. A look-up asks once for each prefix length that its scope has, longest first.
 */
#ifndef OVERLAYNET_TABLE_H
#define OVERLAYNET_TABLE_H

#include <netinet/in.h>
#include <stdatomic.h>

#include "packet.h"

/* Inner packets and their bytes. Written by the packet path alone, and read by anyone, whence the atomics; owned by
 * the tables that refer to it. */
struct peer_counters {
    _Atomic uint64_t sent_packets, sent_bytes, received_packets, received_bytes;
    unsigned references;
};

struct peer {
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } endpoint;
    socklen_t endpoint_size;
    struct peer_counters *counters;
    /* Nanoseconds of the monotonic clock before which no segmentation offload is tried towards this peer. */
    _Atomic uint64_t segment_after;
};

enum { SCOPE_DESTINATIONS, SCOPE_OWN, SCOPE_SENDERS, SCOPE_FIRST_SENDER };
enum { NOBODY = UINT32_MAX };

struct prefix {
    struct address address;
    uint32_t scope;
    uint32_t holder;
    uint8_t version, length;
    bool taken;
};

/* Which prefix lengths a scope has, as a bit each. */
struct lengths {
    uint64_t bits[2][3];
};

struct table {
    struct table *next_retired;
    uint32_t peer_count, counters_count, scope_count, slots;
    struct peer *peers;
    struct peer_counters **counters;
    struct prefix *prefixes;
    struct lengths *scopes;
    /* Which versions of IP this node has a subnet of, and the addresses that its errors come from. */
    bool carries4, carries6;
    uint8_t own4[4], own6[16];
};

/* What a table is made from. */
struct subnet {
    uint8_t length; /* NO_SUBNET for none */
    uint8_t address[16];
};
enum { NO_SUBNET = 255 };
struct peer_entry {
    uint8_t version; /* of the address */
    uint16_t port;
    uint32_t counters;
    uint8_t address[16];
    struct subnet subnet4, subnet6;
};

/* A table of `count` peers; those whose outer address is of a version that is not served are left out. Of two entries
 * with one subnet the first counts. `counters` are the blocks that entries refer to; the table takes a reference to each.
 * NULL without memory. */
struct table *table_new(const struct subnet own[2], const struct peer_entry *entries, uint32_t count,
                        struct peer_counters **counters, uint32_t counters_count, bool serves4, bool serves6);

void table_free(struct table *table);

/* The holder of the longest prefix of `address` in a scope, or NOBODY. */
uint32_t table_find(const struct table *table, uint32_t scope, unsigned version, struct address address);

#endif
