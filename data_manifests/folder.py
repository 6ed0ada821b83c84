"""A manifest of a folder of videos: `ROOT/class/**/video`, or `ROOT/{train,val,test}/class/**/video`.

The folder may be a URL, below which a folder is what its files' names say: an empty one does not exist.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from .errors import ConfigError
from .locations import is_local, list_files, location
from .records import Manifest, ManifestError, VideoRecord, absolute_root, listed
from .splits import draw_splits

VIDEO_EXTENSIONS = frozenset(
    (".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
)
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def from_folder(
    root: Path | str,
    *,
    test_fraction: float = 0.2,
    val_fraction: float = 0.1,
    seed: int = 0,
    group_by: str | None = None,
) -> Manifest:
    """Make a manifest of the videos below a folder; a class is a folder's name as it is.

    Splits are taken from `train/`, `val/` (or `validation/`) and `test/` where these are the folders of the root, and
    drawn otherwise. Videos directly in the root (or in a split's folder) have no label. Hidden files and folders are
    skipped, and so is everything that has no video's extension.

    Args:
        root: the folder, or its URL.
        test_fraction: share of each class for testing, where splits are drawn.
        val_fraction: share of each class for validation, where splits are drawn.
        seed: of the drawn splits.
        group_by: a regular expression, searched in each id; videos with the same first group of a match (or the same
            match, if the expression has no group) form a group and stay in one split.

    Raises:
        ManifestError: the root is not a folder, holds no video, has an empty class, or mixes splits with classes.
        ConfigError: impossible fractions, or an expression that is broken or matches nothing.
        LocationError: a URL that cannot be listed.
    """
    top = location(root)
    files = _files(top)
    ids = _videos(top, files)
    folders = _folders(top, files)
    has_splits = _are_splits(folders, top)
    depth = 1 if has_splits else 0  # of the class's folder in the path
    labelled = {video_id: parts[depth] for video_id in ids if len(parts := video_id.split("/")) > depth + 1}
    _refuse_empty_classes(top, files, folders if has_splits else [""], set(labelled.values()))
    class_names = tuple(sorted(set(labelled.values())))
    label_of = {name: label for label, name in enumerate(class_names)}
    groups = _groups(ids, group_by)
    records = tuple(
        VideoRecord(
            video_id=video_id,
            path=video_id,
            label=label_of[labelled[video_id]] if video_id in labelled else None,
            split=SPLIT_FOLDERS.get(video_id.split("/")[0].casefold(), "") if has_splits else "",
            group=groups.get(video_id, ""),
        )
        for video_id in ids
    )
    # Checked before splits are drawn: drawing needs names that can be encoded, and makes nothing that was right wrong.
    name = top.resolve().name if is_local(top) else PurePosixPath(str(top)).name
    manifest = Manifest(name, absolute_root(top), class_names, records).check()
    return manifest if has_splits else draw_splits(manifest, test_fraction, val_fraction, seed)


def _videos(top: Path, files: list[str]) -> list[str]:
    """Those of the files that are videos."""
    videos = [file for file in files if PurePosixPath(file).suffix.lower() in VIDEO_EXTENSIONS]
    if not videos:
        kinds = Counter(PurePosixPath(file).suffix.lower() or "no extension" for file in files)
        raise ManifestError(
            f"no video below {top}",
            seen=listed([f"{n:,} × {kind}" for kind, n in kinds.most_common()]) or "no files at all",
            wanted=f"files in {' '.join(sorted(VIDEO_EXTENSIONS))}",
        )
    return videos


def _files(top: Path) -> list[str]:
    """Paths of all files relative to the top, sorted; hidden ones and those in hidden folders are left out."""
    if not is_local(top):
        return [file for file in list_files(top) if not any(part.startswith(".") for part in file.split("/"))]
    if not top.exists():
        raise ManifestError("the folder of videos does not exist", seen=top)
    if not top.is_dir():
        raise ManifestError("a folder of videos was expected", seen=f"the file {top}", fix="Name its folder.")
    return sorted(_walk(top))


def _folders(top: Path, files: list[str], below: str = "") -> list[str]:
    """Names of the folders of the top, or below one of its folders, sorted; those without a file too where it is local."""
    if is_local(top):
        names = {entry.name for entry in (top / below).iterdir() if entry.is_dir()}
    else:
        inner = [
            file.removeprefix(below).lstrip("/") for file in files if file.startswith(f"{below}/" if below else "")
        ]
        names = {file.partition("/")[0] for file in inner if "/" in file}
    return sorted(name for name in names if not name.startswith("."))


def _walk(top: Path) -> Iterator[str]:
    """Every file of a local folder; links to folders are followed, hidden names are not."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that may not be read

    for folder, below, names in os.walk(top, followlinks=True, onerror=refuse):
        here = Path(folder).resolve()
        # A link to a folder above would lead round for ever.
        below[:] = [b for b in below if not b.startswith(".") and not here.is_relative_to((here / b).resolve())]
        prefix = "" if folder == str(top) else f"{Path(folder).relative_to(top).as_posix()}/"
        yield from (prefix + name for name in names if not name.startswith("."))


def _are_splits(folders: list[str], top: Path) -> bool:
    """Whether the root's folders are splits rather than classes."""
    splits = [name for name in folders if name.casefold() in SPLIT_FOLDERS]
    if splits and len(splits) < len(folders):
        others = [name for name in folders if name not in splits]
        raise ManifestError(
            f"{top} has folders of splits beside other folders",
            seen=f"{listed(splits)} beside {listed(others)}",
            wanted="either classes, or train, val and test with the classes in them",
            fix="Move or rename one kind; a folder whose name begins with a dot is skipped.",
        )
    return bool(splits)


def _refuse_empty_classes(top: Path, files: list[str], holders: list[str], found: set[str]) -> None:
    named = {name for holder in holders for name in _folders(top, files, holder)}
    if empty := sorted(named - found):
        raise ManifestError(
            f"class folders without a video: {listed(empty)}",
            wanted=f"files in {' '.join(sorted(VIDEO_EXTENSIONS))}",
            fix="Add videos, or remove the folder; one whose name begins with a dot is skipped.",
        )


def _groups(ids: list[str], group_by: str | None) -> dict[str, str]:
    """The group of each id that the expression matches."""
    if not group_by:
        return {}
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise ConfigError("group_by is not a regular expression", seen=repr(group_by), wanted=str(error)) from None
    matches = {video_id: match for video_id in ids if (match := pattern.search(video_id))}
    groups = {video_id: match[min(pattern.groups, 1)] or "" for video_id, match in matches.items()}
    if not any(groups.values()):
        raise ConfigError("group_by matches no video", seen=repr(group_by), wanted=f"a match in ids such as {ids[0]!r}")
    return groups
