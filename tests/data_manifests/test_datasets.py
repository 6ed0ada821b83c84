from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.data_manifests import ConfigError, Manifest, ManifestError, UnknownName, carve_validation
from coldframe.data_manifests.datasets import find, names

HMDB51, UCF101 = find("hmdb51").build, find("ucf101").build


def put(folder: Path, name: str, *lines: str, end: str = "\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes("".join(line + end for line in lines).encode())
    return folder


def refusal(build: Callable[..., Manifest], *arguments: object, **options: object) -> str:
    with pytest.raises(ManifestError) as error:
        build(*arguments, **options)
    return str(error.value)


# Every data set


def test_names_are_files_and_unknown_ones_are_refused() -> None:
    assert {"hmdb51", "ucf101"} <= set(names())
    with pytest.raises(UnknownName, match="Did you mean hmdb51"):
        find("hmdb")


@pytest.mark.parametrize("name", names())
def test_contract(name: str, tmp_path: Path) -> None:
    dataset = find(name)
    assert dataset.homepage.startswith("https://")
    assert dataset.licence
    assert dataset.citation
    assert dataset.n_classes > 1
    assert all(set(counts) <= {"train", "val", "test"} for counts in dataset.n_expected.values())
    with pytest.raises(ConfigError, match="no such fold"):
        dataset.build(tmp_path, tmp_path, 99)
    for lists in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ManifestError, match="no "):
            dataset.build(tmp_path, lists, min(dataset.n_expected))


# HMDB51

NAMES = (
    "(Rad)Schlag_die_Bank!_cartwheel_f_cm_np1_le_med_0.avi",
    "#122_Aerial_Backflip_;_1+1_flic_flac_f_nm_np1.avi",
    "Mädchen [HD] & 50% 走る .avi",
)


def hmdb51_lists(folder: Path, fold: int = 1, n_classes: int = 51) -> Path:
    """Lists as the official ones are: a space at the end of each line, 70 train, 30 test and some unused videos."""
    for c in range(n_classes):
        lines = [f"clip {c} {i}_np1_ba_goo_{i}.avi {1 if i < 70 else 2 if i < 100 else 0} " for i in range(102 + c)]
        put(folder, f"class_{c:02}_test_split{fold}.txt", *lines)
    return folder


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_hmdb51_complete(tmp_path: Path, fold: int) -> None:
    lists = hmdb51_lists(tmp_path / "lists", fold)
    put(lists, f"._class_00_test_split{fold}.txt", "rubbish that macOS leaves behind")
    made = HMDB51(tmp_path / "videos", lists, fold)
    counts = Counter(r.split for r in made.records)
    unused = sum(2 + c for c in range(51))
    assert counts == find("hmdb51").n_expected[fold] | {"": unused} == {"train": 3570, "test": 1530, "": unused}
    assert made.class_names == tuple(f"class_{c:02}" for c in range(51))
    assert made.records[0].video_id == made.records[0].path == "class_00/clip 0 0_np1_ba_goo_0.avi"
    assert (made.name, made.root) == (f"hmdb51-{fold}", str(tmp_path / "videos"))
    assert {r.group for r in made.records} == {""}


def test_hmdb51_names_are_free_text(tmp_path: Path) -> None:
    lists = put(
        tmp_path / "lists", "flic_flac_test_split2.txt", *(f"{n} {i}" for i, n in enumerate(NAMES)), end=" \r\n"
    )
    made = HMDB51(tmp_path, lists, 2, strict=False)
    assert [(r.path, r.split) for r in made.records] == [
        (f"flic_flac/{NAMES[0]}", ""),
        (f"flic_flac/{NAMES[1]}", "train"),
        (f"flic_flac/{NAMES[2]}", "test"),
    ]
    made.write(tmp_path / "m.csv")
    assert Manifest.read(tmp_path / "m.csv").records == made.records


def test_hmdb51_incomplete_lists_need_a_word(tmp_path: Path) -> None:
    lists = hmdb51_lists(tmp_path, n_classes=3)
    message = refusal(HMDB51, tmp_path, lists, 1)
    assert "found 3 classes, 210 train, 90 test" in message
    assert "expected 51 classes, 3,570 train, 1,530 test" in message
    assert "--partial" in message
    assert len(HMDB51(tmp_path, lists, 1, strict=False).records) == 309


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a.avi 1", "", "b.avi 3"], "run_test_split1.txt line 3: not a video and its use; found 'b.avi 3'"),
        (["a.avi"], "run_test_split1.txt line 1"),
        (["a.avi 1", "a.avi 2"], "splits overlap: run_test_split1.txt line 2 'run/a.avi' in test"),
        (["a.avi 1", "a.avi 1"], "duplicate ids: run_test_split1.txt line 2"),
        (["../../a.avi 1"], "leave the root: run_test_split1.txt line 1"),
    ],
)
def test_hmdb51_broken_lists_are_refused_with_the_line(tmp_path: Path, lines: list[str], words: str) -> None:
    assert words in refusal(HMDB51, tmp_path, put(tmp_path, "run_test_split1.txt", *lines), 1, strict=False)


