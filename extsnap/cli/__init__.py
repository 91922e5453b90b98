"""The command line: options in, one call to the layer below, a table or JSON out."""

from __future__ import annotations

import contextlib
import gc
import signal
from typing import Any


def interruptible(by_exception: bool) -> None:
    """Have Ctrl-C raise KeyboardInterrupt, or end the process: while the program is loaded there is nothing to undo.

    A handler of somebody else's, or one that ignores it, stays.
    """
    handlers: list[Any] = [signal.SIG_DFL, signal.default_int_handler]
    wanted, other = handlers[by_exception], handlers[not by_exception]
    if signal.getsignal(signal.SIGINT) is other:
        with contextlib.suppress(ValueError):  # not the main thread: it has no say in this
            signal.signal(signal.SIGINT, wanted)


# What is imported stays: looking through it for garbage again and again takes a tenth of the time of `extsnap list`.
gc.set_threshold(200_000, 20, 100)
interruptible(by_exception=False)  # until `app` is loaded
