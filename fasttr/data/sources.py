"""Where rows come from: a file, a folder or the hub, through `datasets`, with errors of one line.

Only JSON, JSON lines, Parquet, CSV and Arrow are read; no loading script, no pickle, no media. A
data set's own files cannot name a path that is then opened: a folder's files must lie inside it,
and features that are opened by path (images, audio) are refused.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fasttr.errors import FasttrError, first_line, one_line
from fasttr.hub import go_offline_if_unreachable

FILE_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
MOST_ENTRIES = 100_000  # looking through more, such as a home folder, would seem to hang
BUILDERS = ("json", "parquet", "csv", "arrow")
DataFiles = str | list[str] | dict[str, str | list[str]] | None


def read_rows(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    data_dir: str | None = None,
    data_files: DataFiles = None,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> Any:
    """One split as a memory-mapped `datasets.Dataset`, cached by `datasets` between runs; or as an
    `IterableDataset`, of which nothing is read yet.

    `name` is a file (one split, train), a folder (splits inferred from file names), a hub id, or
    json, parquet, csv or arrow for the files named by `data_files` or `data_dir`; those two choose
    within a folder or hub id too. FasttrError when there is nothing there, it is empty, broken
    (naming the line), of another kind, or has no such split.
    """
    place = _place(name, config, data_dir, data_files)
    with _quiet():
        try:
            rows = _read(place, split, streaming, cache_dir)
        except FasttrError:
            raise
        except Exception as error:  # datasets, the hub and every file reader raise their own kinds
            raise _explained(place, error) from error
    if not streaming and len(rows) == 0:
        raise FasttrError(f"{name} (split {split}) holds no rows: wanted at least one")
    return rows


class _Place(NamedTuple):
    """Where rows are, as `datasets` is told and as a person named it."""

    name: str
    path: Path
    config: str | None
    where: dict[str, Any]  # arguments of load_dataset_builder
    named_files: list[Path]  # what the user named that is here

    @property
    def names_files(self) -> bool:
        return self.where["path"] in BUILDERS


def _place(name: str, config: str | None, data_dir: str | None, data_files: DataFiles) -> _Place:
    path = Path(name).expanduser()
    where: dict[str, Any] = {
        "path": str(path),
        "name": config,
        "data_dir": data_dir,
        "data_files": data_files,
    }
    named_files = [path]
    if name in BUILDERS and (data_dir is not None or data_files is not None):
        named_files = _local(data_files, data_dir)
        missing = next((file for file in named_files if not file.exists()), None)
        if missing is not None:
            raise FasttrError(
                f"{name}: {missing} does not exist: data_files and data_dir name files that are "
                "here"
            )
        where["path"] = name
    elif path.is_file():
        if config is not None:
            raise FasttrError(f"{name} is a file and has no configurations: leave out {config!r}")
        if data_dir is not None or data_files is not None:
            raise FasttrError(f"{name} is a file: leave out data_dir and data_files")
        where = {"path": _kind_of_file(path), "data_files": {"train": str(path.resolve())}}
    elif path.is_dir():
        _check_folder(path)
        where["path"] = str(path.resolve())
    elif _looks_like_path(name):
        raise FasttrError(
            f"{name} does not exist: give a {', '.join(FILE_KINDS)} file (.gz too), a folder or a "
            "hub id"
        )
    else:
        go_offline_if_unreachable()
    return _Place(name, path, config, where, named_files)


def _read(place: _Place, split: str, streaming: bool, cache_dir: str | None) -> Any:
    import datasets

    builder = datasets.load_dataset_builder(**place.where, cache_dir=cache_dir)
    _check_builder(place, builder)
    if place.path.is_dir() and not place.names_files:
        of_these_files = _cache_of(builder.config.data_files, cache_dir)
        builder = datasets.load_dataset_builder(**place.where, cache_dir=of_these_files)
    if streaming:
        by_split = builder.as_streaming_dataset()
        _require_split(place.name, split, sorted(by_split))
        return by_split[split]
    builder.download_and_prepare()
    _require_split(place.name, split, sorted(builder.info.splits or {}))
    return builder.as_dataset(split=split)


def _cache_of(data_files: Any, cache_dir: str | None) -> str:
    """A cache for these files as they are now.

    Where a folder's README lists its files, `datasets` knows what it prepared by the folder's name
    and that list: a changed file, or another folder of the same name, would give the old rows.
    """
    import datasets

    states = [(file, os.stat(file)) for files in data_files.values() for file in map(str, files)]
    text = repr([(file, state.st_size, state.st_mtime_ns) for file, state in states])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return os.path.join(cache_dir or datasets.config.HF_DATASETS_CACHE, f"files-{digest}")


def _require_split(name: str, split: str, there: list[str]) -> None:
    base = re.match(r"\w+(\.\w+)*", split)
    if base is None or base.group() not in there:
        raise FasttrError(
            f"{name} has no split {split!r}: it has {', '.join(map(repr, there))}; set "
            "dataset_train_split, or for evaluation eval_dataset_name or test_split_size"
        )


def check_features(name: str, features: Any, columns: tuple[str, ...]) -> None:
    """Raise FasttrError for a column whose values are decoded from files (images, audio, video)."""
    for column in columns:
        opened = _opened_by_path(features[column])
        if opened is not None:
            raise FasttrError(
                f"{name}: column {column!r} is of type {opened}: fasttr trains on text alone"
            )


def _opened_by_path(feature: Any) -> str | None:
    kind = type(feature).__name__
    if isinstance(feature, dict):
        inner = list(feature.values())
    elif isinstance(feature, list | tuple):
        inner = list(feature)
    elif kind in ("List", "LargeList", "Sequence"):
        inner = [feature.feature]
    else:
        return None if kind in ("Value", "ClassLabel", "Json") else kind
    return next((found for found in map(_opened_by_path, inner) if found is not None), None)


def _kind_of_file(path: Path) -> str:
    kind = _kind(path.name)
    if kind is None:
        raise FasttrError(
            f"{path} is of an unknown kind: wanted {', '.join(FILE_KINDS)}, or one of them with .gz"
        )
    try:
        with _open(path) as file:
            head = file.read(1)
    except (OSError, EOFError) as error:
        raise FasttrError(f"{path} cannot be read: {first_line(error)}") from error
    if not head:
        raise FasttrError(f"{path} is empty: wanted at least one row")
    return kind


def _check_folder(path: Path) -> None:
    if not any(path.iterdir()):
        raise FasttrError(f"{path} is an empty folder: wanted {', '.join(FILE_KINDS)} files")
    entries = (name for _, folders, files in os.walk(path) for name in folders + files)
    if next(itertools.islice(entries, MOST_ENTRIES, None), None) is not None:
        raise FasttrError(
            f"{path} holds more than {MOST_ENTRIES} files: name the folder, or the file, with the "
            "rows"
        )
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        raise FasttrError(
            f"{path} was written by save_to_disk: write it with to_parquet or to_json instead"
        )


def _check_builder(place: _Place, builder: Any) -> None:
    module = type(builder).__module__
    kind = module.rsplit(".", 1)[-1]
    if kind not in BUILDERS or not module.startswith("datasets.packaged_modules."):
        raise FasttrError(
            f"{place.name} holds {kind} data: wanted JSON, JSON lines, Parquet, CSV or Arrow files"
        )
    if place.names_files:
        return
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            if not _is_inside(place.path, file):
                raise FasttrError(
                    f"{place.name} names a file outside of it ({file}), which is not followed: "
                    "move it inside"
                )


def _is_inside(path: Path, file: str) -> bool:
    """Whether a file that a data set names lies in its own folder, or in its hub repository."""
    if not path.is_dir():
        return file.startswith("hf://datasets/")
    folder = str(path.resolve())
    # Not resolved further: the hub's own cache is a folder of links to its blobs.
    absolute = os.path.normpath(os.path.join(folder, file))
    return os.path.commonpath([folder, absolute]) == folder


def _local(data_files: DataFiles, data_dir: str | None) -> list[Path]:
    """The paths here that the user named; patterns and addresses are left to `datasets`."""
    groups = list(data_files.values()) if isinstance(data_files, dict) else [data_files]
    names: list[str] = []
    for group in groups:
        names += group if isinstance(group, list) else [group] if group is not None else []
    base = Path(data_dir or "").expanduser()
    paths = [base / name for name in names if not set("*?[") & set(name) and "://" not in name]
    is_folder = data_dir is not None and not names and "://" not in data_dir
    return paths or ([base] if is_folder else [])


def _explained(place: _Place, error: Exception) -> FasttrError:
    """What `datasets` says, in one line that names the place and the remedy."""
    name = place.name
    causes = _causes(error)
    message = first_line(error)
    if "corresponds to no data" in message:
        return FasttrError(f"{name} holds no rows: wanted at least one")
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EACCES):
            return FasttrError(
                f"{name}: {cause}: free space, or grant access, there or where the cache is"
            )
    if any("scripts are no longer supported" in str(cause) for cause in causes):
        return FasttrError(
            f"{name} is a loading script, which is never run: convert it to JSON lines or Parquet"
        )
    if "BuilderConfig" in message or "Config name is missing" in message:
        return FasttrError(
            f"{name}: dataset_config {place.config!r} is not one of its configurations: "
            f"{one_line(error)}"
        )
    if place.named_files and all(path.exists() for path in place.named_files):
        return _about_files(place, causes)
    if "Offline" in message or isinstance(error, ConnectionError):
        return FasttrError(
            f"there is no file or folder {name!r} here, and the hub does not answer "
            "or is not asked (HF_HUB_OFFLINE): check the name and the network"
        )
    return FasttrError(
        f"{name!r} is no file or folder here, and as a data set of the hub it could not be read "
        f"({type(error).__name__}: {message}): check the name, the network and the access token"
    )


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from."""
    causes = [error]
    while True:
        cause = causes[-1].__cause__ or causes[-1].__context__
        if cause is None or cause in causes:
            return causes
        causes.append(cause)