def test_hmdb51_lists_that_are_not_text_and_lists_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run_test_split1.txt").write_bytes(b"caf\xe9.avi 1\n")
    assert "not UTF-8" in refusal(HMDB51, tmp_path, tmp_path, 1)
    assert "found run_test_split1.txt; expected files *_test_split2.txt" in refusal(HMDB51, tmp_path, tmp_path, 2)


# UCF101


def ucf101_lists(folder: Path, train: list[str], test: list[str], *classes: str) -> Path:
    put(folder, "classInd.txt", *(f"{i} {name}" for i, name in enumerate(classes, start=1)))
    put(folder, "trainlist01.txt", *train, end="\r\n")
    put(folder, "testlist01.txt", *test, end="\r\n")
    return folder


TRAIN = ["Archery/v_Archery_g08_c01.avi 1", "HandstandPushups/v_HandStandPushups_g09_c01.avi 2"]
TEST = ["Archery/v_Archery_g01_c02.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi"]


def test_ucf101_lists(tmp_path: Path) -> None:
    made = UCF101(tmp_path, ucf101_lists(tmp_path, TRAIN, TEST, "Archery", "HandstandPushups"), 1, strict=False)
    assert made.class_names == ("Archery", "HandstandPushups")
    assert [(r.video_id, r.label, r.split, r.group) for r in made.records] == [
        ("Archery/v_Archery_g08_c01.avi", 0, "train", "Archery_g08"),
        ("HandstandPushups/v_HandStandPushups_g09_c01.avi", 1, "train", "HandstandPushups_g09"),
        ("Archery/v_Archery_g01_c02.avi", 0, "test", "Archery_g01"),
        ("HandstandPushups/v_HandStandPushups_g01_c01.avi", 1, "test", "HandstandPushups_g01"),
    ]
    assert [r.path for r in made.records] == list(made.ids)
    assert "found 2 classes, 2 train, 2 test; expected 101 classes, 9,537 train" in refusal(
        UCF101, tmp_path, tmp_path, 1
    )


def test_ucf101_one_class_is_spelt_in_two_ways(tmp_path: Path) -> None:
    expected = UCF101(
        tmp_path, ucf101_lists(tmp_path / "a", TRAIN, TEST, "Archery", "HandstandPushups"), 1, strict=False
    )
    renamed = [line.replace("Handstand", "HandStand") for line in TRAIN]
    lists = ucf101_lists(tmp_path / "b", renamed, TEST, "Archery", "HandstandPushups")
    videos = tmp_path / "videos"
    put(videos / "HandStandPushups", "v_HandStandPushups_g01_c01.avi")
    made = UCF101(videos, lists, 1, strict=False)
    assert made.fingerprint == expected.fingerprint  # ids and classes as the official list has them …
    assert (
        made.records[3].path == "HandStandPushups/v_HandStandPushups_g01_c01.avi"
    )  # … and paths as this disk has them
    assert "HandstandPushups/v_HandStandPushups_g01_c01.avi" not in made.missing_files()


