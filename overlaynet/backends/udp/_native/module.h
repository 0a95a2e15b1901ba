/* What the parts of the extension module share. It is within CPython's limited API of 3.11, so that one build serves all later
 * versions. */
#ifndef OVERLAYNET_MODULE_H
#define OVERLAYNET_MODULE_H

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include "engine.h"

/* One peer, and this node's subnets, as native_engine.py packs them: "=BBBxHxxI16s4s16s" and "=BB4s16s". */
enum { PEER_BYTES = 48, OWN_BYTES = 22 };

/* What a table is made from, out of what native_engine.py packs; NULL with an exception set. The caller frees the entries. */
struct peer_entry *packed_entries(const Py_buffer *own_buffer, const Py_buffer *peers_buffer, uint32_t counters_count,
                                  struct subnet own[2]);

static inline unsigned long long counter_value(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

/* The type Engine. */
extern PyType_Spec engine_spec;

/* The functions. */
PyObject *module_segment(PyObject *module, PyObject *argument);
PyObject *module_coalesce(PyObject *module, PyObject *argument);
PyObject *module_find(PyObject *module, PyObject *arguments);

#endif
