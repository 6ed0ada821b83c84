from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from coldframe.data_manifests import ConfigError, Manifest, ManifestError, VideoRecord
from coldframe.data_manifests.tables import COLUMNS

AWKWARD = ('run, "fast"', "läuft 走る", "semi;colon#!(x)[y]&@~+", "'quoted'", "a  b")


def awkward(root: Path) -> Manifest:
    """Names that a careless reader or writer breaks."""
    records = [VideoRecord(f"{name}/v {i}.mp4", f"{name}/v {i}.mp4", i, "train") for i, name in enumerate(AWKWARD)]
    records[0] = replace(records[0], captions=('says "hi", twice', "läuft"), group="g,1", split="test")
    records[1] = replace(records[1], video_id="läuft#0-1.5", start_s=0.1 + 0.2, end_s=1.5)
    records.append(VideoRecord("s3://bucket/x.mp4", "s3://bucket/x.mp4", None))
    return Manifest("table", str(root), AWKWARD, tuple(records)).check()


def table(folder: Path, *lines: str, name: str = "clips.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(ManifestError) as error:
        Manifest.read(path, **options)  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str) -> None:
    made = awkward(tmp_path)
    made.write(tmp_path / f"table{suffix}")
    again = Manifest.read(tmp_path / f"table{suffix}")
    assert again == made
    assert again.fingerprint == made.fingerprint


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_class_order_survives(tmp_path: Path, suffix: str) -> None:
    records = (VideoRecord("a.mp4", "a.mp4", 0), VideoRecord("b.mp4", "b.mp4", 1))
    Manifest("m", str(tmp_path), ("zebra", "ant"), records).write(tmp_path / f"m{suffix}")
    assert Manifest.read(tmp_path / f"m{suffix}").class_names == ("zebra", "ant")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_folder_of_table_and_videos_can_be_moved(tmp_path: Path, suffix: str) -> None:
    made = Manifest("m", str(tmp_path / "here/videos"), ("c",), (VideoRecord("a.mp4", "a.mp4", 0),))
    made.write(tmp_path / f"here/m{suffix}")
    (tmp_path / "here").rename(tmp_path / "there")
    assert Manifest.read(tmp_path / f"there/m{suffix}").root == str(tmp_path / "there/videos")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("root", ["/elsewhere/videos", "s3://bucket/videos"])
def test_a_root_elsewhere_is_remembered(tmp_path: Path, suffix: str, root: str) -> None:
    Manifest("m", root, ("c",), (VideoRecord("a.mp4", "a.mp4", 0),)).write(tmp_path / f"m{suffix}")
    assert Manifest.read(tmp_path / f"m{suffix}").root == root
    assert Manifest.read(tmp_path / f"m{suffix}", root=tmp_path).root == str(tmp_path)


def test_path_alone_is_enough(tmp_path: Path) -> None:
    made = Manifest.read(table(tmp_path, "path", "b.mp4", "", "./x//a.mp4", f"{tmp_path}/c.mp4"))
    assert made.ids == ("b.mp4", "x/a.mp4", "c.mp4")
    assert [r.path for r in made.records] == ["b.mp4", "x/a.mp4", "c.mp4"]
    assert made.class_names == ()
    assert (made.name, made.root) == ("clips", str(tmp_path))


def test_columns_come_in_any_order_and_a_spreadsheets_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    path.write_bytes("\ufefflabel,path,captions\r\nsit,a.mp4,one|two\r\nrun,b.mp4,\r\n".encode())
    made = Manifest.read(path)
    assert made.class_names == ("run", "sit")
    assert made.labels.tolist() == [1, 0]
    assert made.records[0].captions == ("one", "two")
    assert made.records[1].captions == ()


def test_class_list_beside_the_table_then_as_given(tmp_path: Path) -> None:
    path = table(tmp_path, "path,label", "a.mp4,run", "b.mp4,sit")
    assert Manifest.read(path, classes=["sit", "run"]).class_names == ("sit", "run")
    table(tmp_path, "sit", "run", name="clips.classes.txt")
    assert Manifest.read(path).class_names == ("sit", "run")
    assert Manifest.read(path, classes=["sit", "run"]).class_names == ("sit", "run")
    assert "its own class list" in refusal(path, classes=["run", "sit"])


