from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coldframe import evaluate
from coldframe.data_manifests.errors import ConfigError
from coldframe.evaluate import Result, append_result, read_results, table

CLOSED = Result(
    protocol="closed_set",
    setting="",
    dataset="toy",
    split="test",
    head="linear_probe",
    head_config={"feature": "embedding"},
    headline="top_1",
    metrics={"top_1": 0.834, "mean_class": 1.0},
    interval_95={"top_1": (0.8215, 0.8455), "mean_class": (0.963, 1.0)},
    interval_95_classes={},
    n=1530,
    unit="videos",
    n_missing=12,
    seed=None,
    training_seed=3,
    uses_class_names=False,
    templates=(),
    is_transductive=False,
    selection="val",
    frames="8 uniform",
    config={"batch_size": 32},
    fingerprints={"store": "5" * 16, "manifest": "a" * 16},
    notes=("12 videos are missing, among them ü.mp4",),
    details="details/0123.npz",
    seconds=1.5,
    created="2025-01-01T00:00:00+00:00",
    commit="",
    versions={"coldframe": "0.1.0"},
)
FEW = dataclasses.replace(
    CLOSED,
    protocol="few_shot",
    setting="5-way 1-shot",
    head="prototypes",
    head_config={"metric": "bi_mhm"},
    headline="accuracy",
    metrics={"accuracy": 0.6212},
    interval_95={"accuracy": (0.6169, 0.6255)},
    interval_95_classes={"accuracy": (0.57, 0.6724)},
    n=10_000,
    unit="episodes",
    n_missing=0,
    seed=0,
    uses_class_names=True,
    templates=("a video of {}.",),
    is_transductive=True,
    selection="",
    notes=(),
)


def test_what_was_appended_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "results.jsonl"
    append_result(path, CLOSED)
    append_result(path, FEW)
    assert read_results(path) == ([CLOSED, FEW], 0)
    assert len(path.read_bytes().splitlines()) == 2


def test_a_torn_last_line_is_counted_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_result(path, CLOSED)
    whole = path.read_bytes()
    append_result(path, CLOSED)
    for length in (len(whole) + 1, len(whole) + 40, 2 * len(whole) - 2):
        path.write_bytes((whole + whole)[:length])
        assert read_results(path) == ([CLOSED], 1)
    append_result(path, FEW)  # another run, after the one that died
    assert read_results(path) == ([CLOSED, FEW], 1)


def test_a_line_that_only_lacks_its_newline_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_result(path, CLOSED)
    path.write_bytes(path.read_bytes()[:-1])
    append_result(path, FEW)
    assert read_results(path) == ([CLOSED, FEW], 0)


def test_a_line_torn_within_a_letter_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_result(path, CLOSED)
    path.write_bytes(path.read_bytes() + b'{"notes": ["\xc3')
    assert read_results(path) == ([CLOSED], 1)


def test_runs_that_append_at_once_leave_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    sent = [dataclasses.replace(FEW, seed=seed, notes=("x" * 20_000,)) for seed in range(40)]
    with ThreadPoolExecutor(8) as runs:  # each opens the file for itself, as processes do
        list(runs.map(lambda result: append_result(path, result), sent))
    found, n_torn = read_results(path)
    assert n_torn == 0
    assert sorted(found, key=lambda result: result.seed or 0) == sent


def test_a_disk_that_takes_half_a_line_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:50]))
    with pytest.raises(OSError, match="only a part"):
        append_result(tmp_path / "results.jsonl", CLOSED)
    monkeypatch.undo()
    append_result(tmp_path / "results.jsonl", FEW)
    assert read_results(tmp_path / "results.jsonl") == ([FEW], 1)


