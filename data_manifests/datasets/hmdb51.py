"""HMDB51 from its official lists, `testTrainMulti_7030_splits`: 51 classes of 70 train and 30 test videos, 3 folds.

A class and fold is a file `<class>_test_split<fold>.txt`; a line is a video and 1 (train), 2 (test) or 0 (left out of
this fold: it has no split, but stands in the manifest, so that one store serves all folds).

Groups are left empty. A name begins with the title of the film that the clip was cut from, but the title is free text
and identifies no film. The official folds keep the clips of a film together; a validation split carved from training
cannot.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..records import Manifest, ManifestError, VideoRecord, absolute_root, listed
from . import DatasetSpec, published_fold, read_list, refuse_partial

N_CLASSES = 51
N_EXPECTED = {fold: {"train": 3570, "test": 1530} for fold in (1, 2, 3)}
_SPLITS = {"0": "", "1": "train", "2": "test"}  # what one fold leaves out another uses: one store serves all three
_LINE = re.compile(r"(?P<video>.+?)\s+(?P<use>[012])")  # names are free text


def build(root: Path | str, lists: Path | str, fold: int = 1, *, strict: bool = True) -> Manifest:
    """Make the manifest of one fold; videos are `<class>/<video>.avi` below the root.

    Raises:
        ManifestError: lists that are absent, broken, or (if strict) not the complete published ones.
        ConfigError: no such fold.
    """
    n_expected = published_fold(N_EXPECTED, fold)
    ending = f"_test_split{fold}.txt"
    files = sorted(p for p in Path(lists).glob(f"*{ending}") if not p.name.startswith("."))
    if not files:
        there = sorted(p.name for p in Path(lists).glob("*"))
        raise ManifestError(f"no official lists in {lists}", seen=listed(there) or "nothing", wanted=f"files *{ending}")
    class_names = tuple(file.name.removesuffix(ending) for file in files)
    rows = [row for label, file in enumerate(files) for row in _rows(file, class_names[label], label)]
    places, records = [place for place, _ in rows], tuple(record for _, record in rows)
    manifest = Manifest(f"hmdb51-{fold}", absolute_root(root), class_names, records).check(places)
    if strict:
        refuse_partial(manifest, N_CLASSES, n_expected)
    return manifest


def _rows(file: Path, class_name: str, label: int) -> list[tuple[str, VideoRecord]]:
    """The videos of one class, each with its place in the list; those that the fold leaves out have no split."""
    rows = []
    for place, line in read_list(file):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ManifestError(f"{place}: not a video and its use", seen=repr(line), wanted="<video>.avi 0, 1 or 2")
        path = f"{class_name}/{match['video']}"
        rows.append((place, VideoRecord(path, path, label, _SPLITS[match["use"]])))
    return rows


DATASET = DatasetSpec(
    build=build,
    n_classes=N_CLASSES,
    n_expected=N_EXPECTED,
    homepage="https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/",
    licence="CC BY 4.0, says the homepage; the clips come from films and web sites",
    citation="Kuehne et al.: HMDB: A Large Video Database for Human Motion Recognition, ICCV 2011",
)
