"""What somebody's arrays say of the videos, or a manifest of theirs: labels, class names, splits, groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data_manifests.errors import ConfigError, UnknownName
from ...data_manifests.folder import SPLIT_FOLDERS
from ...data_manifests.records import Manifest, VideoRecord, absolute_root, listed
from ...data_manifests.splits import draw_splits
from .parcels import Leaf

_LABELS, _CLASSES = ("labels", "label", "y", "targets"), ("classes", "class_names")


@dataclass(frozen=True, slots=True)
class Reading:
    """What the user says of a file; what is None is found by looking."""

    feature: str | None = None  # what the numbers are: embedding | cls.K | tokens.K
    dataset: str | None = None
    ids: str | None = None
    labels: str | None = None
    classes: str | None = None
    group: str | None = None
    model: str | None = None  # the tower that made them
    pretrained: str | None = None
    dtype: str | None = None
    test_fraction: float | None = None  # drawn for testing, where the file has no splits; groups stay whole


@dataclass(frozen=True, slots=True)
class Videos:
    """The arrays of one feature, a video each."""

    clips: Mapping[str, Leaf]  # id → [T, ...] or one frame [...]
    places: Mapping[str, tuple[str, Any]]  # id → the folder that holds its other arrays, and where in them it is
    notes: tuple[str, ...]


def manifest_of(
    leaves: Mapping[str, Leaf], videos: Videos, reading: Reading, source: Path
) -> tuple[Manifest, tuple[str, ...]]:
    """A manifest of the file's own labels and groups, and where they were found."""
    notes: list[str] = []
    key, values = _facts(leaves, videos, reading.labels, _LABELS)
    splits = dict.fromkeys(videos.clips, "")
    if values is not None:
        class_key, classes = _classes(leaves, reading)
        labels, class_names = _labels(key, values, classes)
        notes.append(f"labels from {key}, class names from {class_key or key}")
    else:
        labels, class_names, splits = _folders(list(videos.clips))
        notes.append("labels from the folders" if class_names else "no labels: give --labels KEY or --manifest FILE")
    group_key, groups = _facts(leaves, videos, reading.group, ())
    if groups is not None:
        notes.append(f"groups from {group_key}")
    records = tuple(
        VideoRecord(video_id, video_id, labels[i], splits[video_id], "" if groups is None else str(groups[i]))
        for i, video_id in enumerate(videos.clips)
    )
    manifest = Manifest(source.stem, absolute_root(source if source.is_dir() else source.parent), class_names, records)
    manifest.check(allow_empty_classes=True)
    if reading.test_fraction is not None:
        if any(splits.values()) or not class_names:
            raise ConfigError(
                "a test split is drawn from labelled videos without splits",
                seen="splits from folders" if class_names else "no labels",
                fix="Leave out --test-fraction.",
            )
        manifest = draw_splits(manifest, reading.test_fraction, 0.0)
        n_test = sum(record.split == "test" for record in manifest.records)
        notes.append(f"{n_test:,} videos drawn for testing{', whole groups' if groups else ''}")
    elif not any(splits.values()):
        notes.append("no splits: give --manifest FILE or --test-fraction 0.2")
    return manifest, tuple(notes)


def _facts(
    leaves: Mapping[str, Leaf], videos: Videos, key: str | None, usual: Sequence[str]
) -> tuple[str, list[Any] | None]:
    """One value a video, from an array beside the features or from one in each video's group; and that array's name."""
    places = list(videos.places.values())
    folder, index = places[0]
    if index is not None:
        beside = [f"{folder}/{name}".lstrip("/") for name in usual]
        if key is None:
            key = next((name for name in beside if name in leaves and leaves[name].shape == (len(places),)), None)
        if key is None:
            return "", None
        found, leaf = named_leaf(leaves, key, folder, "array")
        if leaf.shape != (len(places),):
            raise ConfigError(f"{found} is not one value a video", seen=list(leaf.shape), wanted=f"[{len(places)}]")
        return found, _values(leaf)
    held = [{last(name) for name in leaves if parent(name) == group} for group, _ in places[:1] if group]
    if key is None:
        key = next((name for name in usual if held and name in held[0]), None)
    if key is None:
        return "", None
    values: list[Any] = []
    for video_id, (group, _) in videos.places.items():
        leaf = leaves.get(f"{group}/{key}") if group else None
        if leaf is None or math.prod(leaf.shape) != 1:
            raise ConfigError(
                f"{key} is not one value a video", seen="nothing" if leaf is None else list(leaf.shape),
                wanted=f"one value in {video_id}/{key}", fix="Give --manifest FILE instead.",
            )  # fmt: skip
        values += _values(leaf)
    return key, values


def _classes(leaves: Mapping[str, Leaf], reading: Reading) -> tuple[str | None, list[str] | None]:
    """The array of class names, in the order of the labels."""
    key = reading.classes or next(
        (name for name in _CLASSES if name in leaves and leaves[name].dtype.kind in "US"), None
    )
    return (None, None) if key is None else (key, texts(named_leaf(leaves, key, "", "array of class names")[1]))


