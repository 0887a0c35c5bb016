import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankonce.distillation.experiments.declaration import Experiment
from rankonce.distillation.experiments.plan import plan_experiment
from rankonce.distillation.experiments.queue import Device
from rankonce.distillation.experiments.runner import run_experiment
from rankonce.distillation.experiments.tracking import Tracker
from rankonce.errors import ExperimentError

ROW = {"id": "abc", "run": "half", "seed": 1, "auc": 0.75, "commit": "1234", "failure": None}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking server with a database of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'runs.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                log_text = (folder / "log").read_text()
                assert process.poll() is None, log_text
                assert time.monotonic() < deadline, log_text
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_server_gets_every_row_once(server: str) -> None:
    from mlflow.tracking import MlflowClient

    for _ in range(2):
        tracker = Tracker(server, "sizes")
        tracker.log(ROW, variables={"seed": 1, "keep": 0.5})
    tracker.log({**ROW, "id": "def", "failure": "exited with 1", "auc": None}, variables={})
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("sizes")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["rankonce.id"]: run.info.status for run in runs} == {
        "abc": "FINISHED",
        "def": "FAILED",
    }
    (finished,) = (run for run in runs if run.info.status == "FINISHED")
    assert finished.info.run_name == "half"
    assert finished.data.params == {"seed": "1", "keep": "0.5"}
    assert finished.data.metrics["auc"] == 0.75
    assert finished.data.tags["commit"] == "1234"


def test_an_experiment_logs_its_rows_as_they_come(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.syspath_prepend(Path(__file__).parent)
    content = {
        "name": "texts",
        "variables": {"seed": 1},
        "steps": {"made": "make text{seed} --out {out}"},
        "measures": {"quality": "measure {made}"},
        "columns": {"length": "quality.parts.0.length"},
        "grid": {"seed": [1, 12]},
    }
    plan = plan_experiment(Experiment.model_validate(content))
    device = Device(name="here", environment={"COUNT": str(tmp_path / "count")})
    for _ in range(2):
        run_experiment(
            plan, tmp_path / "out", [device], tracker=Tracker(server, "texts"), program="steps:main"
        )
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("texts")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted((run.data.params["seed"], run.data.metrics["length"]) for run in runs) == [
        ("1", 5.0),
        ("12", 6.0),
    ]


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ExperimentError, match=r"mlflow: http://127.0.0.1:9 does not answer"):
        Tracker("http://127.0.0.1:9", "sizes")