def _about_files(place: _Place, causes: list[BaseException]) -> FasttrError:
    """What is wrong in files that are here: the first broken line, or what the reader says."""
    import datasets

    for path in place.named_files:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if not file.is_file() or _kind(file.name) != "json":
                continue
            fault = find_broken_line(file)
            if fault is not None:
                return FasttrError(fault)
    wraps = isinstance(causes[0], datasets.exceptions.DatasetsError) and len(causes) > 1
    is_csv = any(_kind(path.name) == "csv" for path in place.named_files)
    remedy = "; wanted UTF-8 text with a comma between columns, their names first" if is_csv else ""
    why = first_line(causes[1 if wraps else 0]).rstrip()
    return FasttrError(f"{place.name} cannot be read: {why}{remedy}")


def _kind(name: str) -> str | None:
    """What reads a file of that name."""
    return FILE_KINDS.get(Path(name.lower().removesuffix(".gz")).suffix)


def find_broken_line(path: Path) -> str | None:
    """One line on the first place where a JSON or JSON-lines file (gz too) is broken or changes
    type, else None."""
    try:
        with _open(path) as file:
            if file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                file.seek(0)
                json.loads(file.read().decode("utf-8-sig"))
                return None
            file.seek(0)
            return _broken_row(path, file)
    except json.JSONDecodeError as error:
        return f"{path}: broken JSON at line {error.lineno}: {error.msg} (column {error.colno})"
    except UnicodeDecodeError as error:
        return f"{path}: not UTF-8 text: {error}"
    except (OSError, EOFError) as error:
        return f"{path} cannot be read: {first_line(error)}"


