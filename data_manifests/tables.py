"""Manifests as files, both directions: CSV for people and their other programs, Parquet for large sets.

A table has the columns `COLUMNS`, of which `path` alone is compulsory. A label is a class *name*; captions are joined
by `|` in a CSV and are a list in Parquet. Beside a table may lie

    <stem>.classes.txt   one class a line, in the order of the labels; without it, the distinct labels in sorted order
    <stem>.root.txt      the folder that paths start from; without it, the folder of the table

A Parquet written here carries both inside, and may also hold a view (one split) in which some classes have no video.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import ConfigError
from .locations import is_local
from .records import Manifest, ManifestError, VideoRecord, absolute_root, is_url, listed, relative_to_root

COLUMNS = ("video_id", "path", "label", "split", "group", "start_s", "end_s", "captions")
_METADATA = b"coldframe"

Row = tuple[str, Mapping[str, Any]]  # its place in the file, for messages; its cells by column


def read(path: Path, classes: Sequence[str] | None = None, root: Path | str | None = None) -> Manifest:
    """Read and check a manifest; see `Manifest.read`."""
    rows, carried = _read_parquet(path) if _is_parquet(path) else (_read_csv(path), {})
    folder = _root_from(path, carried, root)
    class_names = _class_names(path, carried, classes, rows)
    ids = {name: label for label, name in enumerate(class_names)}
    _refuse_unknown_labels(path, rows, ids)
    records = tuple(_record(place, cells, folder, ids) for place, cells in rows)
    manifest = Manifest(carried.get("name", path.stem), folder, class_names, records)
    return manifest.check([place for place, _ in rows], allow_empty_classes=bool(carried))


def write(manifest: Manifest, path: Path) -> None:
    """Write a manifest; see `Manifest.write`."""
    is_parquet = _is_parquet(path)
    manifest.check(allow_empty_classes=is_parquet)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # a CSV cut short would read as a smaller data set
    try:
        (_write_parquet if is_parquet else _write_csv)(manifest, path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_parquet(path: Path) -> bool:
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError("a manifest is a CSV or a Parquet file", seen=path.name, wanted="a name in .csv or .parquet")
    return path.suffix == ".parquet"


# CSV


def _read_csv(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin a file with a byte-order mark
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            _refuse_bad_columns(header, path)
            for cells in reader:
                if not cells:
                    continue  # a blank line
                place = f"line {reader.line_num}"
                if len(cells) != len(header):
                    fix = "Put quotes around a value that holds a comma."
                    wanted = f"{len(header)}, one a column"
                    raise ManifestError(f"{path.name} {place}: {len(cells)} values", wanted=wanted, fix=fix)
                rows.append((place, dict(zip(header, cells, strict=True))))
        except csv.Error as error:
            raise ManifestError(f"{path.name} line {reader.line_num}: not a CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path.name} after line {reader.line_num}: not UTF-8: {error.reason}") from None
    if not rows:
        raise ManifestError(f"{path.name} holds no video", wanted="a header, then one line a video")
    return rows


def _write_csv(manifest: Manifest, path: Path, part: Path) -> None:
    piped = [f"{r.video_id!r}: {caption!r}" for r in manifest.records for caption in r.captions if "|" in caption]
    if piped:
        raise ManifestError(
            f"captions with a |, which joins captions in a CSV: {listed(piped)}", fix="Write a .parquet."
        )
    root = _root_as_text(manifest.root, path)
    _sidecar(path, "classes", "".join(f"{name}\n" for name in manifest.class_names))
    _sidecar(path, "root", "" if root == "." else f"{root}\n")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for cells in _cells(manifest):
            writer.writerow("|".join(cell) if isinstance(cell, tuple) else cell for cell in cells)


def _sidecar(path: Path, kind: str, text: str) -> None:
    """Write a text beside a table; an empty one removes what an earlier table left there."""
    file = path.with_suffix(f".{kind}.txt")
    if text:
        file.write_text(text, encoding="utf-8")
    else:
        file.unlink(missing_ok=True)


def _read_sidecar(path: Path, kind: str) -> list[str] | None:
    file = path.with_suffix(f".{kind}.txt")
    try:
        return file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{file.name} is not UTF-8: {error.reason}") from None


# Parquet


def _read_parquet(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows, and what a Parquet of ours carries inside: name, root, classes."""
    import pyarrow
    import pyarrow.parquet

    # Threads of pyarrow's that hold a file of Python's may outlive the interpreter, and abort the process as it ends.
    content = pyarrow.BufferReader(path.read_bytes())
    try:
        with pyarrow.parquet.ParquetFile(content) as file:
            table = file.read(use_threads=False)
        carried = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
        rows = [(f"row {number}", cells) for number, cells in enumerate(table.to_pylist(), start=1)]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ManifestError(f"{path.name} is not a readable Parquet file: {error}") from None
    if not isinstance(carried, dict) or not isinstance(carried.get("classes", []), list):
        raise ManifestError(f"{path.name} is not a readable Parquet file", seen=f"{carried!r} in its metadata")
    _refuse_bad_columns(table.column_names, path)
    return rows, carried


