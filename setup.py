"""The native packet engine, which pyproject.toml has no stable way to declare; all else is there."""

import os

from setuptools import Extension, setup

SOURCES = "overlaynet/backends/udp/_native"

# Optional: without a compiler the package installs all the same, and the engine in plain Python carries the packets.
native = Extension(
    "overlaynet.backends.udp._native",
    [
        f"{SOURCES}/{name}.c"
        for name in (
            "coalesce",
            "engine",
            "module",
            "module_engine",
            "module_functions",
            "module_table",
            "packet",
            "receive",
            "segment",
            "send",
            "table",
            "worker",
        )
    ],
    depends=[
        f"{SOURCES}/{name}.h"
        for name in ("checksum", "coalesce", "engine", "module", "packet", "segment", "table", "worker")
    ],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    extra_compile_args=["-std=c11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
    optional=True,
)
if os.environ.get("OVERLAYNET_NO_EXTENSION") == "1":
    setup()  # a wheel for any platform
else:
    setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp311"}})