def test_ucf101_class_numbers_are_the_order_and_unused_classes_go(tmp_path: Path) -> None:
    put(tmp_path, "classInd.txt", "3 Zebra", "1 Archery", "2 HandstandPushups")
    put(tmp_path, "trainlist01.txt", "Zebra/v_Zebra_g01_c01.avi 3", "Archery/x.avi 1")
    put(tmp_path, "testlist01.txt", "Archery/y.avi 1")
    made = UCF101(tmp_path, tmp_path, 1, strict=False)
    assert made.class_names == ("Archery", "Zebra")
    assert [(r.label, r.group) for r in made.records] == [(1, "Zebra_g01"), (0, ""), (0, "")]


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (
            ["Archery/a.avi 2"],
            TEST,
            "trainlist01.txt line 1: the number is not that of the class Archery; found 2; expected 1",
        ),
        (
            ["Archery/a.avi 1", "Fly/a.avi 3"],
            TEST,
            "trainlist01.txt line 2: a class that classInd.txt lacks; found 'Fly'",
        ),
        (["a.avi 1"], TEST, "trainlist01.txt line 1: not a video"),
        (["Archery/b/a.avi 1"], TEST, "trainlist01.txt line 1: not a video"),
        (TRAIN, ["Archery/v_Archery_g08_c01.avi"], "splits overlap: testlist01.txt line 1"),
        (TRAIN * 2, TEST, "duplicate ids: trainlist01.txt line 3"),
    ],
)
def test_ucf101_broken_lists_are_refused_with_the_line(
    tmp_path: Path, train: list[str], test: list[str], words: str
) -> None:
    lists = ucf101_lists(tmp_path, train, test, "Archery", "HandstandPushups")
    assert words in refusal(UCF101, tmp_path, lists, 1, strict=False)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["1 Archery", "x Run"], "classInd.txt line 2: not a class"),
        (["1"], "classInd.txt line 1: not a class"),
        (["1 Archery", "1 Run"], "classInd.txt line 2: class 1 is there twice"),
    ],
)
def test_ucf101_broken_class_lists_are_refused(tmp_path: Path, lines: list[str], words: str) -> None:
    ucf101_lists(tmp_path, TRAIN, TEST, "Archery")
    assert words in refusal(UCF101, tmp_path, put(tmp_path, "classInd.txt", *lines), 1)


def test_ucf101_lists_that_are_absent(tmp_path: Path) -> None:
    ucf101_lists(tmp_path, TRAIN, TEST, "Archery", "HandstandPushups")
    assert "no list trainlist02.txt" in refusal(UCF101, tmp_path, tmp_path, 2)
    assert "no list classInd.txt" in refusal(UCF101, tmp_path, tmp_path / "absent", 2)


# The videos of the published sets: every name, and the official test videos of each fold


def all_videos(shared: Path, dataset: str) -> dict[str, str]:
    """File name → class, of every video, from the few-shot lists: together they hold all."""
    folder = shared / "splits/clipfsar" / dataset
    if not folder.is_dir():
        pytest.skip(f"no published lists at {folder}")
    lines = "".join((folder / f"{split}_few_shot.txt").read_text() for split in ("train", "val", "test")).splitlines()
    paths = [line.partition("//videos/")[2].split("/") for line in lines]
    return {video: class_name for class_name, video in paths}


def official_test(shared: Path, dataset: str, fold: int) -> set[str]:
    lines = (shared / f"splits/vifi/{dataset}_splits/val{fold}.txt").read_text().splitlines()
    return {line.rpartition(" ")[0] for line in lines}


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_ucf101_as_published(shared: Path, tmp_path: Path, fold: int) -> None:
    class_of, test = all_videos(shared, "ucf101"), official_test(shared, "ucf", fold)
    classes = sorted(set(class_of.values()), key=str.casefold)
    put(tmp_path, "classInd.txt", *(f"{i} {name}" for i, name in enumerate(classes, start=1)))
    train = [f"{c}/{v} {classes.index(c) + 1}" for v, c in class_of.items() if v not in test]
    put(tmp_path, f"trainlist0{fold}.txt", *train)
    put(tmp_path, f"testlist0{fold}.txt", *(f"{c}/{v}" for v, c in class_of.items() if v in test))
    made = UCF101(tmp_path / "videos", tmp_path, fold)  # strict: the published counts
    assert len(made.records) == 13_320
    splits = {(r.group, r.split) for r in made.records}
    assert len(splits) == len({group for group, _ in splits}) == 101 * 25  # 25 groups a class, none in two splits
    carved = carve_validation(made, 0.1)
    assert "note" not in carved.describe()
    assert all(count > 0 for count in Counter(r.label for r in carved.split("val").records).values())
    assert len(set(carved.split("val").labels.tolist())) == 101


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_hmdb51_as_published(shared: Path, tmp_path: Path, fold: int) -> None:
    class_of, test = all_videos(shared, "hmdb51"), official_test(shared, "hmdb", fold)
    for class_name in set(class_of.values()):
        videos = sorted(v for v, c in class_of.items() if c == class_name)
        train = [v for v in videos if v not in test][:70]
        put(
            tmp_path,
            f"{class_name}_test_split{fold}.txt",
            *(f"{v} {2 if v in test else int(v in train)} " for v in videos),
        )
    made = HMDB51(tmp_path / "videos", tmp_path, fold)
    assert {r.path.split("/")[1] for r in made.split("test").records} == test
    assert set(Counter(made.split("test").labels.tolist()).values()) == {30}
    made.write(tmp_path / "hmdb51.csv")
    assert Manifest.read(tmp_path / "hmdb51.csv").fingerprint == made.fingerprint
