from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from coldframe.data_manifests import ConfigError, Manifest, ManifestError, VideoRecord, carve_validation, draw_splits
from coldframe.data_manifests.splits import captions_as_classes


def training(*sizes: int, groups: dict[str, str] | None = None) -> Manifest:
    """`sizes[c]` training videos of class c, and two test videos each."""
    records = [
        VideoRecord(f"{c}/{i}.mp4", f"{c}/{i}.mp4", c, "train" if i < n else "test", (groups or {}).get(f"{c}/{i}", ""))
        for c, n in enumerate(sizes)
        for i in range(n + 2)
    ]
    return Manifest("m", "/data", tuple(f"class {c}" for c in range(len(sizes))), tuple(records))


def counts(made: Manifest, split: str) -> list[int]:
    found = Counter(r.label for r in made.records if r.split == split)
    return [found[c] for c in range(len(made.class_names))]


def test_each_class_gives_its_share_and_keeps_one() -> None:
    before = training(40, 10, 7, 3, 2, 1)
    after = carve_validation(before, 0.15)
    assert counts(after, "val") == [6, 2, 1, 1, 1, 0]
    assert counts(after, "train") == [34, 8, 6, 2, 1, 1]
    assert after.split("test") == before.split("test")
    assert after.ids == before.ids
    assert after.check() is after


def test_half_a_video_is_rounded_up() -> None:
    assert counts(carve_validation(training(10, 30), 0.25), "val") == [3, 8]


def test_the_same_everywhere_whatever_the_order_and_the_root() -> None:
    before = training(20, 20)
    shuffled = random.Random(3).sample(before.records, len(before.records))
    expected = {r.video_id for r in carve_validation(before, 0.2, seed=5).split("val").records}
    again = carve_validation(replace(before, root="/other", records=tuple(shuffled)), 0.2, seed=5)
    assert {r.video_id for r in again.split("val").records} == expected
    assert expected == {f"{c}/{i}.mp4" for c, videos in enumerate([(6, 8, 10, 16), (1, 2, 5, 11)]) for i in videos}


def test_another_seed_is_another_split() -> None:
    before = training(20, 20)
    drawn = {carve_validation(before, 0.2, seed=seed).fingerprint for seed in range(8)}
    assert len(drawn) == 8


def test_over_seeds_every_video_is_drawn_about_as_often() -> None:
    before = training(10)
    drawn = Counter(
        r.video_id for seed in range(1000) for r in carve_validation(before, 0.3, seed).split("val").records
    )
    assert sum(drawn.values()) == 3000
    assert all(abs(n - 300) < 5 * 14.5 for n in drawn.values())  # five standard deviations of a binomial(1000, 0.3)


def test_groups_move_whole() -> None:
    groups = {f"{c}/{i}": f"{c}-{i // 4}" for c in range(3) for i in range(40)}
    after = carve_validation(training(40, 40, 40, groups=groups), 0.1)
    splits = {(r.group, r.split) for r in after.records if r.group and r.split != "test"}
    assert len(splits) == len({group for group, _ in splits})
    assert counts(after, "val") == [4, 4, 4]


def test_groups_that_span_classes_move_whole() -> None:
    groups = {f"{c}/{i}": f"person {i % 8}" for c in range(3) for i in range(16)}
    after = carve_validation(training(16, 16, 16, groups=groups), 0.25)
    people = {(r.group, r.split) for r in after.records if r.group and r.split != "test"}
    assert Counter(split for _, split in people) == {"train": 6, "val": 2}
    assert counts(after, "val") == [4, 4, 4]


def test_a_class_of_large_groups_gives_its_smallest() -> None:
    groups = {f"0/{i}": "small" if i < 8 else "large" for i in range(20)}
    after = carve_validation(training(20, groups=groups), 0.05)
    assert {r.group for r in after.split("val").records} == {"small"}
    assert counts(after, "train") == [12]


def test_a_class_of_one_group_stays() -> None:
    groups = {f"0/{i}": "all" for i in range(6)}
    after = carve_validation(training(6, 6, groups=groups), 0.5)
    assert counts(after, "val") == [0, 3]


def test_segments_of_one_video_move_together() -> None:
    records = tuple(
        VideoRecord(f"{file}#{i}", file, 0, "train", start_s=float(i), end_s=i + 1.0)
        for file in ("a.mp4", "b.mp4", "c.mp4")
        for i in range(4)
    )
    after = carve_validation(Manifest("m", "/data", ("run",), records), 0.3)
    assert len({(r.path, r.split) for r in after.records}) == 3
    assert counts(after, "val") == [4]


def test_unlabelled_and_test_videos_stay_where_they_are() -> None:
    before = training(4)
    before = replace(before, records=(*before.records, VideoRecord("x.mp4", "x.mp4", None, "train")))
    assert carve_validation(before, 0.5).by_id["x.mp4"].split == "train"


def test_impossible_carvings() -> None:
    with pytest.raises(ManifestError, match=r"no class can spare .* found 3 training videos"):
        carve_validation(training(1, 1, 1), 0.5)
    with pytest.raises(ManifestError, match="validation split already"):
        carve_validation(carve_validation(training(4), 0.5), 0.5)
    for fraction in (0, 1, -0.1, 1.5):
        with pytest.raises(ConfigError, match="out of range"):
            carve_validation(training(4), fraction)


def test_drawn_splits_replace_those_there_were(tmp_path: Path) -> None:
    drawn = draw_splits(training(18, 18), 0.2, 0.1, seed=0)
    assert counts(drawn, "test") == [4, 4]
    assert counts(drawn, "val") == [2, 2]
    assert counts(drawn, "train") == [14, 14]


def test_captions_of_some_splits_are_classes():
    records = [
        VideoRecord(f"{n}.mp4", f"{n}.mp4", None, "test" if n > 7 else "train", captions=(f"caption {n}", "the same"))
        for n in range(10)
    ]
    manifest = Manifest("captioned", "/nowhere", (), tuple(records))
    ours = captions_as_classes(manifest, ("train", "val"), val_fraction=0.25)
    assert set(ours.class_names) == {f"caption {n}" for n in range(8)} | {"the same"}
    assert len({r.video_id for r in ours.records if r.split == "val"}) == 2
    assert all(r.captions == (ours.class_names[r.label],) for r in ours.records if r.label is not None)
    theirs = captions_as_classes(manifest, ("test",))
    assert set(theirs.class_names) == {"caption 8", "caption 9", "the same"}
    with pytest.raises(ManifestError, match="no captions"):
        captions_as_classes(manifest, ("val",))