def _write_parquet(manifest: Manifest, path: Path, part: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    text, seconds = pyarrow.string(), pyarrow.float64()
    kinds = (text, text, text, text, text, seconds, seconds, pyarrow.list_(text))
    carried = {"name": manifest.name, "root": _root_as_text(manifest.root, path), "classes": manifest.class_names}
    schema = pyarrow.schema(zip(COLUMNS, kinds, strict=True), metadata={_METADATA: json.dumps(carried).encode()})
    columns = [
        pyarrow.array(cells, kind) for cells, kind in zip(zip(*_cells(manifest), strict=True), kinds, strict=True)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), part)


def _cells(manifest: Manifest) -> Iterator[tuple[Any, ...]]:
    """Each record in the order of `COLUMNS`."""
    for r in manifest.records:
        label = None if r.label is None else manifest.class_names[r.label]
        yield r.video_id, r.path, label, r.split, r.group, r.start_s, r.end_s, r.captions


# Cells


def _refuse_bad_columns(header: Sequence[str], path: Path) -> None:
    if unknown := list(dict.fromkeys(column for column in header if column not in COLUMNS)):
        one = len(unknown) == 1
        near = {column: difflib.get_close_matches(column.strip().lower(), COLUMNS, n=1) for column in unknown}
        meant = [found[0] if one else f"{found[0]} by {column!r}" for column, found in near.items() if found]
        raise ManifestError(
            f"{path.name}: unknown column{'' if one else 's'}",
            seen=listed([repr(column) for column in unknown], most=20),
            wanted=f"columns among {', '.join(COLUMNS)}, separated by commas",
            fix=f"Did you mean {', '.join(meant)}?" if meant else f"Rename or remove {'it' if one else 'them'}.",
        )
    for column in header:
        if header.count(column) > 1:
            raise ManifestError(f"{path.name}: the column {column} is there twice")
    if "path" not in header:
        raise ManifestError(
            f"{path.name}: no column path", seen=", ".join(header) or "no header", wanted="a header line"
        )


def _class_names(
    path: Path, carried: Mapping[str, Any], given: Sequence[str] | None, rows: Sequence[Row]
) -> tuple[str, ...]:
    """The class list: inside the file, beside it, as given, or the distinct labels in sorted order."""
    known = carried.get("classes") or _read_sidecar(path, "classes")
    if known and given and list(known) != list(given):
        raise ManifestError(
            f"{path.name} has its own class list, and it is not the one asked for",
            seen=listed(list(known)),
            wanted=listed(list(given)),
            fix="Leave out one of the two.",
        )
    return tuple(known or given or sorted({_text(*row, "label") for row in rows} - {""}))


def _refuse_unknown_labels(path: Path, rows: Sequence[Row], ids: Mapping[str, int]) -> None:
    unknown = []
    for place, cells in rows:
        label = _text(place, cells, "label")
        if label and label not in ids:
            near = difflib.get_close_matches(label, ids, n=1)
            unknown.append(f"{place} {label!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if unknown:
        fix = f"Mend them, or add them to the class list (of {len(ids)})."
        raise ManifestError(f"{path.name}: labels that the class list lacks: {listed(unknown)}", fix=fix)


def _record(place: str, cells: Mapping[str, Any], root: str, ids: Mapping[str, int]) -> VideoRecord:
    path = _text(place, cells, "path")
    path = (relative_to_root(path, root) or path) if path else path  # what leaves the root is refused by the check
    return VideoRecord(
        video_id=_text(place, cells, "video_id") or path,
        path=path,
        label=ids.get(_text(place, cells, "label")),
        split=_text(place, cells, "split"),
        group=_text(place, cells, "group"),
        captions=_captions(place, cells),
        start_s=_seconds(place, cells, "start_s"),
        end_s=_seconds(place, cells, "end_s"),
    )


def _text(place: str, cells: Mapping[str, Any], column: str) -> str:
    value = cells.get(column)
    if value is not None and not isinstance(value, str):
        fix = "A label is a class name, not a number." if column == "label" else None
        raise ManifestError(f"{place}: {column} is not text", seen=repr(value), fix=fix)
    return value or ""


def _captions(place: str, cells: Mapping[str, Any]) -> tuple[str, ...]:
    value = cells.get("captions") or ()
    captions = tuple(value.split("|") if isinstance(value, str) else value)
    if not all(isinstance(caption, str) for caption in captions):
        raise ManifestError(f"{place}: captions are not text", seen=repr(value))
    return captions


def _seconds(place: str, cells: Mapping[str, Any], column: str) -> float | None:
    value = cells.get(column)
    try:
        return None if value in (None, "") else float(value)
    except (TypeError, ValueError):
        raise ManifestError(f"{place}: {column} is not a number of seconds", seen=repr(value), wanted="12.5") from None


# The root is written relative to the table where it lies beneath it, so that a folder of both can be moved.


def _root_as_text(root: str, path: Path) -> str:
    root = absolute_root(root)
    try:
        return PurePosixPath(root).relative_to(path.parent.absolute().as_posix()).as_posix()
    except ValueError:
        return root


def _root_from(path: Path, carried: Mapping[str, Any], given: Path | str | None) -> str:
    """Where paths start from: as given, inside the file, beside it, or the folder of the table."""
    if given is not None:
        return absolute_root(given)
    root = carried.get("root") or (_read_sidecar(path, "root") or ["."])[0]
    if is_url(root) or root.startswith("/"):
        return absolute_root(root)
    folder = path.parent / root
    return absolute_root(folder if is_local(folder) else folder.resolve())
