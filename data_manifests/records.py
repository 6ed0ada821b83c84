"""What is processed: video records, and the manifest that holds them, checks them and names them by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .errors import ColdframeError, UnknownName
from .locations import exist, is_local, is_url, location, reached, scratch_folder, upload, without_file_scheme

SPLITS = ("train", "val", "test")  # or "": in no split


class ManifestError(ColdframeError, ValueError):
    """A manifest that cannot be right; names the lines."""


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """One video, or one segment of one."""

    video_id: str  # the path relative to the root, unless the manifest says otherwise; never a file's stem
    path: str  # relative to the root, with forward slashes; or a URL
    label: int | None  # index into the manifest's class_names
    split: str = ""
    group: str = ""  # person, scene or source: videos of one group are never drawn into different splits
    captions: tuple[str, ...] = ()
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class Manifest:
    """Videos, their classes and their splits."""

    name: str
    root: str
    class_names: tuple[str, ...]
    records: tuple[VideoRecord, ...]

    @classmethod
    def read(cls, path: Path | str, classes: Sequence[str] | None = None, root: Path | str | None = None) -> Manifest:
        """Read and check a `.csv` or `.parquet`, perhaps behind a URL; `tables.py` tells the format.

        Args:
            classes: class names in the order of their labels; may not contradict a class list that the file has.
            root: where the videos lie, if not where the file says.

        Raises:
            ManifestError: the file cannot be right; the message names the lines.
            ConfigError: neither `.csv` nor `.parquet`.
            LocationError: a URL that cannot be read.
        """
        from .tables import read  # that file stands on this one

        with reached(path):
            return read(location(path), classes, root)

    def write(self, path: Path | str) -> None:
        """Write a `.csv` or a `.parquet`, perhaps to a URL; what is written can be read back.

        Raises:
            ManifestError: the manifest cannot be right, or a CSV cannot hold it.
            ConfigError: neither `.csv` nor `.parquet`.
            LocationError: a URL that cannot be written.
        """
        from .tables import write

        place = location(path)
        if is_local(place):
            write(self, place)
            return
        with scratch_folder() as here:
            write(self, here / place.name)
            for file in sorted(here.iterdir(), key=lambda file: file.name == place.name):  # the table last
                upload(file, place.with_name(file.name))

    def check(self, where: Sequence[str] | None = None, *, allow_empty_classes: bool = False) -> Self:
        """Return the manifest if it can be right.

        Args:
            where: the place of each record ("line 7"), for messages; None counts records from 1.
            allow_empty_classes: for a view of a larger manifest, such as one split.

        Raises:
            ManifestError: no videos, unusable text, paths that leave the root, duplicate ids, labels outside the class
                list, unknown splits, impossible times, one video twice, overlapping splits, or empty classes.
        """
        if not self.records:
            raise ManifestError("the manifest holds no video")
        rows: _Rows = list(
            zip(where or [f"record {i + 1}" for i in range(len(self.records))], self.records, strict=True)
        )
        files = _shown_twice(rows, self.root)
        findings = {  # a later one may rely on the absence of an earlier one
            "unusable text": _bad_text(rows),
            "paths that leave the root": _leaving(rows, self.root),
            "unusable class names": _bad_class_names(self.class_names),
            "labels outside the class list": _bad_labels(rows, self.class_names),
            "unknown splits": _bad_splits(rows),
            "impossible times": _bad_times(rows),
            "splits overlap": _overlapping(files),
            "duplicate ids": _duplicate_ids(rows),
            "the same video twice": _repeated(files),
            "classes that no video has": [] if allow_empty_classes else _empty_classes(rows, self.class_names),
        }
        for problem, offenders in findings.items():
            if found := list(offenders):
                raise ManifestError(f"{self.name}: {problem}: {listed(found)}", fix=_FIXES[problem])
        return self

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of everything but name, root, paths and the order of the records."""
        facts = [
            (r.video_id, r.label, r.split, r.group, r.captions, r.start_s, r.end_s)
            for r in sorted(self.records, key=lambda r: r.video_id)
        ]
        return hashlib.sha256(json.dumps([self.class_names, facts]).encode()).hexdigest()[:16]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Video ids in the order of the records."""
        return tuple(r.video_id for r in self.records)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Labels [B] in the order of the records; -1 where unknown."""
        labels = np.array([-1 if r.label is None else r.label for r in self.records], dtype=np.int64)
        labels.flags.writeable = False  # everyone who asks shares it
        return labels

    @cached_property
    def by_id(self) -> dict[str, VideoRecord]:
        """Records by their ids."""
        return {r.video_id: r for r in self.records}

    def split(self, name: str) -> Self:
        """The records of one split, perhaps none, under the same class list; raises UnknownName for a misspelt one."""
        if name not in SPLITS:
            raise UnknownName("split", name, SPLITS)
        return replace(self, records=tuple(r for r in self.records if r.split == name))

    def by_caption(self) -> Self:
        """Every caption a class of its own, for heads that learn sentences: one record for each caption of a video.

        Classes are in the order in which captions first appear; equal captions are one class, and videos without any
        are left out. A video with several captions is there several times under its one id: this is a view to train
        on, not one to extract. Its classes are the captions of all its records: take the split first, lest those of
        test videos be among the classes.

        Raises:
            ManifestError: no video has a caption.
        """
        captioned = [(r, caption.strip()) for r in self.records for caption in r.captions]
        if not captioned:
            fix = "Write them in the column captions, joined by |."
            raise ManifestError(f"{self.name} has no captions", seen=f"{len(self.records):,} videos", fix=fix)
        label = {caption: i for i, caption in enumerate(dict.fromkeys(caption for _, caption in captioned))}
        records = tuple(replace(r, label=label[caption], captions=(caption,)) for r, caption in captioned)
        return replace(self, class_names=tuple(label), records=records)

    def path_of(self, record: VideoRecord) -> str:
        """Where a record's file lies: a path below the root, or the record's URL."""
        return record.path if is_url(record.path) else posixpath.join(self.root, record.path)

    def missing_files(self) -> list[str]:
        """Ids of the records whose file does not exist; raises LocationError where a URL cannot be looked up."""
        places = [self.path_of(r) for r in self.records]
        remote = exist([place for place in places if is_url(place)])
        return [
            r.video_id
            for r, place in zip(self.records, places, strict=True)
            if not (remote[place] if is_url(place) else Path(place).is_file())
        ]

    def describe(self) -> str:
        """Two or three lines for people."""
        n_in = Counter(r.split for r in self.records)
        counts = [f"{n_in[split]:,} {split or 'in no split'}" for split in (*SPLITS, "") if n_in[split]]
        if n_unlabelled := sum(r.label is None for r in self.records):
            counts.append(f"{n_unlabelled:,} without a label")
        lines = [
            f"{self.name}: {len(self.records):,} videos, {len(self.class_names):,} classes",
            f"{' · '.join(counts)}, below {self.root}, fingerprint {self.fingerprint}",
        ]
        splits_of: dict[str, set[str]] = {}
        for r in self.records:
            splits_of.setdefault(r.group, set()).add(r.split)
        if torn := sorted(group for group, splits in splits_of.items() if group and len(splits - {""}) > 1):
            lines.append(f"note: {len(torn):,} groups lie in more than one split: {listed(torn)}")
        return "\n".join(lines)


