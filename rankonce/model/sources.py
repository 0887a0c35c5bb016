"""What the name of a checkpoint stands for: a folder on this machine, or a repository on a hub."""

from pathlib import Path


def names_folder(source: str) -> bool:
    """Tell whether a name is a path; the id of a repository is ``owner/name`` or ``name``."""
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
