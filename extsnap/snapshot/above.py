"""What a volume asks of whatever serves it; the server imports this without the engine."""

from __future__ import annotations

from typing import Protocol


class Above(Protocol):
    """A server, as far as the volume below it is concerned."""

    def say(self, message: str) -> None:
        """Tell whoever looks after the server one line."""

    def in_use(self) -> bool:
        """Whether somebody writes to the base volume: then only they edit its filesystem."""

    def open_views(self) -> list[str]:
        """Names of the snapshots that somebody reads."""

    def snapshots_changed(self) -> None:
        """Snapshots went away in the middle of a write."""
