"""`qvgen promote`: the alias champion goes to a model version that passes the gate, and every move is recorded."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.gate import Rule, evaluate_gate
from qvgen.params import Params, load_params
from stages._promotions import alias_version, move_alias, promotions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True)
class Outcome:
    """What became of a wish to promote."""

    name: str
    version: int
    champion: int | None  # before
    ok: bool  # whether `version` is champion now
    moved: bool
    rules: tuple[Rule, ...]
    message: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: what was not measured is None."""
        rules = [{"rule": r.name, "value": r.known, "limit": r.limit_text, "ok": r.ok} for r in self.rules]
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
    completed. Raises ValueError if there is no such model, version or alias, and what MLflow raises.
    """
    from stages._tracking import connect, locked

    if force and not (reason or "").strip():
        raise ValueError('--force needs --reason "TEXT": it is recorded in the registry, for whoever asks later')
    name = name or params.register_.name
    client, _ = connect(home)
    with locked(home):
        wanted = _find(home, client, name, version, alias)
        number = int(wanted.version)
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
        )
    how = f"by force, against {', '.join(failed)}" if failed else f"{len(rules)} rules passed"
    return Outcome(name, number, champion, True, True, rules, f"{name} version {number} is champion now ({how})")


def promote_after_run(root: Path) -> str:
    """Let the gate decide on the newest challenger, and return its verdict, the sentence first, then rules that failed.

    Nothing that goes wrong here may fail a pipeline that is done: one warning on stderr, and "".
    """
    try:
        outcome = promote(root, load_params(root / "params.yaml"))
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        print(f"warning: no model was promoted, try `qvgen promote` ({type(error).__name__}: {first[:160]})", file=sys.stderr)
        return ""
    return "\n".join([outcome.message, *(str(rule) for rule in outcome.rules if not rule.ok)])


def metrics_of(client: MlflowClient, version: ModelVersion) -> dict[str, float]:
    """Metrics of a version's logged model, by dotted name. Raises ValueError if it has no logged model."""
    metrics = client.get_logged_model(logged_model_id(version)).metrics or []
    return {metric.key: metric.value for metric in metrics}


def logged_model_id(version: ModelVersion) -> str:
    """From the version's source, models:/<id>: MLflow leaves `model_id` empty in a database. Raises ValueError."""
    scheme, _, id = (version.source or "").partition(":/")
    if scheme != "models" or not id.startswith("m-"):
        raise ValueError(f"{version.name} version {version.version} has source {version.source!r}, not models:/m-...")
    return id


def _find(home: Path, client: MlflowClient, name: str, version: int | None, alias: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    from stages._tracking import public_uri

    try:
        if version is not None:
            return client.get_model_version(name, str(version))
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        wish = f"version {version}" if version is not None else f"alias {alias}"
        where = public_uri(client.tracking_uri, home)
        raise ValueError(f"the registry at {where} has no {name} with {wish}; `dvc repro register` makes one") from None


def _version(client: MlflowClient, name: str, number: int | None) -> ModelVersion | None:
    """None also for a version that was deleted."""
    found = client.search_model_versions(f"name = '{name}' and version_number = {number}") if number is not None else []
    return found[0] if found else None


def _judge(client: MlflowClient, params: Params, wanted: ModelVersion, rival: ModelVersion | None) -> list[Rule]:
    same = rival is not None and all(rival.tags.get(key) == wanted.tags.get(key) for key in ("device", "kernel"))
    champion = None if rival is None else metrics_of(client, rival)
    return evaluate_gate(params.gate, metrics_of(client, wanted), champion, same_machine=same)
