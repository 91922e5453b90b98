"""What a server imports before it serves: everything, so that it imports nothing while it serves.

What it would import then may be on the very volume that waits for it, or of another version than the rest of it.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

_PACKAGE, _PROGRAM = "extsnap.", "extsnap.cli"


def everything() -> None:
    """Import all modules of the package but the program's."""
    for module in pkgutil.walk_packages([str(Path(__file__).parents[1])], _PACKAGE):
        if not module.name.startswith(_PROGRAM):
            import_module(module.name)
