"""Modules of this package that most commands do without: imported when something of them is first asked for.

A server has everything imported before it serves (`extsnap.serve.loading`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Later:
    """Stands for ``extsnap.snapshot.NAME``."""

    def __init__(self, name: str) -> None:
        self._name = f"extsnap.snapshot.{name}"

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)
