"""The demonstration: the documented scenario, run for real in network namespaces and shown in a terminal."""
