"""UCF101 from its official lists, `ucfTrainTestlist`: 101 classes, 13,320 videos, 3 folds.

`classInd.txt` numbers the classes from 1; `trainlist0<fold>.txt` has lines `Class/v_Class_g08_c01.avi 1`, and
`testlist0<fold>.txt` the same without the number. Clips `g08` of a class are cut from one video: they form a group.

One class is spelt in two ways, folder `HandstandPushups` and files `v_HandStandPushups_…`, and many copies rename the
folder. A class is therefore found whatever its capitals; ids keep the spelling of classInd.txt, and paths take that of
the folder on this disk.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..locations import is_local, location, names_in
from ..records import Manifest, ManifestError, VideoRecord, absolute_root
from . import DatasetSpec, published_fold, read_list, refuse_partial

N_CLASSES = 101
N_EXPECTED = {
    1: {"train": 9537, "test": 3783},
    2: {"train": 9586, "test": 3734},
    3: {"train": 9624, "test": 3696},
}
_LINE = re.compile(r"(?P<folder>[^/]+)/(?P<video>[^/]+?)(\s+(?P<number>\d+))?")
_GROUP = re.compile(r"_(g\d+)_c\d+\.")


def build(root: Path | str, lists: Path | str, fold: int = 1, *, strict: bool = True) -> Manifest:
    """Make the manifest of one fold; videos are `<class>/<video>.avi` below the root.

    Classes of which the lists name no video are left out, which can only be where strict is False.

    Raises:
        ManifestError: lists that are absent, broken, or (if strict) not the complete published ones.
        ConfigError: no such fold.
    """
    n_expected = published_fold(N_EXPECTED, fold)
    classes = _classes(Path(lists) / "classInd.txt")
    videos = [
        (place, split, class_name, video)
        for split in ("train", "test")
        for place, class_name, video in _videos(Path(lists) / f"{split}list0{fold}.txt", classes)
    ]
    used = {class_name for _, _, class_name, _ in videos}
    class_names = tuple(name for name in classes.values() if name in used)
    label_of = {name: label for label, name in enumerate(class_names)}
    folders = _folders(location(root))
    records = tuple(
        VideoRecord(
            video_id=f"{class_name}/{video}",
            path=f"{folders.get(class_name.casefold(), class_name)}/{video}",
            label=label_of[class_name],
            split=split,
            group=f"{class_name}_{match[1]}" if (match := _GROUP.search(video)) else "",
        )
        for _, split, class_name, video in videos
    )
    manifest = Manifest(f"ucf101-{fold}", absolute_root(root), class_names, records)
    manifest.check([place for place, *_ in videos])
    if strict:
        refuse_partial(manifest, N_CLASSES, n_expected)
    return manifest


def _classes(path: Path) -> dict[int, str]:
    """Class names by their official numbers, ascending."""
    classes: dict[int, str] = {}
    for place, line in read_list(path):
        number, _, name = line.partition(" ")
        if not number.isdecimal() or not name.strip():
            raise ManifestError(f"{place}: not a class", seen=repr(line), wanted="a number and a name")
        if int(number) in classes:
            raise ManifestError(f"{place}: class {number} is there twice", seen=f"{classes[int(number)]} and {name}")
        classes[int(number)] = name.strip()
    return dict(sorted(classes.items()))


def _videos(path: Path, classes: dict[int, str]) -> list[tuple[str, str, str]]:
    """Place, class name and file name of each video of a list."""
    number_of = {name.casefold(): number for number, name in classes.items()}
    videos = []
    for place, line in read_list(path):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ManifestError(
                f"{place}: not a video", seen=repr(line), wanted="<class>/<video>.avi, or that and a number"
            )
        number = number_of.get(match["folder"].casefold())
        if number is None:
            raise ManifestError(f"{place}: a class that classInd.txt lacks", seen=repr(match["folder"]))
        if match["number"] not in (None, str(number)):
            raise ManifestError(
                f"{place}: the number is not that of the class {classes[number]}", seen=match["number"], wanted=number
            )
        videos.append((place, classes[number], match["video"]))
    return videos


def _folders(root: Path) -> dict[str, str]:
    """The class folders that lie below the root, by their names without capitals."""
    names = (name for name in names_in(root) if not is_local(root) or (root / name).is_dir())
    return {name.casefold(): name for name in names}


DATASET = DatasetSpec(
    build=build,
    n_classes=N_CLASSES,
    n_expected=N_EXPECTED,
    homepage="https://www.crcv.ucf.edu/data/UCF101.php",
    licence="none stated; the clips come from YouTube",
    citation="Soomro et al.: UCF101: A Dataset of 101 Human Actions Classes From Videos in The Wild, arXiv:1212.0402",
)