def absolute_root(root: Path | str) -> str:
    """A root as manifests hold it: absolute, with forward slashes; a URL as it is."""
    root = without_file_scheme(str(root))
    return root if is_url(root) else Path(root).absolute().as_posix()


def relative_to_root(path: str, root: str) -> str | None:
    """A path in its one spelling below the root; a URL as it is; None for what leaves the root.

    Text alone is looked at: a symbolic link below the root may point anywhere.
    """
    if "\\" in path or (".." in path and ".." in path.split("/")) or path[:5].lower() == "file:":
        return None
    if is_url(path):
        return path
    path = Path(os.path.relpath(path, root)).as_posix() if path.startswith("/") else posixpath.normpath(path)
    return None if path in (".", "..") or path.startswith("../") else path


def listed(offenders: Sequence[str], most: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(offenders) - most:,} more" if len(offenders) > most else ""
    return ", ".join(offenders[:most]) + more


# What a manifest may not have: each function yields the places and values at fault.

_FIXES = {
    "unusable text": "An id, a path, a group and a caption are each one line of text without control characters.",
    "paths that leave the root": "Write them relative to the root, with forward slashes and without .. in them.",
    "unusable class names": "Each class has a name of its own: one line, no spaces around it.",
    "labels outside the class list": "A label is an index into it.",
    "unknown splits": f"Write {', '.join(SPLITS)} or nothing.",
    "impossible times": "They are seconds, 0 ≤ start_s < end_s; leave out what is open.",
    "splits overlap": "A video belongs to one split, and so does every second of an untrimmed one.",
    "duplicate ids": "Remove the repetition, or give each row its own video_id.",
    "the same video twice": "Keep one row of each video or segment.",
    "classes that no video has": "Add their videos, or take them off the class list.",
}
_CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")  # breaks a line, or cannot be encoded
_Rows = Sequence[tuple[str, VideoRecord]]


