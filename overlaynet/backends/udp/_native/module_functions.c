/* The pure functions that the engine is made of, for tests in Python. */
#include "module.h"

#include <stdlib.h>
#include <string.h>

/* segment(data): the packets that what a TUN device gave (header of virtio, and packet) stands for; or the number of the
 * reason to drop it. */
PyObject *module_segment(PyObject *module, PyObject *argument)
{
    (void)module;
    char *given;
    Py_ssize_t size;
    struct offload_header offload;
    if (PyBytes_AsStringAndSize(argument, &given, &size) < 0)
        return NULL;
    if (size < (Py_ssize_t)sizeof offload)
        return PyLong_FromLong(DROP_MALFORMED);
    memcpy(&offload, given, sizeof offload);
    size -= (Py_ssize_t)sizeof offload;
    uint8_t *data = malloc((size_t)size + 1);
    if (data == NULL)
        return PyErr_NoMemory();
    memcpy(data, given + sizeof offload, (size_t)size);
    struct segments segments;
    enum drop refused = segments_read(&offload, data, (size_t)size, &segments);
    if (refused != DROP_NONE) {
        free(data);
        return PyLong_FromLong(refused);
    }
    PyObject *packets = PyList_New(0);
    for (uint32_t i = 0; packets != NULL && i < segments.count; i++) {
        uint8_t header[LARGEST_HEADERS], *payload;
        uint32_t length;
        segments_cut(&segments, i, header, &payload, &length);
        PyObject *head = PyBytes_FromStringAndSize((char *)header, segments.header_length);
        PyObject *rest = PyBytes_FromStringAndSize((char *)payload, length);
        PyObject *whole = head != NULL && rest != NULL ? PySequence_Concat(head, rest) : NULL;
        if (whole == NULL || PyList_Append(packets, whole) < 0)
            Py_CLEAR(packets);
        Py_XDECREF(head);
        Py_XDECREF(rest);
        Py_XDECREF(whole);
    }
    free(data);
    return packets;
}

static void append_run(void *context, struct run *run)
{
    PyObject **runs = context;
    if (*runs == NULL)
        return;
    size_t size = sizeof run->offload + (run->count > 1 ? run->size : run->bytes);
    uint8_t *bytes = malloc(size), *at = bytes;
    PyObject *whole = NULL;
    if (bytes != NULL) {
        struct offload_header none = {0};
        memcpy(at, run->count > 1 ? &run->offload : &none, sizeof none);
        at += sizeof none;
        if (run->count > 1) {
            memcpy(at, run->headers, run->header_length);
            at += run->header_length;
            for (uint32_t i = 0; i < run->count; i++) {
                memcpy(at, run->payload[i].iov_base, run->payload[i].iov_len);
                at += run->payload[i].iov_len;
            }
        } else {
            memcpy(at, (uint8_t *)run->payload[0].iov_base - run->header_length, run->bytes);
        }
        whole = PyBytes_FromStringAndSize((char *)bytes, (Py_ssize_t)size);
        free(bytes);
    } else {
        PyErr_NoMemory();
    }
    if (whole == NULL || PyList_Append(*runs, whole) < 0)
        Py_CLEAR(*runs);
    Py_XDECREF(whole);
}

/* coalesce(packets): what is written to a TUN device for them, each with its header of virtio. */
PyObject *module_coalesce(PyObject *module, PyObject *argument)
{
    (void)module;
    if (!PyList_Check(argument)) {
        PyErr_SetString(PyExc_TypeError, "a list of bytes is wanted");
        return NULL;
    }
    struct coalescer *coalescer = malloc(sizeof *coalescer);
    PyObject *runs = PyList_New(0);
    if (coalescer == NULL || runs == NULL) {
        free(coalescer);
        Py_XDECREF(runs);
        return PyErr_NoMemory();
    }
    memset(coalescer, 0, sizeof *coalescer);
    coalescer_start(coalescer, true, true, append_run, &runs);
    for (Py_ssize_t i = 0; i < PyList_Size(argument); i++) {
        char *data;
        Py_ssize_t size;
        struct packet packet;
        if (PyBytes_AsStringAndSize(PyList_GetItem(argument, i), &data, &size) < 0) {
            Py_CLEAR(runs);
            break;
        }
        if (packet_read((uint8_t *)data, (size_t)size, &packet) != DROP_NONE) {
            PyErr_SetString(PyExc_ValueError, "not a whole IP packet");
            Py_CLEAR(runs);
            break;
        }
        coalescer_add(coalescer, &packet, NULL);
    }
    coalescer_flush(coalescer);
    free(coalescer);
    return runs;
}

