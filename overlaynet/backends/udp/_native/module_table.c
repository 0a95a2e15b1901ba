/* The peer table as Python packs it, read with suspicion. */
#include "module.h"

#include <stdlib.h>
#include <string.h>

static int is_length(unsigned length, unsigned most)
{
    return length == NO_SUBNET || length <= most;
}

static int read_own(const uint8_t *bytes, struct subnet own[2])
{
    memset(own, 0, 2 * sizeof *own);
    own[0].length = bytes[0];
    own[1].length = bytes[1];
    memcpy(own[0].address, bytes + 2, 4);
    memcpy(own[1].address, bytes + 6, 16);
    return is_length(bytes[0], 32) && is_length(bytes[1], 128);
}

static int read_peer(const uint8_t *bytes, struct peer_entry *entry, uint32_t counters_count)
{
    entry->version = bytes[0];
    entry->subnet4.length = bytes[1];
    entry->subnet6.length = bytes[2];
    memcpy(&entry->port, bytes + 4, 2);
    memcpy(&entry->counters, bytes + 8, 4);
    memcpy(entry->address, bytes + 12, 16);
    memcpy(entry->subnet4.address, bytes + 28, 4);
    memcpy(entry->subnet6.address, bytes + 32, 16);
    return (entry->version == 4 || entry->version == 6) && is_length(bytes[1], 32) && is_length(bytes[2], 128) &&
           entry->counters < counters_count;
}

struct peer_entry *packed_entries(const Py_buffer *own_buffer, const Py_buffer *peers_buffer, uint32_t counters_count,
                                  struct subnet own[2])
{
    if (own_buffer->len != OWN_BYTES || peers_buffer->len % PEER_BYTES) {
        PyErr_SetString(PyExc_ValueError, "the table is not packed as it should be");
        return NULL;
    }
    uint32_t count = (uint32_t)(peers_buffer->len / PEER_BYTES);
    struct peer_entry *entries = calloc(count + 1, sizeof *entries);
    if (entries == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    int right = read_own(own_buffer->buf, own);
    for (uint32_t i = 0; i < count && right; i++)
        right = read_peer((const uint8_t *)peers_buffer->buf + (size_t)i * PEER_BYTES, &entries[i], counters_count);
    if (!right) {
        free(entries);
        PyErr_SetString(PyExc_ValueError, "the table has a peer or subnet that cannot be");
        return NULL;
    }
    return entries;
}
