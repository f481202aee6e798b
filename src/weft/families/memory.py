"""Memory that goes back to the system while a model is read."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
SMALL = 1 << 18
LARGEST = 32 << 20  # where glibc's own threshold, which follows what is freed, ends


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Let large tensors have pages of their own, which glibc gives back when they are freed.

    Else they share its heap with those that stay: read, cast and freed by turns, they leave holes that grow to twice
    the model. Other C libraries give back, or are not Linux'.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)
