#include "table.h"

#include <stdlib.h>
#include <string.h>

static struct address cut(struct address address, unsigned length)
{
    if (length == 0)
        return (struct address){0, 0};
    if (length <= 64)
        return (struct address){address.high & ~UINT64_C(0) << (64 - length), 0};
    return (struct address){address.high, address.low & ~UINT64_C(0) << (128 - length)};
}

static uint32_t slot_of(const struct table *table, uint32_t scope, unsigned version, unsigned length, struct address address)
{
    uint64_t hash = address.high * 0x9E3779B97F4A7C15u ^ address.low * 0xC2B2AE3D27D4EB4Fu;
    hash ^= (uint64_t)scope * 0x165667B19E3779F9u ^ version << 8 ^ length;
    hash ^= hash >> 29;
    hash *= 0xBF58476D1CE4E5B9u;
    return (uint32_t)(hash >> 32) & (table->slots - 1);
}

/* The slot that holds the prefix, or the free one where it belongs. */
static struct prefix *probe(const struct table *table, uint32_t scope, unsigned version, unsigned length, struct address address)
{
    uint32_t slot = slot_of(table, scope, version, length, address);
    for (;; slot = (slot + 1) & (table->slots - 1)) {
        struct prefix *prefix = &table->prefixes[slot];
        if (!prefix->taken || (prefix->scope == scope && prefix->version == version && prefix->length == length &&
                               same_address(prefix->address, address)))
            return prefix;
    }
}

uint32_t table_find(const struct table *table, uint32_t scope, unsigned version, struct address address)
{
    const uint64_t *bits = table->scopes[scope].bits[version == 6];
    for (int word = 2; word >= 0; word--) {
        uint64_t left = bits[word];
        while (left != 0) {
            unsigned bit = 63 - (unsigned)__builtin_clzll(left), length = (unsigned)word * 64 + bit;
            left &= ~(UINT64_C(1) << bit);
            const struct prefix *prefix = probe(table, scope, version, length, cut(address, length));
            if (prefix->taken)
                return prefix->holder;
        }
    }
    return NOBODY;
}

/* Who has the prefix from now on: the holder given, or the one that had it before. */
static uint32_t add(struct table *table, uint32_t scope, unsigned version, unsigned length, struct address address, uint32_t holder)
{
    address = cut(address, length);
    struct prefix *prefix = probe(table, scope, version, length, address);
    if (!prefix->taken) {
        *prefix = (struct prefix){address, scope, holder, (uint8_t)version, (uint8_t)length, true};
        table->scopes[scope].bits[version == 6][length / 64] |= UINT64_C(1) << length % 64;
    }
    return prefix->holder;
}

static void add_peer(struct table *table, const struct peer_entry *entry, const struct subnet subnet[2])
{
    uint32_t index = table->peer_count++;
    struct peer *peer = &table->peers[index];
    struct address address = address_read(entry->address, entry->version);
    unsigned whole = entry->version == 4 ? 32 : 128;

    peer->counters = table->counters[entry->counters];
    if (entry->version == 4) {
        peer->endpoint_size = sizeof peer->endpoint.v4;
        peer->endpoint.v4.sin_family = AF_INET;
        peer->endpoint.v4.sin_port = htons(entry->port);
        memcpy(&peer->endpoint.v4.sin_addr, entry->address, 4);
    } else {
        peer->endpoint_size = sizeof peer->endpoint.v6;
        peer->endpoint.v6.sin6_family = AF_INET6;
        peer->endpoint.v6.sin6_port = htons(entry->port);
        memcpy(&peer->endpoint.v6.sin6_addr, entry->address, 16);
    }
    uint32_t sender = add(table, SCOPE_SENDERS, entry->version, whole, address, table->scope_count);
    if (sender == table->scope_count)
        table->scope_count++;
    for (unsigned i = 0; i < 2; i++) {
        if (subnet[i].length == NO_SUBNET)
            continue;
        unsigned version = i == 0 ? 4 : 6;
        struct address network = address_read(subnet[i].address, version);
        add(table, SCOPE_DESTINATIONS, version, subnet[i].length, network, index);
        add(table, sender, version, subnet[i].length, network, index);
    }
}

struct table *table_new(const struct subnet own[2], const struct peer_entry *entries, uint32_t count,
                        struct peer_counters **counters, uint32_t counters_count, bool serves4, bool serves6)
{
    struct table *table = calloc(1, sizeof *table);
    if (table == NULL)
        return NULL;
    /* At most five prefixes for each peer, and no more than half full. */
    uint64_t slots = 16;
    while (slots < ((uint64_t)count * 5 + 4) * 2)
        slots *= 2;
    table->slots = (uint32_t)slots;
    table->scope_count = SCOPE_FIRST_SENDER;
    table->peers = calloc(count + 1, sizeof *table->peers);
    table->counters = calloc(counters_count + 1, sizeof *table->counters);
    table->prefixes = calloc(slots, sizeof *table->prefixes);
    table->scopes = calloc(SCOPE_FIRST_SENDER + count + 1, sizeof *table->scopes);
    if (table->peers == NULL || table->counters == NULL || table->prefixes == NULL || table->scopes == NULL) {
        table_free(table);
        return NULL;
    }
    for (uint32_t i = 0; i < counters_count; i++) {
        table->counters[i] = counters[i];
        counters[i]->references++;
    }
    table->counters_count = counters_count;
    table->carries4 = own[0].length != NO_SUBNET;
    table->carries6 = own[1].length != NO_SUBNET;
    memcpy(table->own4, own[0].address, 4);
    memcpy(table->own6, own[1].address, 16);
    /* This node stands in both tables: what is for itself has come out of the device by mistake. */
    for (unsigned i = 0; i < 2; i++) {
        if (own[i].length == NO_SUBNET)
            continue;
        unsigned version = i == 0 ? 4 : 6;
        struct address network = address_read(own[i].address, version);
        add(table, SCOPE_OWN, version, own[i].length, network, 0);
        add(table, SCOPE_DESTINATIONS, version, own[i].length, network, NOBODY);
    }
    for (uint32_t i = 0; i < count; i++) {
        struct subnet subnet[2] = {entries[i].subnet4, entries[i].subnet6};
        if (!table->carries4)
            subnet[0].length = NO_SUBNET;
        if (!table->carries6)
            subnet[1].length = NO_SUBNET;
        bool served = entries[i].version == 4 ? serves4 : serves6;
        if (served && (subnet[0].length != NO_SUBNET || subnet[1].length != NO_SUBNET))
            add_peer(table, &entries[i], subnet);
    }
    return table;
}

void table_free(struct table *table)
{
    if (table == NULL)
        return;
    for (uint32_t i = 0; i < table->counters_count; i++)
        if (--table->counters[i]->references == 0)
            free(table->counters[i]);
    free(table->peers);
    free(table->counters);
    free(table->prefixes);
    free(table->scopes);
    free(table);
}
