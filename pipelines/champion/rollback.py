"""`qvgen rollback` in a project: as everywhere, and the move is sealed in metrics/seal.jsonl, which git keeps."""

from __future__ import annotations

from pathlib import Path

from pipelines.champion.promote import CHAMPION
from qvgen.hub.rollback import Rollback
from qvgen.hub.rollback import rollback as roll_back
from qvgen.params import Params
from stages.record.connection import locked, tracking_uri
from stages.record.seal import seal_promotion


def rollback(home: Path, params: Params, name: str | None, to: int | None, reason: str) -> Rollback:
    """Of `name`, by default register.name. A move that was made elsewhere, or cut short, is sealed now. Raises ValueError."""
    name = name or params.register_.name
    done = roll_back(name, to, reason=reason, uri=tracking_uri(home), alone=locked(home))
    seal_promotion(home, name, CHAMPION, done.record)
    return done
