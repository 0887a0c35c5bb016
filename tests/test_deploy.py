"""No container engine runs here: the files under deploy/ are checked against what reads them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from typer.main import get_command
from yamllint import linter
from yamllint.config import YamlLintConfig

from rankonce.cli.serve import serve
from rankonce.serving.metrics import Metrics

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
KINDS = {
    "ConfigMap",
    "Deployment",
    "HorizontalPodAutoscaler",
    "PodDisruptionBudget",
    "Service",
}
LINT = YamlLintConfig(
    "{extends: default, rules: {line-length: {max: 100}, document-start: disable}}"
)


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def manifest(kind: str) -> dict[str, Any]:
    (found,) = [one for one in map(load, MANIFESTS) if one["kind"] == kind]
    return found


def pod() -> dict[str, Any]:
    return dict(manifest("Deployment")["spec"]["template"]["spec"])


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    return dict(found)


def serve_parameters(arguments: list[str]) -> dict[str, Any]:
    """Read arguments as ``rankonce serve`` does."""
    app = typer.Typer()
    app.command()(serve)
    return dict(get_command(app).make_context("serve", arguments).params)


def test_there_is_a_manifest_of_every_kind() -> None:
    assert {load(path)["kind"] for path in MANIFESTS} == KINDS


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_is_clean_yaml_that_kubernetes_takes(path: Path) -> None:
    problems = linter.run(path.read_text(), LINT, str(path))
    assert [str(problem) for problem in problems] == []
    for version in ("1.29", "1.35"):
        kubernetes_validate.validate(load(path), version, strict=True)


def test_the_validation_finds_a_misspelt_field() -> None:
    wrong = manifest("Deployment")
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.35", strict=True)


def test_the_arguments_are_what_the_command_takes(tmp_path: Path) -> None:
    (tmp_path / "api-keys").write_text("search:kIs3o0y8PqLw2ZrVt6nB")
    values = manifest("ConfigMap")["data"]
    arguments = [
        re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], argument).replace(
            "/etc/rankonce", str(tmp_path)
        )
        for argument in container()["args"]
    ]
    options = serve_parameters(arguments)
    assert options["host"] == "0.0.0.0"
    assert options["port"] == container()["ports"][0]["containerPort"]
    assert options["api_keys"] == tmp_path / "api-keys"
    assert options["max_candidates"] == 2000
    # Every value of the map is used.
    used = set(re.findall(r"\$\((\w+)\)", " ".join(container()["args"])))
    assert used == set(values)
    # The pod lives long enough for what runs to finish.
    drain = options["drain_delay"] + options["drain_timeout"]
    assert drain < pod()["terminationGracePeriodSeconds"]
    readiness = container()["readinessProbe"]
    seen_s = readiness["periodSeconds"] * (readiness["failureThreshold"] + 1)
    assert seen_s < options["drain_delay"]


def test_the_parts_refer_to_each_other() -> None:
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"].items()
    for selector in (
        manifest("Deployment")["spec"]["selector"]["matchLabels"],
        manifest("Service")["spec"]["selector"],
        manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    ports = {port["name"] for port in container()["ports"]}
    assert manifest("Service")["spec"]["ports"][0]["targetPort"] in ports
    assert (
        container()["envFrom"][0]["configMapRef"]["name"]
        == (manifest("ConfigMap")["metadata"]["name"])
    )
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "rankonce")
    volumes = {volume["name"] for volume in pod()["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes


def test_the_probes_ask_for_paths_that_need_no_key() -> None:
    paths = {
        name: container()[name]["httpGet"]["path"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert paths == {
        "startupProbe": "/health",
        "livenessProbe": "/health",
        "readinessProbe": "/ready",
    }


def test_the_autoscaler_asks_for_a_metric_that_exists() -> None:
    from rankonce.serving.metrics import EngineState
    from rankonce.serving.observations import QueueObserved

    metrics = Metrics(version="0", models=["tiny"])
    metrics.watch(EngineState(model="tiny", queue=QueueObserved, caches=dict))
    (metric,) = manifest("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert f"# TYPE {metric['pods']['metric']['name']} gauge" in metrics.write().decode()


def test_the_container_file_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed on this platform")
    # DL3013: the versions come from constraints.txt.
    command = [hadolint, "--ignore", "DL3013", str(DEPLOY / "Containerfile")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0


def test_the_container_starts_with_arguments_that_the_command_takes() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    (arguments,) = re.findall(r"^CMD (\[.*\])$", text, flags=re.MULTILINE)
    options = serve_parameters(yaml.safe_load(arguments))
    assert (options["host"], options["port"]) == ("0.0.0.0", 8000)
    assert "EXPOSE 8000" in text


def test_what_the_container_file_copies_is_there_and_not_ignored() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    let_in = {
        line[1:]
        for line in (ROOT / ".containerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("page", ["operations.md", "security.md"])
def test_the_pages_name_options_that_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"`(--[a-z-]+)", text))
    app = typer.Typer()
    app.command()(serve)
    known = {
        option
        for parameter in get_command(app).params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    # `--model=/models/NAME` and the like are named by their beginning.
    assert named
    assert named <= known


def test_the_threat_model_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    paths = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert len(paths) > 10
    assert all((ROOT / path).exists() for path in paths)
    short = re.findall(r"`(test_\w+\.py)`", text)
    assert all((ROOT / "tests" / "serving" / name).exists() for name in short)
