"""What the operator declares about files and batches."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How files and batches are kept and run.

    Attributes:
        data_dir: folder of the database and the files; one server at a time uses it.
        max_lines: lines of one batch.
        max_file_mb: bound of an uploaded file's bytes, in MB.
        max_lines_in_flight: lines, of all batches together, that wait for the model at one time.
        keep_days: how long a file is kept where its owner does not say.
    """

    data_dir: Path
    max_lines: int = 50_000
    max_file_mb: int = 200
    max_lines_in_flight: int = 8
    keep_days: int = 30
