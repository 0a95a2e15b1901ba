"""What ``overlaynet plugins new`` writes: a small package for each axis, under the name ``example``.

The Python files here are real ones, checked and tested like the rest; :mod:`overlaynet.cli._new` puts names in.
"""
