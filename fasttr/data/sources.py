"""Where rows come from: a file, a folder or the hub, through `datasets`, with errors of one line.

Only JSON, JSON lines, Parquet, CSV and Arrow are read; no loading script, no pickle, no media. A
data set's own files
cannot name a path that is then opened: a folder's files must lie inside it, and features that are
opened by path (images, audio) are refused.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttr.errors import FasttrError, first_line

FILE_KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
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
    cache_dir: str | None = None,
) -> Any:
    """One split as a memory-mapped `datasets.Dataset`, cached by `datasets` between runs.

    `name` is a file (one split, train), a folder (splits inferred from file names), a hub id, or
    json, parquet, csv or arrow for the files named by `data_files` or `data_dir`; those two choose
    within a folder or hub id too. FasttrError when there is nothing there, it is empty, broken
    (naming the line), of another kind, or has no such split.
    """
    import datasets

    path = Path(name).expanduser()
    where: dict[str, Any] = {
        "path": str(path),
        "name": config,
        "data_dir": data_dir,
        "data_files": data_files,
    }
    is_kind = name in BUILDERS and (data_dir is not None or data_files is not None)
    if is_kind:
        where["path"] = name
        missing = next((f for f in _local(data_files, data_dir) if not f.exists()), None)
        if missing is not None:
            raise FasttrError(
                f"{name}: {missing} does not exist: data_files and data_dir name files that are "
                "here"
            )
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
    with _quiet():
        try:
            builder = datasets.load_dataset_builder(**where, cache_dir=cache_dir)
            _check_builder(name, path, builder, is_kind)
            builder.download_and_prepare()
            splits = sorted(builder.info.splits or {})
            base = re.match(r"\w+(\.\w+)*", split)
            if base is None or base.group() not in splits:
                raise FasttrError(
                    f"{name} has no split {split!r}: it has {', '.join(map(repr, splits))}"
                )
            rows = builder.as_dataset(split=split)
        except FasttrError:
            raise
        except Exception as error:  # datasets, the hub and every file reader raise their own kinds
            raise _explain(
                name, path, config, _local(data_files, data_dir) if is_kind else [path], error
            ) from error
    if len(rows) == 0:
        raise FasttrError(f"{name} (split {split}) holds no rows: wanted at least one")
    return rows


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
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    kind = FILE_KINDS.get(suffixes[-1] if suffixes else "")
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


def _check_builder(name: str, path: Path, builder: Any, named_by_user: bool) -> None:
    kind = type(builder).__module__.rsplit(".", 1)[-1]
    if kind not in BUILDERS or not type(builder).__module__.startswith(
        "datasets.packaged_modules."
    ):
        raise FasttrError(
            f"{name} holds {kind} data: wanted JSON, JSON lines, Parquet, CSV or Arrow files"
        )
    if path.is_file() or named_by_user:
        return
    folder = str(path.resolve())
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            # Not resolved further: the hub's own cache is a folder of links to its blobs.
            inside = (
                os.path.commonpath([folder, os.path.normpath(os.path.join(folder, file))]) == folder
            )
            if not (inside if path.is_dir() else file.startswith("hf://datasets/")):
                raise FasttrError(
                    f"{name} names a file outside of it ({file}), which is not followed: move it "
                    "inside"
                )


def _local(data_files: DataFiles, data_dir: str | None) -> list[Path]:
    """The paths here that the user named; patterns and addresses are left to `datasets`."""
    groups = list(data_files.values()) if isinstance(data_files, dict) else [data_files]
    names = [
        name
        for group in groups
        for name in (group if isinstance(group, list) else [group])
        if name is not None
    ]
    base = Path(data_dir or "").expanduser()
    paths = [base / name for name in names if not set("*?[") & set(name) and "://" not in name]
    return paths or ([base] if data_dir is not None and not names and "://" not in data_dir else [])


def _explain(
    name: str, path: Path, config: str | None, read: list[Path], error: Exception
) -> FasttrError:
    import datasets

    causes = [error]
    while (
        cause := causes[-1].__cause__ or causes[-1].__context__
    ) is not None and cause not in causes:
        causes.append(cause)  # type: ignore[arg-type]
    message = first_line(error)
    if "corresponds to no data" in message:
        return FasttrError(f"{name} holds no rows: wanted at least one")
    refused = next(
        (c for c in causes if isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EACCES)),
        None,
    )
    if refused is not None:
        return FasttrError(
            f"{name}: {refused}: free space, or grant access, there or where the cache is"
        )
    if any("scripts are no longer supported" in str(cause) for cause in causes):
        return FasttrError(
            f"{name} is a loading script, which is never run: convert it to JSON lines or Parquet"
        )
    if "BuilderConfig" in message or "Config name is missing" in message:
        told = " ".join(str(error).split())[:300]
        return FasttrError(
            f"{name}: dataset_config {config!r} is not one of its configurations: {told}"
        )
    if read and all(p.exists() for p in read):
        for file in (file for p in read for file in ([p] if p.is_file() else sorted(p.rglob("*")))):
            if (
                file.is_file()
                and FILE_KINDS.get(Path(file.name.removesuffix(".gz")).suffix.lower()) == "json"
            ):
                fault = find_broken_line(file)
                if fault is not None:
                    return FasttrError(fault)
        cause = (
            causes[1]
            if isinstance(error, datasets.exceptions.DatasetsError) and causes[1:]
            else error
        )
        return FasttrError(f"{name} cannot be read: {first_line(cause)}")
    return FasttrError(
        f"{name!r} is no file or folder here, and as a data set of the hub it could not be read "
        f"({type(error).__name__}: {message}): check the name, the network and the access token"
    )


def find_broken_line(path: Path) -> str | None:
    """One line on the first place where a JSON or JSON-lines file (gz too) is broken or changes
    type, else None."""
    types: dict[str, tuple[str, int]] = {}
    try:
        with _open(path) as file:
            if file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                file.seek(0)
                json.loads(file.read().decode("utf-8-sig"))
                return None
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    return (
                        f"{path}: broken JSON at line {number}: {error.msg} (column {error.colno})"
                    )
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
    except json.JSONDecodeError as error:
        return f"{path}: broken JSON at line {error.lineno}: {error.msg} (column {error.colno})"
    except UnicodeDecodeError as error:
        return f"{path}: not UTF-8 text: {error}"
    except (OSError, EOFError) as error:
        return f"{path} cannot be read: {first_line(error)}"
    return None


def _kind_of_value(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return (
        "a list"
        if isinstance(value, list)
        else "a mapping"
        if isinstance(value, dict)
        else "a number"
    )


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _looks_like_path(name: str) -> bool:
    suffix = Path(name.removesuffix(".gz")).suffix.lower()
    return (
        name.startswith((".", "~", os.sep))
        or name.count("/") > 1
        or suffix in FILE_KINDS
        or "://" in name
    )


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
