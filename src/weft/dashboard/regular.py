"""Opening a file of a run: a regular one and nothing else, for a pipe or a device would hold the reader for ever."""

import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO

# A pipe without a writer is opened all the same, to be refused.
FLAGS = os.O_RDONLY | (os.O_BINARY if sys.platform == "win32" else os.O_NONBLOCK)


def opened(path: Path) -> BinaryIO:
    """The file for reading. Raises OSError, also for what is no regular file."""
    handle = os.open(path, FLAGS)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(f"{path} is no regular file")
