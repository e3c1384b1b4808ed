"""The version that serves. When its alias moves, the next one is loaded beside it and takes its place between two requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qvgen.hub.reference import Reference
from qvgen.hub.resolve import fetch, find
from qvgen.hub.store import remember
from qvgen.hub.tracking import NotRegisteredError, Registered, UnreachableError, find_tracking, open_client, read_version

LONGEST_PAUSE = 3600.0  # seconds until a refused version is tried again: its files may be gigabytes
log = logging.getLogger("qvgen.serving")


@dataclass(frozen=True)
class Serving:
    """A version, and what answers for it."""

    registered: Registered
    model: Any

    def __str__(self) -> str:
        return f"{self.registered.name}/{self.registered.version}"


class Follower:
    """What serves `reference`, loaded by `load` from a folder whose files have the registry's hashes.

    `tell` gets what came of each look at the registry: switched, unchanged, refused, unreachable. Raises ValueError if the
    first version is not registered, or its files cannot be had.
    """

    def __init__(
        self, reference: Reference, load: Callable[[Registered, Any], Any], tell: Callable[[str, Serving], object]
    ) -> None:
        self.reference, self._load, self._tell = reference, load, tell
        self._uri = find_tracking()
        self._client = open_client(self._uri)
        first = find(reference)
        self.serving = Serving(first, load(first, fetch(first)))
        self._refused: tuple[int, float, float] | None = None  # version, when to try again, pause before that
        self._say("switched", f"{self.serving} serves")

    def look(self, interval: float) -> None:
        """Ask the registry once. A version that cannot be had, is not what was registered, or cannot be loaded is refused, and
        the old one goes on serving."""
        try:
            found = read_version(self._client, self.reference)
        except (UnreachableError, NotRegisteredError) as error:
            self._say("unreachable", f"{error}; {self.serving} goes on serving", logging.WARNING)
            return
        except ValueError as error:
            self._say("refused", f"{error}; {self.serving} goes on serving", logging.ERROR)
            return
        if found.version == self.serving.registered.version:
            self._refused = None
            self._tell("unchanged", self.serving)
            return
        pause = interval
        if self._refused is not None and self._refused[0] == found.version:
            if time.monotonic() < self._refused[1]:
                return
            pause = min(2 * self._refused[2], LONGEST_PAUSE)
        try:
            new = Serving(found, self._load(found, fetch(found, self._uri)))
        except Exception as error:  # of whatever reads a model: none may take the server down
            self._refused = (found.version, time.monotonic() + pause, pause)
            message = (
                f"refused {found.name}/{found.version}: {error}; {self.serving} goes on serving, next try in {pause:.0f} s"
            )
            self._say("refused", message, logging.ERROR)
            return
        remember(self._uri, self.reference, found)
        old, self.serving, self._refused = self.serving, new, None
        self._say("switched", f"{new} serves instead of {old}")

    def start(self, interval: float) -> None:
        """Look every `interval` seconds, in a thread, until the process ends. A version that is named by its number stays."""
        if self.reference.alias is not None:
            threading.Thread(target=self._go_on, args=(interval,), daemon=True, name="registry").start()

    def _go_on(self, interval: float) -> None:
        while True:
            time.sleep(interval)
            try:
                self.look(interval)
            except Exception:  # a library's own error, such as of a full cache: the next look may do better
                log.exception("the registry could not be looked at; %s goes on serving", self.serving)

    def _say(self, outcome: str, message: str, level: int = logging.INFO) -> None:
        log.log(level, "%s", message)
        self._tell(outcome, self.serving)
