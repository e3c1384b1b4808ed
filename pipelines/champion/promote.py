"""`qvgen promote`: the alias champion goes to a model version that passes the gate, and every move is recorded."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.champion.gate import Rule, evaluate_gate
from pipelines.champion.registry import NotRegisteredError, find_version, metrics_of, open_registry
from qvgen.hub.promotions import OvertakenError, alias_version, move_alias, promotions
from qvgen.params import Params, load_params
from stages.record.seal import seal_promotion

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
NOT_APPLICABLE = "not_applicable"  # entry of metrics/evaluate.json, and tag of the version
PROMOTE_SECONDS = 120.0  # that the end of a run may wait for the registry, in all
ATTEMPTS = 5  # to decide before another host does


@dataclass(frozen=True)
class Outcome:
    """The result of a request to promote."""

    name: str
    version: int
    champion: int | None  # before
    ok: bool  # whether `version` is champion now
    moved: bool
    rules: tuple[Rule, ...]
    message: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON, which has no NaN: a value that was not measured is None."""
        rules = [
            {"rule": r.name, "value": r.known, "limit": r.limit_text, "ok": r.ok, "applies": r.applies} for r in self.rules
        ]
        fields = ("name", "version", "champion", "ok", "moved", "message")
        return {field: getattr(self, field) for field in fields} | {"rules": rules}


def promote(
    home: Path,
    params: Params,
    name: str | None = None,
    *,
    version: int | None = None,
    alias: str = CHALLENGER,
    force: bool = False,
    reason: str | None = None,
) -> Outcome:
    """Make a version champion if it passes the gate of `params`, or with `force`, which needs a reason and is recorded.

    `name` defaults to register.name; the version is the given one, else that of `alias`. A move that was cut short is
    completed. Raises NotRegisteredError if there is no such model, version or alias, and ValueError if MLflow does not answer.
    """
    from stages.record.connection import locked

    if force and not (reason or "").strip():
        raise ValueError('--force needs --reason "TEXT": it is recorded in the registry, for whoever asks later')
    name = name or params.register_.name
    with open_registry(home) as client, locked(home):
        wanted = find_version(client, name, version, alias)
        for _ in range(ATTEMPTS):
            with suppress(OvertakenError):  # there is another champion to beat
                outcome = _decide(client, params, wanted, force, reason)
                if outcome.ok:
                    warn_if_absent(client, home, wanted)
                    seal_promotion(home, name, CHAMPION, asdict(promotions(client, name, CHAMPION)[-1]))
                return outcome
    raise ValueError(f"other hosts move {CHAMPION} of {name} all the time; see who does, and try again")


def warn_if_absent(client: MlflowClient, home: Path, wanted: ModelVersion) -> None:
    """Say on stderr if nobody can get the files of a version any more: what cannot be had serves nobody."""
    from pipelines.run.nearby import DvcStores
    from qvgen.hub.reference import Reference
    from qvgen.hub.resolve import absent
    from qvgen.hub.tracking import read_version

    try:
        model = read_version(client, Reference(wanted.name, version=int(wanted.version)))
        why = absent(model, client.tracking_uri, [DvcStores(home)])
    except ValueError as error:
        why = str(error)
    if why is not None:
        print(f"warning: the files of {wanted.name} version {wanted.version} are nowhere to be had ({why})", file=sys.stderr)


def _decide(client: MlflowClient, params: Params, wanted: ModelVersion, force: bool, reason: str | None) -> Outcome:
    """Hold `wanted` against the champion of this moment. Raises OvertakenError if there is another one before it is done."""
    name, number = wanted.name, int(wanted.version)
    champion, history = alias_version(client, name, CHAMPION), promotions(client, name, CHAMPION)
    recorded = history[-1].version if history else None
    if recorded == number:
        moved = move_alias(client, name, CHAMPION, number, reason="")  # recorded, so the gate has decided already
        message = f"{name} version {number} is champion " + ("again, as recorded" if moved else "already")
        return Outcome(name, number, champion, True, moved, (), message)
    # An alias that was moved by hand does not lower the bar.
    rival = _version(client, name, recorded if recorded is not None else champion if champion != number else None)
    rules = tuple(_judge(client, params, wanted, rival))
    failed = [rule.name for rule in rules if not rule.ok]
    if failed and not force:
        stays = f"version {champion} stays champion" if champion else "there is no champion"
        why = f"{name} version {number} fails {len(failed)} of {len(rules)} rules ({', '.join(failed)}): {stays}"
        return Outcome(name, number, champion, False, False, rules, why)
    move_alias(
        client,
        name,
        CHAMPION,
        number,
        reason=reason or "passed the gate",
        forced=bool(failed),
        gate={rule.name: [rule.known, rule.limit_text, rule.ok] for rule in rules},
        seen=history,
    )
    applied = sum(rule.applies for rule in rules)
    skipped = f", {len(rules) - applied} not applicable to its data" if applied < len(rules) else ""
    how = f"by force, against {', '.join(failed)}" if failed else f"{applied} rules passed{skipped}"
    return Outcome(name, number, champion, True, True, rules, f"{name} version {number} is champion now ({how})")


def promote_after_run(root: Path) -> str:
    """Let the gate decide on the newest challenger, and return its verdict, the sentence first, then rules that failed.

    Nothing that goes wrong here may fail a pipeline that is done, and no server may hold it up: one warning on stderr, and "".
    """
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_verdict(root)), daemon=True)
    thread.start()
    thread.join(PROMOTE_SECONDS)
    if not found:
        print(f"warning: no whole answer within {PROMOTE_SECONDS:g} s; try `qvgen promote`", file=sys.stderr)
    return found[0] if found else ""


def _verdict(root: Path) -> str:
    try:
        outcome = promote(root, load_params(root / "params.yaml"))
    except NotRegisteredError as error:  # not every run gets as far as stage register
        return f"no model to promote: {error}"
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        print(f"warning: no model was promoted, try `qvgen promote` ({type(error).__name__}: {first[:160]})", file=sys.stderr)
        return ""
    return "\n".join([outcome.message, *(str(rule) for rule in outcome.rules if not rule.ok)])


def _version(client: MlflowClient, name: str, number: int | None) -> ModelVersion | None:
    """None also for a version that was deleted, and for no number."""
    found = client.search_model_versions(f"name = '{name}' and version_number = {number}") if number is not None else []
    return found[0] if found else None


def _judge(client: MlflowClient, params: Params, wanted: ModelVersion, rival: ModelVersion | None) -> list[Rule]:
    same = rival is not None and all(rival.tags.get(key) == wanted.tags.get(key) for key in ("device", "kernel"))
    champion = None if rival is None else metrics_of(client, rival)
    absent = wanted.tags.get(NOT_APPLICABLE, "").split()
    return evaluate_gate(params.gate, metrics_of(client, wanted), champion, same_machine=same, not_applicable=absent)