def _labels(key: str, values: Sequence[Any], classes: list[str] | None) -> tuple[list[int | None], tuple[str, ...]]:
    """Labels as indices into class names; numbers without names are their own names."""
    is_text = isinstance(values[0], str)
    if not is_text and not all(float(value).is_integer() for value in values):
        raise ConfigError(
            f"{key} holds no labels", seen=listed([str(value) for value in values]), wanted="whole numbers"
        )
    if classes is not None and not is_text:
        if outside := sorted({int(v) for v in values if not -1 <= int(v) < len(classes)}):
            raise ConfigError(
                f"labels of {key} are not in the list of {len(classes)} classes", seen=listed(list(map(str, outside)))
            )
        return [None if int(value) < 0 else int(value) for value in values], tuple(classes)
    known = {value if is_text else int(value) for value in values} - {"", -1}
    names = classes if classes is not None else [str(value) for value in sorted(known)]
    index = {name: i for i, name in enumerate(names)}
    said = [value if is_text else str(int(value)) for value in values]
    if unknown := sorted({*said} - {*index, "", "-1"}):
        raise ConfigError(f"labels of {key} that the list of classes lacks", seen=listed(unknown))
    return [index.get(label) for label in said], tuple(names)


def _folders(ids: Sequence[str]) -> tuple[list[int | None], tuple[str, ...], dict[str, str]]:
    """Labels, class names and splits of ids such as class/clip or train/class/clip; none where not all are such."""
    parts = [video_id.split("/") for video_id in ids]
    depth = 1 if all(len(p) > 1 and p[0].casefold() in SPLIT_FOLDERS for p in parts) else 0
    splits = {i: SPLIT_FOLDERS[p[0].casefold()] if depth else "" for i, p in zip(ids, parts, strict=True)}
    if not all(len(p) > depth + 1 for p in parts):
        return [None] * len(ids), (), splits
    names = sorted({p[depth] for p in parts})
    return [names.index(p[depth]) for p in parts], tuple(names), splits


def matched(manifest: Manifest, ids: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The manifest's id of each of the file's ids, and a note on those that have none."""
    aliases: list[dict[str, list[str]]] = [{}, {}, {}]  # the id; the path without suffix; the file's name without it
    for record in manifest.records:
        stem = record.path.rpartition("/")[2].rpartition(".")[0] or record.path.rpartition("/")[2]
        path = f"{record.path.rpartition('/')[0]}/{stem}".lstrip("/")
        for known, alias in zip(aliases, (record.video_id, path, stem), strict=True):
            known.setdefault(alias, []).append(record.video_id)
    named: dict[str, str] = {}
    lost: list[str] = []
    for video_id in ids:
        own = next((known[video_id][0] for known in aliases if len(known.get(video_id, ())) == 1), None)
        if own in named:
            raise ConfigError(f"{named[own]!r} and {video_id!r} are both {own!r} of the manifest {manifest.name}")
        if own is None:
            lost.append(video_id)
        else:
            named[own] = video_id
    if not named:
        raise ConfigError(
            f"the manifest {manifest.name} knows none of the file's videos",
            seen=listed(lost),
            wanted=f"ids such as {listed(list(manifest.ids), 3)}",
        )
    return named, (f"{len(lost):,} videos that the manifest lacks left out: {listed(lost)}",) if lost else ()


# Arrays and their names


def named_leaf(leaves: Mapping[str, Leaf], key: str, folder: str, what: str) -> tuple[str, Leaf]:
    """The array of a name, in a folder or at the top."""
    found = next((name for name in (f"{folder}/{key}".lstrip("/"), key) if name in leaves), None)
    if found is None:
        raise UnknownName(what, key, leaves)
    return found, leaves[found]


def _values(leaf: Leaf) -> list[Any]:
    """Text or numbers, as many as there are."""
    if leaf.dtype.kind in "US":
        return texts(leaf)
    if leaf.dtype.kind not in "iufb":
        raise ConfigError(
            "labels and groups are text or numbers", seen=leaf.dtype, fix="Save them without pickled objects."
        )
    return np.asarray(leaf.read(())).reshape(-1).tolist()


def texts(leaf: Leaf) -> list[str]:
    """Text; whole numbers as text."""
    if leaf.dtype.kind not in "USiu":
        raise ConfigError("names are text or whole numbers", seen=leaf.dtype, fix="Save them as an array of strings.")
    values = np.asarray(leaf.read(())).reshape(-1).tolist()
    try:
        return [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    except UnicodeDecodeError as error:
        raise ConfigError(f"names that are not UTF-8: {error.reason}") from error


def parent(name: str) -> str:
    """The group or folder that an array lies in; "" at the top."""
    return name.rpartition("/")[0]


def last(name: str) -> str:
    """An array's name in its group or folder."""
    return name.rpartition("/")[2]
