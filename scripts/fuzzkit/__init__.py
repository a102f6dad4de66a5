"""Fuzzing of devices that are served in Python: run it by ``scripts/fuzz``.

::

    build.py     the data plane with libFuzzer and the sanitizers in it     branches.py  which branches Python code takes
    target.py    what a device's target says                                fuzzer.py    one input: a driver's whole life
    ends.py      the host's ends of a device's connections

The C side is ``tests/native/device_fuzzer.c``, targets are ``tests/native/fuzz_*.py``.
"""