def _bad_text(rows: _Rows) -> Iterator[str]:
    for place, r in rows:
        texts = [("video_id", r.video_id), ("path", r.path), *(("caption", caption) for caption in r.captions)]
        for column, text in texts:
            if not text or _CONTROL.search(text):
                yield f"{place} {column} {text!r}"
        if _CONTROL.search(r.group):
            yield f"{place} group {r.group!r}"


def _leaving(rows: _Rows, root: str) -> Iterator[str]:
    return (f"{place} {r.path!r}" for place, r in rows if relative_to_root(r.path, root) is None)


def _duplicate_ids(rows: _Rows) -> Iterator[str]:
    first: dict[str, str] = {}
    for place, r in rows:
        if first.setdefault(r.video_id, place) != place:
            yield f"{place} {r.video_id!r} (first on {first[r.video_id]})"


def _bad_class_names(class_names: Sequence[str]) -> Iterator[str]:
    first: dict[str, int] = {}
    for number, name in enumerate(class_names, start=1):
        if not name or name != name.strip() or _CONTROL.search(name):
            yield f"line {number} of the class list {name!r}"
        elif first.setdefault(name, number) != number:
            yield f"line {number} of the class list {name!r} (first on line {first[name]})"


def _bad_labels(rows: _Rows, class_names: Sequence[str]) -> Iterator[str]:
    known = range(len(class_names))
    return (
        f"{place} label {r.label} of {len(known)}" for place, r in rows if r.label is not None and r.label not in known
    )


def _empty_classes(rows: _Rows, class_names: Sequence[str]) -> Iterator[str]:
    used = {r.label for _, r in rows}
    return (f"line {i + 1} of the class list {name!r}" for i, name in enumerate(class_names) if i not in used)


def _bad_splits(rows: _Rows) -> Iterator[str]:
    return (f"{place} {r.split!r}" for place, r in rows if r.split not in (*SPLITS, ""))


def _bad_times(rows: _Rows) -> Iterator[str]:
    for place, r in rows:
        start, end = _times(r)
        if not 0 <= start < end or r.end_s == math.inf:
            yield f"{place} start_s={r.start_s} end_s={r.end_s}"


def _shown_twice(rows: _Rows, root: str) -> dict[str, _Rows]:
    """The rows of each file that has more than one; Unicode's two spellings of a letter are one file."""
    files: dict[str, list[tuple[str, VideoRecord]]] = {}
    for row in rows:
        path = relative_to_root(row[1].path, root) or row[1].path
        files.setdefault(unicodedata.normalize("NFC", path), []).append(row)
    return {file: shown for file, shown in files.items() if len(shown) > 1}


def _overlapping(files: dict[str, _Rows]) -> Iterator[str]:
    for file, rows in files.items():
        furthest: dict[str, tuple[float, str]] = {}  # of each split: where its segments so far end, and whose end it is
        for place, r in sorted(rows, key=lambda row: _times(row[1])):
            start, end = _times(r)
            for split, (until, owner) in furthest.items():
                if r.split and r.split != split and start < until:
                    yield f"{place} {file!r} in {r.split} ({owner} in {split})"
            if r.split and (r.split not in furthest or end > furthest[r.split][0]):
                furthest[r.split] = (end, place)


def _repeated(files: dict[str, _Rows]) -> Iterator[str]:
    for file, rows in files.items():
        first: dict[tuple[float, float], str] = {}
        for place, r in rows:
            if first.setdefault(_times(r), place) != place:
                yield f"{place} {file!r} (first on {first[_times(r)]})"


def _times(record: VideoRecord) -> tuple[float, float]:
    return record.start_s or 0.0, math.inf if record.end_s is None else record.end_s
