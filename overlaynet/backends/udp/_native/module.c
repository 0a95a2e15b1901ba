/* The module overlaynet.backends.udp._native: the engine, and the pure functions that it is made of, for Python.
 *
 * Within CPython's limited API of 3.11, so that one build serves all later versions. `Engine` is not for use by itself:
 * native_engine.py wraps it. No method but `run` releases the GIL, which is the lock between them.
 */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <errno.h>
#include <stdlib.h>

#include "engine.h"

typedef struct {
    PyObject_HEAD
    struct engine *engine;
    int started, running;
} EngineObject;

/* One peer as native_engine.py packs it: "=BBBxHxxI16s4s16s". */
enum { PEER_BYTES = 48, OWN_BYTES = 22 };

static PyObject *engine_closed(void)
{
    PyErr_SetString(PyExc_ValueError, "the engine is closed");
    return NULL;
}

static int read_descriptor(PyObject *number, int *descriptor)
{
    long value = PyLong_AsLong(number);
    *descriptor = (int)value;
    return value == -1 && PyErr_Occurred() ? -1 : 0;
}

/* A queue from (device, (socket, ...)). */
static int read_queue(PyObject *item, struct queue *queue)
{
    PyObject *sockets;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "a queue is a tuple of a descriptor and a tuple of descriptors");
        return -1;
    }
    if (!PyArg_ParseTuple(item, "iO!", &queue->tun, &PyTuple_Type, &sockets))
        return -1;
    if (PyTuple_Size(sockets) > SOCKETS) {
        PyErr_SetString(PyExc_ValueError, "a queue has at most one socket for each IP version");
        return -1;
    }
    queue->socket_count = (unsigned)PyTuple_Size(sockets);
    for (unsigned i = 0; i < queue->socket_count; i++)
        if (read_descriptor(PyTuple_GetItem(sockets, i), &queue->sockets[i]) != 0)
            return -1;
    return 0;
}

static PyObject *engine_type_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"queues", "mtu", "offload", "device_header", NULL};
    int offload, device_header;
    unsigned mtu;
    struct queue queues[WORKERS];
    PyObject *sequence;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!Ipi", names, &PyTuple_Type, &sequence, &mtu, &offload,
                                     &device_header))
        return NULL;
    Py_ssize_t count = PyTuple_Size(sequence);
    if (count < 1 || count > WORKERS) {
        PyErr_Format(PyExc_ValueError, "an engine has 1 to %d queues", WORKERS);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (read_queue(PyTuple_GetItem(sequence, i), &queues[i]) != 0)
            return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    EngineObject *self = (EngineObject *)allocate(type, 0);
    if (self == NULL)
        return NULL;
    self->engine = engine_new(queues, (unsigned)count, mtu, offload, device_header);
    if (self->engine == NULL) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void engine_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    engine_free(((EngineObject *)object)->engine);
    release(object);
    Py_DECREF(type);
}

/* start(): (threads, errno of a refusal) */
static PyObject *engine_method_start(PyObject *object, PyObject *unused)
{
    (void)unused;
    EngineObject *self = (EngineObject *)object;
    if (self->engine == NULL || self->started || engine_table(self->engine) == NULL) {
        PyErr_SetString(PyExc_ValueError, "an engine runs once, with a table, before it is closed");
        return NULL;
    }
    int refusal;
    self->started = 1;
    unsigned threads = engine_start(self->engine, &refusal);
    return Py_BuildValue("(Ii)", threads, refusal);
}

static PyObject *engine_method_run(PyObject *object, PyObject *unused)
{
    (void)unused;
    EngineObject *self = (EngineObject *)object;
    int ended, error;
    if (self->engine == NULL || !self->started || self->running) {
        PyErr_SetString(PyExc_ValueError, "an engine runs once, after it was started");
        return NULL;
    }
    self->running = 1;
    Py_BEGIN_ALLOW_THREADS
    ended = engine_run(self->engine, &error);
    Py_END_ALLOW_THREADS
    self->running = 0;
    return Py_BuildValue("(ii)", ended, error);
}

