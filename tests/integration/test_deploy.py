"""deploy/ as a reviewer reads it, and as far as it can be tried without containers: Compose, Kubernetes, PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import services
from tests.support.toy_project import ROOT

DEPLOY = ROOT / "deploy"
PASSWORDS = {"POSTGRES_PASSWORD", "S3_ROOT_PASSWORD", "S3_PASSWORD", "PREFECT_PASSWORD"}


def compose_services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def template() -> dict[str, Any]:
    return json.loads((DEPLOY / "job-template.json").read_text())


def test_compose_binds_to_this_host_only_and_holds_no_password() -> None:
    found = compose_services()
    ports = [port for service in found.values() for port in service.get("ports", [])]
    assert len(ports) == 4 and all(port.startswith("127.0.0.1:") for port in ports)
    values = [(key, str(value)) for service in found.values() for key, value in service.get("environment", {}).items()]
    secrets = [value for key, value in values if key.endswith(("PASSWORD", "SECRET_ACCESS_KEY", "AUTH_STRING"))]
    assert len(secrets) == 8 and all("${" in value for value in secrets)
    text = (DEPLOY / "compose.yaml").read_text()
    assert {name for name in PASSWORDS if f"${{{name}:?" in text} == PASSWORDS  # without one, nothing starts
    assert not [value for _, value in values if "://" in value and "PASSWORD" in value], "a password in an address"
    assert {name for service in found.values() for name in service.get("depends_on", {})} <= found.keys()


def test_compose_gives_the_root_account_of_the_store_to_nobody_else() -> None:
    found = compose_services()
    holders = {name for name, service in found.items() if "S3_ROOT_PASSWORD" in json.dumps(service.get("environment", {}))}
    assert holders == {"s3", "bucket"}
    assert found["mlflow"]["environment"]["AWS_ACCESS_KEY_ID"] != found["s3"]["environment"]["MINIO_ROOT_USER"]
    policy = json.loads((DEPLOY / "bucket-policy.json").read_text())
    named = {resource for entry in policy["Statement"] for resource in entry["Resource"]}
    actions = {action for entry in policy["Statement"] for action in entry["Action"]}
    assert named == {"arn:aws:s3:::qvgen", "arn:aws:s3:::qvgen/*"} and not [a for a in actions if "*" in a]


def test_compose_servers_are_closed_and_confined() -> None:
    found = compose_services()
    for service in found.values():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"] and service["pids_limit"]
        assert "build" in service or (not service["image"].endswith(":latest") and ":" in service["image"])
    assert all(found[name]["read_only"] for name in ("mlflow", "prefect", "serve"))
    assert "*" not in found["prefect"]["environment"]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    assert "*" not in found["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    for file in {service["build"]["dockerfile"] for service in found.values() if "build" in service}:
        assert [line for line in (ROOT / file).read_text().splitlines() if line.startswith("USER")][-1] == "USER 10001"


def test_docker_accepts_the_compose_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    known = docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0
    if not known:
        pytest.skip("no `docker compose` here: the file is only parsed")
    (tmp_path / ".env").write_text("".join(f"{name}=a@b/c\n" for name in sorted(PASSWORDS)))
    command = ["docker", "compose", "--env-file", str(tmp_path / ".env"), "--file", str(DEPLOY / "compose.yaml"), "config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.integration
def test_a_password_outside_the_address_needs_no_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """PGPASSWORD, as compose.yaml gives it, reaches the drivers of both servers."""
    import sqlalchemy
    from sqlalchemy.ext.asyncio import create_async_engine

    nasty = "p@ss/w:rd#%20?"
    with services.postgres("mlflow") as database:
        database.query("mlflow", f"ALTER USER qvgen PASSWORD '{nasty}'")
        address = f"qvgen@127.0.0.1:{database.port}/mlflow"
        monkeypatch.setenv("PGPASSWORD", nasty)
        with sqlalchemy.create_engine(f"postgresql://{address}").connect() as connection:
            assert connection.scalar(sqlalchemy.text("SELECT 1")) == 1

        async def ask() -> object:
            engine = create_async_engine(f"postgresql+asyncpg://{address}")
            async with engine.connect() as connection:
                return await connection.scalar(sqlalchemy.text("SELECT 1"))

        assert asyncio.run(ask()) == 1


def restricted(pod: dict[str, Any]) -> dict[str, Any]:
    """The pod's only container. Both are what the Pod Security Standard `restricted` asks for, with resources, and without a
    token of the cluster."""
    assert pod["serviceAccountName"] == "qvgen" and pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all("emptyDir" in volume for volume in pod["volumes"])
    (container,) = pod["containers"]
    own = container["securityContext"]
    assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
    assert own["privileged"] is False and own["capabilities"] == {"drop": ["ALL"]}
    for kind in ("requests", "limits"):
        assert container["resources"][kind].keys() == {"cpu", "memory", "ephemeral-storage"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    return container


def test_pods_are_restricted() -> None:
    restricted(template()["job_configuration"]["job_manifest"]["spec"]["template"]["spec"])


def dockerfile() -> dict[str, Any]:
    """Of deploy/serve, the values of its last stage by instruction; ENV as a mapping."""
    text = (DEPLOY / "serve" / "Dockerfile").read_text().rpartition("FROM ")[2]
    lines = dict(line.split(maxsplit=1) for line in text.splitlines()[1:] if line and not line.startswith(("#", "ARG")))
    found = {name: json.loads(lines[name]) for name in ("ENTRYPOINT", "CMD")}
    return lines | found | {"ENV": dict(entry.split("=") for entry in lines["ENV"].split())}


def test_the_champion_is_served_by_a_restricted_deployment(tmp_path: Path) -> None:
    """Probes ask what the server answers, arguments are those that it takes, and what it writes to is mounted."""
    from typer.testing import CliRunner

    from qvgen.cli.app import anywhere

    kinds = {entry["kind"]: entry for entry in yaml.safe_load_all((DEPLOY / "serve" / "kubernetes.yaml").read_text())}
    assert kinds.keys() == {"Deployment", "Service", "NetworkPolicy"}
    spec, image = kinds["Deployment"]["spec"], dockerfile()
    container = restricted(spec["template"]["spec"])
    assert re.fullmatch(r"[\w./-]+@sha256:[0-9a-f]{64}", container["image"])
    labels = spec["template"]["metadata"]["labels"]
    for wanted in (spec["selector"]["matchLabels"], kinds["Service"]["spec"]["selector"]):
        assert wanted == labels
    policy = kinds["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels and all("from" in rule for rule in policy["ingress"])
    (port,) = container["ports"]
    assert f"EXPOSE {port['containerPort']}" == f"EXPOSE {image['EXPOSE']}" and port["name"] == "http"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in ("/health", "/ping") and container[probe]["httpGet"]["port"] == "http"
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {image["ENV"]["QVGEN_CACHE"], image["ENV"]["HOME"]}
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["MLFLOW_TRACKING_URI"].startswith("https://")
    assert variables["OMP_NUM_THREADS"] == container["resources"]["limits"]["cpu"]
    assert not [name for name in variables if name.endswith(("KEY", "PASSWORD"))]
    program, *own = image["ENTRYPOINT"]
    assert program == "qvgen"
    for given in (image["CMD"], container["args"]):
        nobody = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "QVGEN_CACHE": str(tmp_path)}
        done = CliRunner().invoke(anywhere, [*own, *given], env=nobody)
        assert "does not answer" in str(done.exception), done.output  # so the arguments are understood


def test_the_image_has_the_wheel_and_what_it_is_built_from() -> None:
    text = (DEPLOY / "serve" / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (?!--)(.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert set(copied) == {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "qvgen", "constraints.txt"}
    assert all((ROOT / name).exists() for name in copied)
    assert re.findall(r"pip install .*", text) == [
        'pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/qvgen-*.whl)[serve]"'
    ]


def test_the_namespace_enforces_it() -> None:
    kinds = {entry["kind"]: entry for entry in yaml.safe_load_all((DEPLOY / "namespace.yaml").read_text())}
    assert kinds["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert kinds["ServiceAccount"]["automountServiceAccountToken"] is False
    assert kinds["NetworkPolicy"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}


def test_the_deployment_fits_the_template() -> None:
    import jsonschema

    (deployment,) = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())["deployments"]
    variables = deployment["work_pool"]["job_variables"]
    schema = template()["variables"]
    assert variables.keys() <= schema["properties"].keys()
    jsonschema.validate(variables, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(variables | {"image": "qvgen:latest"}, schema)
    assert all(value.startswith("https://") for value in variables["env"].values() if "://" in value)
    assert not [name for name in variables["env"] if name.endswith(("KEY", "PASSWORD", "AUTH_STRING"))]
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template()["job_configuration"])))
    assert used == schema["properties"].keys()
