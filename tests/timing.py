"""Bounds on processor time, for code that reads hostile text."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """The block takes no more of this thread's processor time, on a busy machine neither.

    What is there already is kept from the garbage collector: after thousands of tests, one look
    through it takes a second and more.
    """
    gc.freeze()
    try:
        before = time.thread_time()
        yield
        spent = time.thread_time() - before
    finally:
        gc.unfreeze()
    assert spent < seconds