static PyObject *engine_method_stop(PyObject *object, PyObject *unused)
{
    (void)unused;
    EngineObject *self = (EngineObject *)object;
    if (self->engine != NULL)
        engine_stop(self->engine);
    Py_RETURN_NONE;
}

static PyObject *engine_method_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    EngineObject *self = (EngineObject *)object;
    if (self->running) {
        PyErr_SetString(PyExc_ValueError, "the engine runs; stop it first");
        return NULL;
    }
    engine_free(self->engine);
    self->engine = NULL;
    Py_RETURN_NONE;
}

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

/* What a table is made from, out of what native_engine.py packs; NULL with an exception set. The caller frees the entries. */
static struct peer_entry *read_entries(const Py_buffer *own_buffer, const Py_buffer *peers_buffer, uint32_t counters_count,
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

/* set_table(own, peers, kept): for each block of counters, `kept` has the index of the one in the table before that it
 * continues, or -1. */
static PyObject *engine_method_set_table(PyObject *object, PyObject *arguments)
{
    EngineObject *self = (EngineObject *)object;
    Py_buffer own_buffer, peers_buffer, kept_buffer;
    if (!PyArg_ParseTuple(arguments, "y*y*y*", &own_buffer, &peers_buffer, &kept_buffer))
        return NULL;
    PyObject *result = NULL;
    struct peer_entry *entries = NULL;
    struct peer_counters **counters = NULL;
    struct subnet own[2];
    uint32_t count = (uint32_t)(peers_buffer.len / PEER_BYTES);
    uint32_t counters_count = (uint32_t)(kept_buffer.len / 4), made = 0;
    const uint8_t *kept = kept_buffer.buf;

    if (self->engine == NULL) {
        engine_closed();
        goto done;
    }
    if (kept_buffer.len % 4) {
        PyErr_SetString(PyExc_ValueError, "the table is not packed as it should be");
        goto done;
    }
    const struct table *before = engine_table(self->engine);
    entries = read_entries(&own_buffer, &peers_buffer, counters_count, own);
    if (entries == NULL)
        goto done;
    counters = calloc(counters_count + 1, sizeof *counters);
    if (counters == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (; made < counters_count; made++) {
        int32_t index;
        memcpy(&index, kept + (size_t)made * 4, 4);
        if (before != NULL && index >= 0 && (uint32_t)index < before->counters_count)
            counters[made] = before->counters[index];
        else
            counters[made] = calloc(1, sizeof **counters);
        if (counters[made] == NULL) {
            PyErr_NoMemory();
            goto done;
        }
    }
    bool v4, v6;
    engine_serves(self->engine, &v4, &v6);
    struct table *table = table_new(own, entries, count, counters, counters_count, v4, v6);
    if (table == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    engine_set_table(self->engine, table);
    result = Py_None;
    Py_INCREF(result);
done:
    if (result == NULL)
        for (uint32_t i = 0; i < made; i++)
            if (counters[i]->references == 0)
                free(counters[i]);
    free(entries);
    free(counters);
    PyBuffer_Release(&own_buffer);
    PyBuffer_Release(&peers_buffer);
    PyBuffer_Release(&kept_buffer);
    return result;
}

static unsigned long long load(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

/* counters(): ([(sent packets, sent bytes, received packets, received bytes), ...], [drops, ...], unreachables,
 * [(state, reason, failures), ...]) */
static PyObject *engine_method_counters(PyObject *object, PyObject *unused)
{
    (void)unused;
    EngineObject *self = (EngineObject *)object;
    if (self->engine == NULL)
        return engine_closed();
    const struct table *table = engine_table(self->engine);
    uint32_t count = table != NULL ? table->counters_count : 0;
    PyObject *peers = PyList_New(count), *drops = PyList_New(DROPS), *offloads = PyList_New(OFFLOADS);
    if (peers == NULL || drops == NULL || offloads == NULL)
        goto failed;
    for (uint32_t i = 0; i < count; i++) {
        const struct peer_counters *each = table->counters[i];
        PyObject *item = Py_BuildValue("(KKKK)", load(&each->sent_packets), load(&each->sent_bytes),
                                       load(&each->received_packets), load(&each->received_bytes));
        if (item == NULL || PyList_SetItem(peers, i, item) < 0)
            goto failed;
    }
    for (int reason = 0; reason < DROPS; reason++) {
        PyObject *item = PyLong_FromUnsignedLongLong(engine_drops(self->engine, reason));
        if (item == NULL || PyList_SetItem(drops, reason, item) < 0)
            goto failed;
    }
    for (int offload = 0; offload < OFFLOADS; offload++) {
        int state, reason;
        uint64_t failures;
        engine_offload(self->engine, offload, &state, &reason, &failures);
        PyObject *item = Py_BuildValue("(iiK)", state, reason, (unsigned long long)failures);
        if (item == NULL || PyList_SetItem(offloads, offload, item) < 0)
            goto failed;
    }
    return Py_BuildValue("(NNKN)", peers, drops, (unsigned long long)engine_unreachables(self->engine), offloads);
failed:
    Py_XDECREF(peers);
    Py_XDECREF(drops);
    Py_XDECREF(offloads);
    return NULL;
}

static PyMethodDef engine_methods[] = {
    {"start", engine_method_start, METH_NOARGS, "Make threads; return their number with run's, and why there are no more."},
    {"run", engine_method_run, METH_NOARGS, "Carry packets; return how that ended, and an errno."},
    {"stop", engine_method_stop, METH_NOARGS, "Make run return."},
    {"close", engine_method_close, METH_NOARGS, "Free everything. Idempotent."},
    {"set_table", engine_method_set_table, METH_VARARGS, "Replace the peer table."},
    {"counters", engine_method_counters, METH_NOARGS, "Counts by peer, drops, ICMP errors, offloads."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot engine_slots[] = {
    {Py_tp_new, engine_type_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_methods, engine_methods},
    {0, NULL},
};

static PyType_Spec engine_spec = {
    "overlaynet.backends.udp._native.Engine", sizeof(EngineObject), 0, Py_TPFLAGS_DEFAULT, engine_slots};

/* ---- The pure functions, for tests. */

/* segment(data): the packets that what a TUN device gave (header of virtio, and packet) stands for; or the number of the
 * reason to drop it. */
static PyObject *module_segment(PyObject *module, PyObject *argument)
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
static PyObject *module_coalesce(PyObject *module, PyObject *argument)
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
    return (long)load(&table->peers[holder].counters->sent_packets);
}

/* find(own, peers, queries): who has each address, as in holder_of; a query is a pair of an outer address, or b"", and an
 * inner one. */
static PyObject *module_find(PyObject *module, PyObject *arguments)
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
    struct peer_entry *entries = read_entries(&own_buffer, &peers_buffer, UINT32_MAX, own);
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

static PyMethodDef module_methods[] = {
    {"segment", module_segment, METH_O, "Cut what a TUN device gave into packets."},
    {"coalesce", module_coalesce, METH_O, "Put packets together as for a TUN device."},
    {"find", module_find, METH_VARARGS, "Who has each address in a peer table."},
    {NULL, NULL, 0, NULL},
};

static int module_execute(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &engine_spec, NULL);
    if (type == NULL)
        return -1;
    int failed = PyModule_AddObjectRef(module, "Engine", type);
    Py_DECREF(type);
    return failed;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, (void *)module_execute}, {0, NULL}};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_native", "The native packet engine of the udp backend.", 0, module_methods, module_slots,
    NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module_definition);
}
