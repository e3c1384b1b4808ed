"""The files of a packed model in MLflow: through a real server, cut short and gone on with, and on one disk stored once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from qvgen.hub.artifacts import FOLDER, fetch_file, list_files, local_folder
from qvgen.packing.config import to_config
from qvgen.quant.scheme import QuantScheme
from stages.record.model.version import UPLOAD
from tests.support.registered import ROOT, make_wish, read_folder, register

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CONTENT = {"model_index.json": b"{}", "transformer/config.json": b'{"a": 1}', "transformer/weights.safetensors": b"w" * 5000}

CONFIGURED = {  # of stage register, which reads how a folder is quantized; not one that MLflow could load
    "artifacts/packed/transformer/config.json": json.dumps({"quantization_config": to_config(QuantScheme(), 1)}),
    "artifacts/packed/transformer/weights.safetensors": "w" * 5000,
}


def content_of(client: MlflowClient, version: Any, to: Path) -> dict[str, bytes]:
    location = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    path = fetch_file(client, location, FOLDER, to)
    return read_folder(path)


def test_through_a_server(mlflow_server: str, tmp_path: Path) -> None:
    client, wish = MlflowClient(mlflow_server), make_wish(tmp_path, "through-a-server", CONTENT)
    (tmp_path / "packed/transformer/weights.safetensors").write_bytes(b"of a later run")
    version = register(client, wish)
    assert content_of(client, version, tmp_path) == CONTENT, "by its hash, from DVC's cache"
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert str(model.status) == "READY" and model.tags[UPLOAD] == "copy"
    assert client.get_model_version(wish["name"], "1").description == "`qvgen pull models:/through-a-server/1 --out DIR`"
    assert register(client, wish).version == version.version, "the same bytes are one version"


def test_an_upload_goes_on_where_it_was_cut_short(mlflow_server: str, tmp_path: Path) -> None:
    """A version is there only when all its files are; what had arrived is not sent again."""
    client, wish = MlflowClient(mlflow_server), make_wish(tmp_path, "cut-short", CONTENT, cached=False)
    weights = tmp_path / "packed/transformer/weights.safetensors"
    weights.write_bytes(b"x" * 5000)
    with pytest.raises(FileNotFoundError, match=r"transformer/weights\.safetensors with sha256 .* has replaced it"):
        register(client, wish)
    assert client.search_model_versions("name = 'cut-short'") == []
    (draft,) = client.search_logged_models([client.get_experiment_by_name("upload").experiment_id], "name = 'cut-short'")
    assert {name for name, _ in list_files(client, draft.model_id)} == {f"{FOLDER}/{name}" for name in list(CONTENT)[:2]}
    weights.write_bytes(CONTENT["transformer/weights.safetensors"])
    sent: list[str] = []
    send = client.log_model_artifact
    client.log_model_artifact = lambda id, path, folder=None: (
        sent.append(f"{folder}/{Path(path).name}"),
        send(id, path, folder),
    )
    version = register(client, wish)
    assert sent == [f"{FOLDER}/transformer/weights.safetensors"]
    assert version.source == f"models:/{draft.model_id}" and content_of(client, version, tmp_path) == CONTENT


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """Of an embedded database, with its files beside it."""
    folder = tmp_path_factory.mktemp("local")
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    client.create_experiment("upload", artifact_location=(folder / "mlruns").as_uri())
    return client


@pytest.mark.parametrize("cached", [True, False])
def test_on_one_disk_a_file_is_stored_once(local: MlflowClient, tmp_path: Path, cached: bool) -> None:
    """A link to DVC's blob, or a clone on a file system that makes them; a file that somebody may write is copied."""
    wish = make_wish(tmp_path, f"one-disk-{cached}", CONTENT, cached=cached)
    version = register(local, wish)
    assert content_of(local, version, tmp_path / "copy") == CONTENT
    place = local_folder(local.get_logged_model(version.source.removeprefix("models:/")).artifact_location)
    assert place is not None
    stored = place / FOLDER / "transformer/weights.safetensors"
    md5 = wish["files"]["transformer/weights.safetensors"]["md5"]
    blob = tmp_path / "files/md5" / md5[:2] / md5[2:] if cached else tmp_path / "packed/transformer/weights.safetensors"
    if stored.stat().st_nlink == 1:  # btrfs, xfs: cloned
        stored.write_bytes(b"edited")
        assert blob.read_bytes() == CONTENT["transformer/weights.safetensors"]
    else:
        assert cached and stored.samefile(blob)


@pytest.mark.parametrize(("spare", "chosen"), [(0, "copy"), (-1, "link")])
def test_auto_links_what_is_larger_than_its_limit(
    local: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int, chosen: str
) -> None:
    """A limit that the folder meets, and one a byte below; the real one is 2 GB."""
    from qvgen.params import load_params
    from stages import register as stage_register

    assert stage_register.LARGEST_COPY == 2_000_000_000
    for path, text in {**dict.fromkeys(stage_register.MEASURED, "{}"), **CONFIGURED}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    size = sum(file.stat().st_size for file in (tmp_path / stage_register.PACKED).rglob("*") if file.is_file())
    monkeypatch.setattr(stage_register, "LARGEST_COPY", size + spare)
    monkeypatch.setattr(
        stage_register, "read_stores", lambda root: SimpleNamespace(remote="s3://data", cache=str(tmp_path / "cache"))
    )
    params, md5 = load_params(ROOT / "params.yaml"), "0" * 32
    assert params.register_.upload == "auto"
    facts = SimpleNamespace(deps=dict.fromkeys((stage_register.PACKED, *stage_register.MEASURED), md5), address="register")
    journal = SimpleNamespace(start_tags=lambda: {"git.commit": "abc"})
    wish = stage_register.describe(SimpleNamespace(root=tmp_path, params=params, facts=facts, journal=journal))
    version = register(local, wish | {"name": f"auto-{chosen}", "identity": chosen})
    found = local.get_model_version(f"auto-{chosen}", version.version)
    assert found.tags[UPLOAD] == chosen
    assert ("`git checkout abc && dvc pull artifacts/packed`" in found.description) == (chosen == "link"), found.description
    assert "qvgen pull models:/qvgen/1 --out DIR" in found.description
    names = [name for name, _ in list_files(local, found.source.removeprefix("models:/"))]
    assert (f"{FOLDER}/transformer/weights.safetensors" in names) == (chosen == "copy")


def test_a_link_stays_where_it_is(local: MlflowClient, tmp_path: Path) -> None:
    wish = make_wish(tmp_path, "linked", CONTENT, upload="link")
    version = register(local, wish)
    model = local.get_logged_model(version.source.removeprefix("models:/"))
    assert [name for name, _ in list_files(local, model.model_id)] == ["MLmodel"]
    assert local.get_model_version("linked", "1").tags[UPLOAD] == "link"
