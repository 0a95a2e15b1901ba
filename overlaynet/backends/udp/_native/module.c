/* The module overlaynet.backends.udp._native: the type Engine (module_engine.c), what it reads (module_table.c), and functions
 * for tests (module_functions.c). */
#include "module.h"

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