HEADER = "video_id,path,label,split,group,start_s,end_s,captions"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([HEADER, "v,a.mp4,run,,,,,", "", "v,b.mp4,run,,,,,"], ["duplicate ids", "line 4 'v' (first on line 2)"]),
        (["path,split", "a.mp4,train", "b.mp4,test", "a.mp4,test"], ["overlap", "line 4", "line 2 in train"]),
        (["video_id,path,split", "1,a.mp4,train", "2,./a.mp4,test"], ["overlap", "line 3 'a.mp4' in test", "line 2"]),
        (["path,label", "a.mp4,run", "b.mp4,fly"], ["lacks", "line 3 'fly'"]),
        (["path,label", "a.mp4,run", "b.mp4,siting"], ["line 3 'siting' (did you mean 'sitting'?)"]),
        (["path,label", "a.mp4,run"], ["no video has", "line 2 of the class list 'sitting'"]),
        (["path", "a.mp4", "../b.mp4"], ["leave the root", "line 3 '../b.mp4'"]),
        (["path", "/etc/passwd.mp4"], ["leave the root", "line 2"]),
        (["path,split", "a.mp4,training"], ["unknown splits", "line 2 'training'", "train, val, test"]),
        (["path,start_s", "a.mp4,soon"], ["line 2: start_s is not a number", "'soon'"]),
        (["path,start_s,end_s", "a.mp4,5,4"], ["impossible times", "line 2"]),
        (["path,start_s", "a.mp4,nan"], ["impossible times", "line 2"]),
        (["path,label", "a.mp4,run,train"], ["line 2: 3 values", "expected 2"]),
        (["path,label", "a.mp4"], ["line 2: 1 values", "expected 2"]),
        (["path,label", '"a\nb.mp4",run'], ["unusable text", "line 3"]),
        (["path,label", "a.mp4,run", '"a.mp4'], ["line 3", "not a CSV"]),
        (["path", '""'], ["unusable text", "line 2"]),
        (["path,captions", "a.mp4,one||two"], ["unusable text", "line 2 caption ''"]),
        (["path,lable", "a.mp4,run"], ["unknown column", "'lable'", "Did you mean label?"]),
        (["path,Split", "a.mp4,train"], ["unknown column", "Did you mean split?"]),
        (["path;label", "a.mp4;run"], ["unknown column", "separated by commas"]),
        (
            ["path,lable,Split,fold", "a.mp4,run,train,1"],
            ["unknown columns; found 'lable', 'Split', 'fold';", "Did you mean label by 'lable', split by 'Split'?"],
        ),
        (["path,x9,fold", "a.mp4,1,1"], ["unknown columns; found 'x9', 'fold';", "Rename or remove them."]),
        (["path,label,path", "a.mp4,run,a.mp4"], ["column path is there twice"]),
        (["label", "run"], ["no column path"]),
        (["path,label"], ["holds no video"]),
    ],
)
def test_refused_with_its_line(tmp_path: Path, lines: list[str], words: list[str]) -> None:
    if any("label" in line for line in lines[:1]):
        table(tmp_path, "run", "sitting", name="clips.classes.txt")
    message = refusal(table(tmp_path, *lines))
    assert all(word in message for word in words), message


def test_an_empty_file_and_one_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    assert "no column path" in refusal(tmp_path / "empty.csv")
    (tmp_path / "latin.csv").write_bytes("path\ncafé.mp4\n".encode("latin-1"))
    assert "not UTF-8" in refusal(tmp_path / "latin.csv")
    (tmp_path / "x.classes.txt").write_bytes(b"caf\xe9\n")
    assert "x.classes.txt is not UTF-8" in refusal(table(tmp_path, "path,label", "a.mp4,x", name="x.csv"))


def test_only_csv_and_parquet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found clips\.tsv"):
        Manifest.read(tmp_path / "clips.tsv")
    with pytest.raises(ConfigError, match=r"found clips"):
        awkward(tmp_path).write(tmp_path / "clips")
    with pytest.raises(FileNotFoundError):
        Manifest.read(tmp_path / "absent.csv")


