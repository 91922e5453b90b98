"""What a server imports before it serves: all that it may need, so that it imports nothing while it serves.

What it would import then may be on the very volume that waits for it, or of another version than the rest of it.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

# Below a server, besides what its own modules import at their beginning.
_LAYERS = ("ondisk", "blockdev", "ext", "snapshot")
# What others import when something of them is first asked for.
_OTHERS = ("encodings.latin_1", "numpy.ma")


def everything() -> None:
    """Import all modules of the layers below."""
    for layer in _LAYERS:
        for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / layer)]):
            import_module(f"extsnap.{layer}.{module.name}")
    for name in _OTHERS:
        import_module(name)
