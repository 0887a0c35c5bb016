"""The record of a measurement names our own commit, or none."""

import subprocess
from pathlib import Path

import pytest

from rankonce import environment


def test_the_checkout_of_another_project_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / ".venv" / "rankonce"
    package.mkdir(parents=True)
    (package / "environment.py").touch()
    (tmp_path / "theirs.py").touch()
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for arguments in (("init", "-q"), ("add", "theirs.py"), (*who, "commit", "-qm", "theirs")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert environment.describe_environment()["commit"] == "unknown"
