"""Dockerfiles, the systemd unit and the manifests for Kubernetes: linted, and they name what exists."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from scm_sdk.export.cli import main
from scm_sdk.inference.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
DOCKERFILES = sorted(path for path in (ROOT / "docker").glob("Dockerfile*") if path.suffix != ".dockerignore")
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
UNIT = ROOT / "deploy" / "systemd" / "scm-serve.service"


def check_arguments(arguments: list[str]) -> None:
    """Parse arguments of the command line as the command does, without running it."""
    name, *rest = arguments
    if "--backend" in rest:  # a library that this machine need not have
        at = rest.index("--backend") + 1
        assert rest[at] in BACKENDS
        rest[at] = "auto"
    above = click.Context(main, **main.context_settings)
    main.commands[name].make_context(name, rest, above)  # raises where an option does not exist


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_start_the_server_with_keys_and_not_as_root(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    entry, command = (
        json.loads(re.findall(rf"^{word} (\[.*)$", text, re.MULTILINE)[-1]) for word in ("ENTRYPOINT", "CMD")
    )
    assert entry[0] == "scm-export"
    check_arguments([*entry[1:], *command])
    assert "--api-key-file" in command and command[command.index("--host") + 1] == "0.0.0.0"
    stages = text.split("\nFROM ")
    assert re.search(r"^USER [1-9]\d*$", stages[-1], re.MULTILINE), "a number, so that runAsNonRoot can check it"
    assert "/readyz" in text
    for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert (ROOT / source).exists()


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    """Lint a Dockerfile; a warning is an error."""
    beside = Path(sys.executable).with_name("hadolint")
    linter = str(beside) if beside.exists() else shutil.which("hadolint")
    if linter is None:
        pytest.skip("needs hadolint: the extra test brings it")
    command = [linter, "--failure-threshold", "info", "--no-color", str(path)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_has_nothing_to_say_of_images(path: Path, tmp_path: Path) -> None:
    done = hadolint(path)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = tmp_path / path.name
    wrong.write_text(path.read_text(encoding="utf-8").replace(" --no-cache-dir", ""), encoding="utf-8")
    assert "DL3042" in hadolint(wrong).stdout, "it looks"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_install_extras_that_exist_and_their_context_has_what_a_wheel_needs(path: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (extras,) = re.findall(r'"\$1\[([\w,-]+)\]"', path.read_text(encoding="utf-8"))
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    kept = re.findall(r"^!(\S+)$", path.with_name(f"{path.name}.dockerignore").read_text("utf-8"), re.MULTILINE)
    assert all((ROOT / name).exists() for name in kept)
    needed = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    needed |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed <= set(kept)


def test_the_unit_starts_the_server_with_keys_and_waits_for_its_end(tmp_path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(UNIT.read_text(encoding="utf-8"))
    command = shlex.split(unit["Service"]["ExecStart"])
    check_arguments(command[1:])
    assert "--api-key-file" in command
    drain = next(p.default for p in main.commands["serve"].params if p.name == "drain_timeout")
    assert float(unit["Service"]["TimeoutStopSec"]) > float(drain)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text(encoding="utf-8").replace(command[0], "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, "")


def resources() -> list[dict[str, Any]]:
    """Return every resource of the manifests."""
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    return [found for path in MANIFESTS for found in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def one(kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in resources() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


@pytest.mark.parametrize("version", ["1.31", "latest"])
def test_manifests_have_the_schema_of_kubernetes(version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: the extra test brings it")
    version = validator.latest_version() if version == "latest" else version
    for resource in resources():
        validator.validate(resource, version, strict=True)
    wrong = one("Deployment", "scm-serve")
    container = wrong["spec"]["template"]["spec"]["containers"][0]
    container["readynessProbe"] = container.pop("readinessProbe")
    with pytest.raises(validator.ValidationError, match="readynessProbe"):
        validator.validate(wrong, version, strict=True)


@pytest.mark.parametrize(("kind", "name"), [("Deployment", "scm-serve"), ("Job", "scm-sample")])
def test_pods_run_commands_that_exist_not_as_root_and_write_to_volumes_alone(kind: str, name: str) -> None:
    pod = one(kind, name)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    command = [*container.get("command", json.loads(entry)), *container["args"]]
    assert command[0] == "scm-export"
    check_arguments([part.replace("$(JOB_COMPLETION_INDEX)", "49") for part in command[1:]])
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, int(user))
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    volumes = {volume["name"] for volume in pod["volumes"]}
    places = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in places.values()} == volumes
    assert places["/model"]["readOnly"] and not places["/tmp"].get("readOnly")
    cache = next(each["value"] for each in container["env"] if each["name"] == "SCM_CACHE_DIR")
    assert cache.startswith("/tmp/"), "the one folder that can be written"


def test_the_deployment_is_probed_scaled_drained_and_found() -> None:
    pytest.importorskip("starlette", reason="needs the extra serve")
    from scm_sdk.serve.app import PROBES
    from scm_sdk.serve.metrics import Metrics

    deployment, service = one("Deployment", "scm-serve"), one("Service", "scm-serve")
    labels, pod = deployment["spec"]["template"]["metadata"]["labels"], deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in PROBES and asked["port"] in ports
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz", "which runs an inference"

    arguments = dict(part.removeprefix("--").split("=") for part in container["args"] if part.startswith("--"))
    options = {option.name: option.default for option in main.commands["serve"].params}
    assert ports["http"] == options["port"] and arguments["allowed-host"] == service["metadata"]["name"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + options["drain_timeout"]
    (keys,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert not keys["defaultMode"] & 0o022, "the server refuses keys that others can write"

    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        one("PodDisruptionBudget", "scm-serve")["spec"]["selector"]["matchLabels"],
        one("NetworkPolicy", "scm-serve")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)
    scaler = one("HorizontalPodAutoscaler", "scm-serve")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"] and "replicas" not in deployment["spec"]
    (metric,) = scaler["metrics"]
    assert f"\n{metric['pods']['metric']['name']} " in Metrics().render().decode()
    assert int(metric["pods"]["target"]["averageValue"]) < int(arguments["max-queue"])


def test_the_job_writes_as_many_shards_as_it_has_pods() -> None:
    job = one("Job", "scm-sample")["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completionMode"] == "Indexed" and f"--num-shards={job['completions']}" in container["args"]
    index = next(each for each in container["env"] if each["name"] == "JOB_COMPLETION_INDEX")
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
