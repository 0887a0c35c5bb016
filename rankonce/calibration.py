"""Calibrated probabilities: what a task's scores mean, measured on labelled requests.

A calibration is one rising function a task of the scaled ranking value, so that it can never
change an order: of P(label) against all others where the task ranks by log-odds, of the expected
grade scaled to 0..1 where it ranks by grades. The other labels keep their proportions as far as the
new mean allows: of all distributions with that mean the one nearest to the model's is taken, an
exponential tilt (Csiszár 1975). With two labels temperature scaling (Guo et al. 2017) and Platt
scaling (Platt 1999) come out as usual.

The file lies beside the weights that it was fitted with and names them.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rankonce.errors import ModelError
from rankonce.model.adapters import WEIGHTS_FILE, fingerprint_base, is_adapter
from rankonce.prompts.tasks import Task
from rankonce.records import describe_faults

CALIBRATION_FILE = "calibration.json"
Method: TypeAlias = Literal["temperature", "platt", "isotonic"]
Floats: TypeAlias = NDArray[np.float64]

# Halving the interval so often leaves less than 1e-10 of it.
_NUM_HALVINGS = 44
_LARGEST_TILT = 200.0


class Calibration(BaseModel):
    """The function of one task.

    Attributes:
        slope, offset: of the line through the log-odds, for temperature (1/T and 0) and Platt.
        knots: for isotonic: log-odds, rising, and the probability there; straight in between and
            level outside.
        measured: on requests that were held out: log-loss and calibration error without it and
            with it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Method
    slope: Annotated[float, Field(gt=0)] = 1.0
    offset: float = 0.0
    knots: tuple[tuple[float, Annotated[float, Field(gt=0, lt=1)]], ...] = ()
    measured: Mapping[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_knots(self) -> "Calibration":
        if (self.method == "isotonic") != bool(self.knots):
            raise ValueError("knots: should be there for isotonic, and for nothing else")
        if any(
            b[0] <= a[0] or b[1] < a[1] for a, b in zip(self.knots, self.knots[1:], strict=False)
        ):
            raise ValueError("knots: should rise")
        return self

    def apply(self, logits_C: Floats) -> Floats:
        """Turn log-odds of the scaled ranking value into calibrated log-odds; never falls."""
        if self.method == "isotonic":
            places, shares = np.array(self.knots).T
            shares_C = np.interp(logits_C, places, shares)
            return np.asarray(np.log(shares_C) - np.log1p(-shares_C))
        return self.slope * logits_C + self.offset


class CalibrationTable(BaseModel):
    """The calibrations of one set of weights.

    Attributes:
        weights: fingerprint of those that it was fitted with.
        tasks: by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    weights: str
    tasks: Mapping[str, Calibration]


def scaled_grades(task: Task) -> Floats:
    """Return the worth of every label between 0 and 1: g_L.

    Where the task ranks by log-odds it is 1 for the ranked label alone.
    """
    grades = np.array(task.grades)
    span = grades.max() - grades.min()
    return (grades - grades.min()) / span if span else np.zeros(len(grades))


def relevance_logits(log_probs_CL: Floats, grades_L: Floats) -> Floats:
    """Return the log-odds of the mean gain, precise at both ends."""
    with np.errstate(divide="ignore"):
        up_L, down_L = np.log(grades_L), np.log1p(-grades_L)
    up_C = np.logaddexp.reduce(log_probs_CL + up_L, axis=1)
    down_C = np.logaddexp.reduce(log_probs_CL + down_L, axis=1)
    return np.asarray(up_C - down_C)


def calibrate_log_probs(
    log_probs_CL: Floats, task: Task, calibration: Calibration
) -> tuple[Floats, Floats]:
    """Calibrate the labels of C candidates.

    Args:
        log_probs_CL: the model's, normalised over the labels.

    Returns:
        Calibrated log-probabilities [C, L], and ranking values [C] that rise with the model's own.
    """
    grades_L = scaled_grades(task)
    targets_C = calibration.apply(relevance_logits(log_probs_CL, grades_L))
    tilted_CL = _tilt(log_probs_CL, grades_L, targets_C)
    if task.ranking.kind == "log_odds":
        return tilted_CL, targets_C
    grades = [float(label.grade or 0.0) for label in task.labels]
    shares_C = np.exp(-np.logaddexp(0.0, -targets_C))
    return tilted_CL, min(grades) + (max(grades) - min(grades)) * shares_C


def _tilt(log_probs_CL: Floats, grades_L: Floats, targets_C: Floats) -> Floats:
    """Find the distributions nearest to the model's whose mean gain has these log-odds."""
    if set(grades_L.tolist()) <= {0.0, 1.0}:
        tilts_C = targets_C - relevance_logits(log_probs_CL, grades_L)
    else:
        low_C = np.full(len(targets_C), -_LARGEST_TILT)
        high_C = -low_C
        for _ in range(_NUM_HALVINGS):
            tilts_C = (low_C + high_C) / 2
            too_low_C = (
                relevance_logits(_tilted(log_probs_CL, grades_L, tilts_C), grades_L) < targets_C
            )
            low_C = np.where(too_low_C, tilts_C, low_C)
            high_C = np.where(too_low_C, high_C, tilts_C)
        tilts_C = (low_C + high_C) / 2
    return _tilted(log_probs_CL, grades_L, tilts_C)


def _tilted(log_probs_CL: Floats, grades_L: Floats, tilts_C: Floats) -> Floats:
    moved_CL = log_probs_CL + tilts_C[:, None] * grades_L
    return np.asarray(moved_CL - np.logaddexp.reduce(moved_CL, axis=1)[:, None])


def read_calibrations(folder: str | Path) -> Mapping[str, Calibration]:
    """Read what lies beside a model or an adapter, by task; nothing where there is none.

    Raises:
        ModelError: the file is broken or was fitted with other weights.
    """
    path = Path(folder) / CALIBRATION_FILE
    if not path.is_file():
        return {}
    try:
        table = CalibrationTable.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ModelError(f"calibration: {path}: {describe_faults(error.errors())}") from error
    if table.weights != fingerprint_weights(path.parent):
        raise ModelError(
            f"calibration: {path} was fitted with other weights; fit it again (rankonce calibrate) "
            "or remove it"
        )
    return table.tasks


def write_calibrations(folder: Path, calibrations: Mapping[str, Calibration]) -> Path:
    """Store calibrations beside a model or an adapter; those of other tasks stay.

    Raises:
        ModelError: the folder's weights cannot be identified.
    """
    path, weights = folder / CALIBRATION_FILE, fingerprint_weights(folder)
    kept: Mapping[str, Calibration] = {}
    # A file of other weights, or a broken one, holds nothing that is still true.
    with suppress(ModelError):
        kept = read_calibrations(folder)
    table = CalibrationTable(weights=weights, tasks={**kept, **calibrations})
    # In one step: a server that starts meanwhile reads the old file or the new one.
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(table.model_dump(), indent=2) + "\n")
    draft.replace(path)
    return path


def fingerprint_weights(folder: Path) -> str:
    """Identify the weights in a folder.

    Raises:
        ModelError: there are none in safetensors.
    """
    if is_adapter(folder):
        return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    fingerprint = fingerprint_base(str(folder))
    if fingerprint is None:
        raise ModelError(f"calibration: {folder} has no weights in safetensors to be fitted with")
    return fingerprint
