"""The public datasets that RankOnce knows, and the way from their files to the common form."""

import shutil
import tempfile
from pathlib import Path

from rankonce.datasets import cranfield, esci, goodbooks, mind, movielens_files, wands
from rankonce.datasets.amazon_reviews import CATEGORIES, amazon_adapter
from rankonce.datasets.common_form import (
    MANIFEST,
    Adapter,
    Dataset,
    SourceFiles,
    TableWriter,
    open_dataset,
    write_manifest,
)
from rankonce.datasets.download import Progress, fetch_file, sha256_of, unpack_zip
from rankonce.errors import DataError

# The category that stands for all in a list: a small one.
_AMAZON_EXAMPLE = "All_Beauty"
_AMAZON = {f"amazon-{year}": year for year in CATEGORIES}
ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        *movielens_files.ADAPTERS,
        *(amazon_adapter(year, _AMAZON_EXAMPLE) for year in CATEGORIES),
        *goodbooks.ADAPTERS,
        *mind.ADAPTERS,
        *wands.ADAPTERS,
        *esci.ADAPTERS,
        *cranfield.ADAPTERS,
    )
}


def find_adapter(name: str) -> Adapter:
    """Return the adapter of a dataset; ``amazon-2023:CATEGORY`` names one category.

    Raises:
        DataError: there is no such dataset or category.
    """
    if name in ADAPTERS:
        return ADAPTERS[name]
    family, _, category = name.partition(":")
    if family in _AMAZON:
        return amazon_adapter(_AMAZON[family], category)
    raise DataError(f"dataset: should be one of {', '.join(ADAPTERS)}, is {name!r}")


def prepare_dataset(
    adapter: Adapter,
    out: Path,
    *,
    given: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Dataset:
    """Download a dataset, or take files at hand, and write its tables into a folder.

    A folder that holds the same dataset already is checked and returned as it is, unless files are
    given. Downloads stay in ``out/source``. What is written appears whole or not at all.

    Args:
        given: a folder or a file of the source, loose or as its archive, instead of a download.
        progress: is told of every piece that is downloaded.

    Raises:
        DataError: files are missing or broken, a download fails, or the disk is full.
    """
    if given is None and (out / MANIFEST).exists():
        dataset = open_dataset(out, verify=True)
        if dataset.name != adapter.name:
            raise DataError(f"{out}: holds {dataset.name}; choose another folder")
        if dataset.manifest["adapter_version"] == adapter.version:
            return dataset
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths = _fetch(adapter, out, progress) if given is None else _find(adapter, given)
        with tempfile.TemporaryDirectory(dir=out, prefix=".work-") as work:
            _convert(adapter, out, Path(work), paths, str(given or out / "source"))
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror or error}") from error
    return open_dataset(out)


def _fetch(adapter: Adapter, out: Path, progress: Progress) -> list[Path]:
    if not adapter.files:
        raise DataError(
            f"{adapter.name}: no address serves its files; give them with --from: "
            f"{', '.join(adapter.parts)}"
        )
    return [fetch_file(remote, out / "source", progress=progress) for remote in adapter.files]


def _find(adapter: Adapter, given: Path) -> list[Path]:
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise DataError(f"{given}: there is no such file or folder")
    files = sorted(path for path in given.rglob("*") if path.is_file())
    loose = [path for path in files if any(path.match(part) for part in adapter.parts)]
    archives = {remote.name for remote in adapter.files}
    found = loose or [path for path in files if path.name in archives]
    if not found:
        names = ", ".join(dict.fromkeys((*adapter.parts, *sorted(archives))))
        raise DataError(f"{given}: should hold files of {adapter.name}: {names}")
    return found


def _convert(adapter: Adapter, out: Path, work: Path, paths: list[Path], where: str) -> None:
    parts: list[Path] = []
    for path in paths:
        if path.suffix == ".zip":
            folder = work / path.stem
            folder.mkdir()
            parts += unpack_zip(path, folder, adapter.parts)
        else:
            parts.append(path)
    tables = work / "tables"
    tables.mkdir()
    with TableWriter(tables, clock=adapter.clock) as writer:
        adapter.convert(SourceFiles(parts, where), writer)
        described = writer.finish()
    files = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
    ]
    write_manifest(tables, adapter, files=files, tables=described, writer=writer)
    # Without a manifest the folder is no dataset: the old one goes first, the new one comes last.
    (out / MANIFEST).unlink(missing_ok=True)
    for name in described:
        shutil.move(tables / f"{name}.parquet", out / f"{name}.parquet")
    shutil.move(tables / MANIFEST, out / MANIFEST)
