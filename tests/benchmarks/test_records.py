import json
import math
from pathlib import Path

import pytest

from rankonce.benchmarks.records import describe_machine, write_record


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "results" / "soak.json"
    write_record(path, {"rate": 1.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_record(path, {"rate": math.nan}, allow_nan=False)
    assert json.loads(path.read_text()) == {"rate": 1.5}
    assert [file.name for file in path.parent.iterdir()] == ["soak.json"]


def test_a_record_can_go_to_what_is_no_file() -> None:
    write_record(Path("/dev/null"), {"rate": 1.5})
    assert Path("/dev/null").is_char_device()


def test_the_machine_is_named_with_its_memory_and_cores() -> None:
    machine = describe_machine()
    assert machine["memory_gb"] > 0
    assert 1 <= machine["usable_cores"] <= machine["cores"]