/* Who has an address in a table: the number of a peer, -1 for nobody, -2 for this node. With an outer address: of those peers
 * that are reached there; else of all, as for a packet that is to be sent. */
static long holder_of(const struct table *table, const uint8_t *outer, size_t outer_size, const uint8_t *address, size_t size)
{
    uint32_t scope = SCOPE_DESTINATIONS, holder;
    unsigned version = size == 4 ? 4 : 6, outer_version = outer_size == 4 ? 4 : 6;
    if (outer_size != 0) {
        scope = table_find(table, SCOPE_SENDERS, outer_version, address_read(outer, outer_version));
        if (scope == NOBODY)
            return -1;
    }
    struct address wanted = address_read(address, version);
    holder = table_find(table, scope, version, wanted);
    if (holder == NOBODY)
        return outer_size == 0 && table_find(table, SCOPE_OWN, version, wanted) != NOBODY ? -2 : -1;
    /* Peers that are not served have no place in the table; so a peer's number is in its counters. */
    return (long)counter_value(&table->peers[holder].counters->sent_packets);
}

/* find(own, peers, queries): who has each address, as in holder_of; a query is a pair of an outer address, or b"", and an
 * inner one. */
PyObject *module_find(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer own_buffer, peers_buffer;
    PyObject *queries, *found = NULL;
    if (!PyArg_ParseTuple(arguments, "y*y*O!", &own_buffer, &peers_buffer, &PyList_Type, &queries))
        return NULL;
    struct subnet own[2];
    uint32_t count = (uint32_t)(peers_buffer.len / PEER_BYTES), made = 0;
    struct peer_counters **counters = NULL;
    struct table *table = NULL;
    struct peer_entry *entries = packed_entries(&own_buffer, &peers_buffer, UINT32_MAX, own);
    if (entries == NULL)
        goto done;
    counters = calloc(count + 1, sizeof *counters);
    for (; counters != NULL && made < count && (counters[made] = calloc(1, sizeof **counters)) != NULL; made++) {
        entries[made].counters = made;
        atomic_init(&counters[made]->sent_packets, made);
    }
    if (made == count && counters != NULL)
        table = table_new(own, entries, count, counters, count, true, true);
    if (table == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    found = PyList_New(0);
    for (Py_ssize_t i = 0; found != NULL && i < PyList_Size(queries); i++) {
        const char *outer, *address;
        Py_ssize_t outer_size, size;
        PyObject *holder = NULL;
        if (PyArg_ParseTuple(PyList_GetItem(queries, i), "y#y#", &outer, &outer_size, &address, &size)) {
            if ((size != 4 && size != 16) || (outer_size != 0 && outer_size != 4 && outer_size != 16))
                PyErr_SetString(PyExc_ValueError, "an address has 4 or 16 bytes");
            else
                holder = PyLong_FromLong(holder_of(table, (const uint8_t *)outer, (size_t)outer_size,
                                                   (const uint8_t *)address, (size_t)size));
        }
        if (holder == NULL || PyList_Append(found, holder) < 0)
            Py_CLEAR(found);
        Py_XDECREF(holder);
    }
done:
    if (table == NULL)
        while (made > 0)
            free(counters[--made]);
    table_free(table);
    free(counters);
    free(entries);
    PyBuffer_Release(&own_buffer);
    PyBuffer_Release(&peers_buffer);
    return found;
}