def test_a_number_that_is_none_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match="JSON compliant"):
        append_result(path, dataclasses.replace(CLOSED, metrics={"top_1": float("nan")}))
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data | {"format_version": 2}, "line 2.*version 2.*expected version 1.*release"),
        (lambda data: data | {"colour": "green"}, "line 2.*colour"),
        (lambda data: {name: value for name, value in data.items() if name != "n"}, "line 2.*n$"),
        (lambda data: [data], "line 2.*list"),
    ],
)
def test_a_whole_line_of_another_format_is_refused_by_number(tmp_path: Path, change, words: str) -> None:
    path = tmp_path / "results.jsonl"
    append_result(path, CLOSED)
    with path.open("a") as file:
        file.write(json.dumps(change(CLOSED.to_json())) + "\n")
    with pytest.raises(ConfigError, match=words):
        read_results(path)


def test_a_file_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no results in .*none\.jsonl\. Run coldframe eval first, or name the file\."
    ):
        read_results(tmp_path / "none.jsonl")


def test_results_are_read_without_torch() -> None:
    code = "import sys, coldframe.evaluate.results; from coldframe.evaluate import table; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "False"


def test_every_public_name_can_be_had() -> None:
    assert all(hasattr(evaluate, name) for name in evaluate.__all__)
    with pytest.raises(AttributeError, match="tabel"):
        _ = evaluate.tabel


def test_percent_gives_the_longer_side_of_an_even_interval_and_the_bounds_of_an_uneven_one() -> None:
    assert CLOSED.percent("top_1") == "83.4 ± 1.2 %"
    assert CLOSED.percent("mean_class") == "100.0 % [96.3, 100.0]"
    assert FEW.percent("accuracy") == "62.1 ± 0.4 % (classes ± 5.1)"
    wide = dataclasses.replace(FEW, metrics={"accuracy": 0.25}, interval_95={"accuracy": (0.015, 0.882)})
    wide = dataclasses.replace(wide, interval_95_classes={"accuracy": (0.0, 0.6)})
    assert wide.percent("accuracy") == "25.0 % [1.5, 88.2] (classes [0.0, 60.0])"


def test_the_table_is_markdown_that_lines_up() -> None:
    lines = table([CLOSED, FEW, CLOSED]).splitlines()
    rows = lines[:5]
    assert len({len(row) for row in rows}) == 1
    assert {row.count("|") for row in rows} == {8}
    assert set(rows[1]) == {"|", "-"}
    assert "| top_1 83.4 ± 1.2 % " in rows[2]
    assert "1,530 videos (12 missing)" in rows[2]
    assert "no class names, inductive, selected on val" in rows[2]
    assert "mean_class 100.0 % [96.3, 100.0]" in rows[2]
    assert "few_shot 5-way 1-shot" in rows[3]
    assert "prototypes (bi_mhm)" in rows[3]
    assert "class names, transductive, nothing selected" in rows[3]
    assert lines[5:] == ["", "- closed_set, linear_probe: 12 videos are missing, among them ü.mp4"]


def test_what_all_rows_share_stands_once_below_the_table() -> None:
    other = dataclasses.replace(CLOSED, head="mean_pool", selection="", notes=CLOSED.notes)
    lines = table([CLOSED, other]).splitlines()
    assert "| selected on val " in lines[2]
    assert "| nothing selected " in lines[3]
    assert lines[4:] == [
        "",
        "- all: no class names, inductive",
        "- closed_set, linear_probe; closed_set, mean_pool: 12 videos are missing, among them ü.mp4",
    ]
    alone = table([FEW]).splitlines()
    assert "conditions" not in alone[0]
    assert "also" not in alone[0]
    assert alone[3:] == ["", "- all: class names, transductive, nothing selected"]
    assert table([]).startswith("| protocol | data ")


def test_describe_says_everything_in_a_few_lines() -> None:
    assert CLOSED.describe().splitlines() == [
        "closed_set · toy test · linear_probe",
        "  top_1       83.4 ± 1.2 %",
        "  mean_class  100.0 % [96.3, 100.0]",
        "  1,530 videos, 12 videos missing; no class names, inductive, selected on val",
        "  note: 12 videos are missing, among them ü.mp4",
    ]
    assert FEW.describe().startswith("few_shot 5-way 1-shot · toy test · prototypes (bi_mhm)\n")