def test_a_csv_names_every_column_and_leaves_no_stale_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    one = (VideoRecord("a.mp4", "a.mp4", 0),)
    Manifest("m", "/elsewhere", ("c",), one).write(path)
    assert path.read_text().splitlines() == [",".join(COLUMNS), "a.mp4,a.mp4,c,,,,,"]
    assert (tmp_path / "m.classes.txt").read_text() == "c\n"
    assert (tmp_path / "m.root.txt").read_text() == "/elsewhere\n"
    Manifest("m", str(tmp_path), (), (replace(one[0], label=None),)).write(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.csv"]


def test_a_view_fits_a_parquet_and_not_a_csv(tmp_path: Path) -> None:
    records = (VideoRecord("a.mp4", "a.mp4", 0, "train"), VideoRecord("b.mp4", "b.mp4", 1, "test"))
    view = Manifest("m", str(tmp_path), ("run", "sit"), records).split("test")
    view.write(tmp_path / "m.parquet")
    assert Manifest.read(tmp_path / "m.parquet") == view
    with pytest.raises(ManifestError, match="no video has"):
        view.write(tmp_path / "m.csv")


def test_nothing_bad_is_written_and_a_good_file_is_kept(tmp_path: Path) -> None:
    good = Manifest("m", str(tmp_path), ("c",), (VideoRecord("a.mp4", "a.mp4", 0),))
    bar = replace(good, records=(replace(good.records[0], captions=("a|b",)),))
    good.write(tmp_path / "m.csv")
    before = (tmp_path / "m.csv").read_bytes()
    with pytest.raises(ManifestError, match=r"captions with a \|.*parquet"):
        bar.write(tmp_path / "m.csv")
    with pytest.raises(ManifestError, match="duplicate ids"):
        replace(good, records=good.records * 2).write(tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))
    bar.write(tmp_path / "m.parquet")
    assert Manifest.read(tmp_path / "m.parquet").records[0].captions == ("a|b",)


def foreign(file: Path, /, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def test_a_parquet_that_others_wrote(tmp_path: Path) -> None:
    path = foreign(tmp_path / "p.parquet", path=["a.mp4", "b.mp4"], label=["sit", None], start_s=[0, 1])
    made = Manifest.read(path)
    assert made.class_names == ("sit",)
    assert made.labels.tolist() == [0, -1]
    assert made.records[1].start_s == 1.0
    assert (made.name, made.root) == ("p", str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"path": ["a.mp4", "a.mp4"]}, ["duplicate ids", "row 2 'a.mp4' (first on row 1)"]),
        ({"path": ["a.mp4"], "label": [3]}, ["row 1: label is not text", "found 3", "class name"]),
        ({"path": ["a.mp4"], "captions": [[1]]}, ["row 1: captions are not text"]),
        ({"path": ["a.mp4"], "fold": [1]}, ["unknown column", "'fold'"]),
        ({"path": [None]}, ["unusable text", "row 1"]),
    ],
)
def test_a_parquet_is_refused_with_its_row(tmp_path: Path, columns: dict[str, list[object]], words: list[str]) -> None:
    message = refusal(foreign(tmp_path / "p.parquet", **columns))
    assert all(word in message for word in words), message


def test_empty_classes_of_a_parquet_that_others_wrote(tmp_path: Path) -> None:
    path = foreign(tmp_path / "p.parquet", path=["a.mp4"], label=["sit"])
    assert "line 2 of the class list 'run'" in refusal(path, classes=["sit", "run"])


def test_a_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 but no more")
    assert "not a readable Parquet" in refusal(tmp_path / "p.parquet")


def test_a_table_of_another_kind_is_refused_by_its_columns(shared: Path) -> None:
    path = shared / "data/videos/manifest.csv"
    if not path.is_file():
        pytest.skip(f"no real clips at {path}")
    assert "'dataset'" in refusal(path)


@pytest.mark.parametrize("carried", [b"{", b"[]", b"\xff", b'{"classes": 3}'])
def test_a_parquet_with_damaged_metadata_is_refused(tmp_path: Path, carried: bytes) -> None:
    path = tmp_path / "m.parquet"
    written = pyarrow.table({"path": ["a.mp4"]}).replace_schema_metadata({b"coldframe": carried})
    pyarrow.parquet.write_table(written, path)
    assert "m.parquet is not a readable Parquet file" in refusal(path)


def test_a_damaged_parquet_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    awkward(tmp_path).write(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], whole[:-30], whole[:4] + bytes(len(whole) // 4) + whole[4 + len(whole) // 4 :]):
        path.write_bytes(damaged)
        assert "\n" not in refusal(path)


THREADS = """
import os, sys
from pathlib import Path
from coldframe.data_manifests import Manifest, VideoRecord
def names():
    return sorted(Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task"))
path = Path(sys.argv[1])
Manifest("m", str(path.parent), ("c",), (VideoRecord("a.mp4", "a.mp4", 0),)).write(path)
before = names()
assert len(Manifest.read(path).records) == 1
print(before == names(), before, names())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the threads of a process are not told here")
def test_reading_a_parquet_leaves_no_thread_behind(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-c", THREADS, tmp_path / "m.parquet"], check=True, capture_output=True, text=True
    )
    assert told.stdout.startswith("True"), told.stdout  # one that lives at the end may abort the process
