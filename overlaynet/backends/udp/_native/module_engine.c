/* The type Engine: arguments, counters and the life of an engine, for Python.
 *
 * It is not for use by itself: native_engine.py wraps it. No method but `run` releases the GIL, which is the lock between them.
 */
#include "module.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    struct engine *engine;
    int started, running;
} EngineObject;

static PyObject *engine_closed(void)
{
    PyErr_SetString(PyExc_ValueError, "the engine is closed");
    return NULL;
}

static int read_descriptor(PyObject *number, int *descriptor)
{
    long value = PyLong_AsLong(number);
    if (value == -1 && PyErr_Occurred())
        return -1;
    if (value < INT_MIN || value > INT_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a descriptor is an int");
        return -1;
    }
    *descriptor = (int)value;
    return 0;
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
    int mtu, offload, device_header;
    struct queue queues[WORKERS];
    PyObject *sequence;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!ipi", names, &PyTuple_Type, &sequence, &mtu, &offload,
                                     &device_header))
        return NULL;
    if (mtu < 1) {
        PyErr_SetString(PyExc_ValueError, "an MTU is at least 1");
        return NULL;
    }
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
    self->engine = engine_new(queues, (unsigned)count, (uint32_t)mtu, offload, device_header);
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
    entries = packed_entries(&own_buffer, &peers_buffer, counters_count, own);
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
        PyObject *item = Py_BuildValue("(KKKK)", counter_value(&each->sent_packets), counter_value(&each->sent_bytes),
                                       counter_value(&each->received_packets), counter_value(&each->received_bytes));
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

PyType_Spec engine_spec = {
    "overlaynet.backends.udp._native.Engine", sizeof(EngineObject), 0, Py_TPFLAGS_DEFAULT, engine_slots};
