"""Numpy as the programs load it: without the threads of its linear algebra, of which nothing here makes use.

Starting them takes a tenth of the time of ``extsnap list``.  Who imports the package keeps numpy as it is.
"""

from __future__ import annotations

import os
import sys

_VARIABLE = "OPENBLAS_NUM_THREADS"


def load() -> None:
    """Import numpy; the environment, which other programs get, stays as it is."""
    if "numpy" in sys.modules or _VARIABLE in os.environ:
        return
    os.environ[_VARIABLE] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[_VARIABLE]
