"""The rows of an experiment in MLflow, for teams that look there."""

from collections.abc import Mapping
from typing import Any

from rankonce.errors import ExperimentError, MissingDependencyError

_ID = "rankonce.id"


class Tracker:
    """Logs rows to one MLflow experiment, each once.

    Args:
        uri: of a tracking server, or of a folder.
        experiment: its name; made where it does not exist.

    Raises:
        ExperimentError: the server does not answer.
        MissingDependencyError: MLflow is not installed.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        try:
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise MissingDependencyError("mlflow", extra="tracking") from error
        self._errors = (MlflowException, OSError)
        self._uri = uri
        self._client = MlflowClient(tracking_uri=uri)
        try:
            found = self._client.get_experiment_by_name(experiment)
            self._experiment = (
                found.experiment_id
                if found is not None
                else self._client.create_experiment(experiment)
            )
        except self._errors as error:
            raise ExperimentError(f"mlflow: {uri} does not answer: {error}") from error

    def log(self, row: Mapping[str, Any], *, variables: Mapping[str, Any]) -> None:
        """Log a row: its variables as parameters, its numbers as metrics.

        A row whose id was logged and finished is left as it is.

        Raises:
            ExperimentError: the server does not answer any more.
        """
        try:
            known = self._client.search_runs(
                [self._experiment],
                f"tags.`{_ID}` = '{row['id']}' and attributes.status = 'FINISHED'",
            )
            if known:
                return
            run = self._client.create_run(
                self._experiment, run_name=str(row["run"]), tags={_ID: row["id"]}
            ).info.run_id
            for name, value in variables.items():
                self._client.log_param(run, name, value)
            for name, value in row.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._client.log_metric(run, name, value)
                elif name not in {*variables, "variables"} and value is not None:
                    self._client.set_tag(run, name, value)
            status = "FINISHED" if row["failure"] is None else "FAILED"
            self._client.set_terminated(run, status)
        except self._errors as error:
            raise ExperimentError(f"mlflow: {self._uri} does not answer: {error}") from error