def _broken_row(path: Path, lines: Iterable[bytes]) -> str | None:
    """The first line of JSON lines that is broken or of other types than those before it."""
    types: dict[str, tuple[str, int]] = {}  # of each key: its kind, and the line that said so
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            return f"{path}: broken JSON at line {number}: {_fault(text, error)}"
        if not isinstance(row, dict):
            return f"{path}: line {number} is not a JSON object; wanted one object a line"
        for key, value in row.items():
            if value is None:
                continue
            kind = _kind_of_value(value)
            before, first = types.setdefault(key, (kind, number))
            if kind != before:
                where = f"{before} at line {first} and {kind} at line {number}"
                return f"{path}: {key!r} is {where}; make them one"
    return None


def _fault(text: str, error: json.JSONDecodeError) -> str:
    """Where a line breaks off, its end is meant: the parser then counts from the next line."""
    if error.pos >= len(text.rstrip()):
        return f"{error.msg}, where the line ends"
    return f"{error.msg} (column {error.colno})"


def _kind_of_value(value: Any) -> str:
    kinds = {"str": "text", "list": "a list", "dict": "a mapping"}
    return kinds.get(type(value).__name__, "a number")


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _looks_like_path(name: str) -> bool:
    is_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "://" in name
    return is_path or _kind(name) is not None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and logged errors of `datasets`: the bars are not ours, the errors
    are raised again."""
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if had_bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()
