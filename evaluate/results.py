"""A number and everything that made it: one JSON line a result, appended to a file that is never rewritten."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..data_manifests.errors import ConfigError

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Result:
    """What a head scored under a protocol. Metrics and bounds are shares from 0 to 1."""

    protocol: str
    setting: str  # what the protocol was set to, in words: "5-way 1-shot"
    dataset: str
    split: str
    head: str
    head_config: dict[str, Any]
    headline: str  # the metric to quote
    metrics: dict[str, float]
    interval_95: dict[str, tuple[float, float]]  # of every metric: other videos, or other episodes
    interval_95_classes: dict[str, tuple[float, float]]  # where it can be had: other classes
    n: int
    unit: str  # what n counts: videos | episodes
    n_missing: int  # labelled videos of the split that the store lacks; no other video stands in for them
    seed: int | None  # of what the protocol drew; None where it drew nothing
    training_seed: int | None
    uses_class_names: bool
    templates: tuple[str, ...]  # of the sentences around class names; () where none were read
    is_transductive: bool
    selection: str  # the split that chose the head's epoch; "" where nothing was chosen
    frames: str  # which frames of a video were read; cached, so the same in every run
    config: dict[str, Any]  # of the protocol
    fingerprints: dict[str, str]  # store, manifest; where there are: checkpoint, training_manifest, episodes
    notes: tuple[str, ...]  # what a reader must know before comparing
    details: str  # file beside the results: what every video or episode scored; "" where none was kept
    seconds: float
    created: str  # UTC, ISO 8601
    commit: str  # of this code; "" outside a checkout
    versions: dict[str, str]
    format_version: int = field(default=FORMAT_VERSION)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a result.

        Raises:
            ConfigError: it is of another format version, or lacks a field.
        """
        if data.get("format_version") != FORMAT_VERSION:
            raise ConfigError(
                "the result is of a format that this release does not read",
                seen=f"version {data.get('format_version')}",
                wanted=f"version {FORMAT_VERSION}",
                fix="Use the coldframe release that wrote it.",
            )
        names = {f.name for f in dataclasses.fields(cls)}
        if names != data.keys():
            odd = ", ".join(sorted(names ^ data.keys()))
            raise ConfigError("a result with fields too many or too few", seen=odd)
        bounds = {
            name: {metric: (low, high) for metric, (low, high) in data[name].items()}
            for name in ("interval_95", "interval_95_classes")
        }
        return cls(**{**data, **bounds, **{name: tuple(data[name]) for name in ("templates", "notes")}})

    def describe(self) -> str:
        """The result in a few lines, for a terminal."""
        width = max(len(metric) for metric in self.metrics)
        scores = [f"  {metric:{width}}  {self.percent(metric)}" for metric in self.metrics]
        missing = f", {self.n_missing:,} videos missing" if self.n_missing else ""
        return "\n".join(
            [
                f"{self.protocol} {self.setting}".strip() + f" · {self.dataset} {self.split} · {self.head_name}",
                *scores,
                f"  {self.n:,} {self.unit}{missing}; {', '.join(self.conditions)}",
                *(f"  note: {note}" for note in self.notes),
            ]
        )

    @property
    def head_name(self) -> str:
        """The head and, where it compares videos by one, its metric: `prototypes (bi_mhm)`."""
        metric = self.head_config.get("metric")
        return f"{self.head} ({metric})" if metric else self.head

    @property
    def conditions(self) -> tuple[str, str, str]:
        """What two numbers must share to be compared, in words."""
        return (
            "class names" if self.uses_class_names else "no class names",
            "transductive" if self.is_transductive else "inductive",
            f"selected on {self.selection}" if self.selection else "nothing selected",
        )

    def percent(self, metric: str) -> str:
        """A metric with its interval: `83.4 ± 1.2 %`, and the interval over classes where there is one.

        Where the sides of an interval differ (near 0 and 100 they do), its bounds: `25.0 % [1.5, 88.2]`.
        """
        value = self.metrics[metric]
        interval = _interval(value, self.interval_95[metric])
        text = f"{100 * value:.1f} {interval} %" if interval.startswith("±") else f"{100 * value:.1f} % {interval}"
        if metric in self.interval_95_classes:
            text += f" (classes {_interval(value, self.interval_95_classes[metric])})"
        return text


def append_result(path: Path, result: Result) -> None:
    """Add one line to a results file, made if absent; on the disk when this returns.

    Several processes may append at once: each line is one write at the end of the file.
    A line that an earlier run left torn is closed first, so that it spoils itself alone.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.lseek(descriptor, 0, os.SEEK_END) and os.lseek(descriptor, -1, os.SEEK_END) >= 0:
            line = line if os.read(descriptor, 1) == b"\n" else b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, "only a part of the result could be written", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_results(path: Path) -> tuple[list[Result], int]:
    """Read a results file: its results in the order written, and the number of torn lines that were left out.

    Raises:
        ConfigError: there is no such file, or a line is whole but no result of this release; gives its number.
        OSError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise ConfigError(f"no results in {path}", fix="Run coldframe eval first, or name the file.") from error
    results: list[Result] = []
    n_torn = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError:  # JSON's and Unicode's errors are both
            n_torn += 1
            continue
        if not isinstance(data, dict):
            raise ConfigError(f"{path}, line {number} is no result", seen=type(data).__name__, wanted="a JSON object")
        try:
            results.append(Result.from_json(data))
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
    return results, n_torn


def table(results: Sequence[Result]) -> str:
    """A Markdown table whose columns also line up as plain text; below it, what its readers must know.

    It says of every row what makes numbers comparable: n, missing videos, class names, transduction, selection. What
    all rows share stands below the table, and so does every note, once, with the rows that it is of.
    """
    shared = [values[0] for values in zip(*(r.conditions for r in results), strict=True) if len(set(values)) == 1]
    head = ("protocol", "data", "head", "score", "n", "conditions", "also")
    rows = [_row(result, shared) for result in results]
    columns = [cells for cells in zip(head, *rows, strict=True) if any(cells[1:]) or not rows]
    widths = [max(map(len, cells)) for cells in columns]
    padded = [[cell.ljust(width) for cell in cells] for cells, width in zip(columns, widths, strict=True)]
    lines = ["| " + " | ".join(cells) + " |" for cells in zip(*padded, strict=True)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")

    below = [f"- all: {', '.join(shared)}"] if shared else []
    of: dict[str, list[str]] = {}
    for result in results:
        for note in result.notes:
            of.setdefault(note, []).append(f"{result.protocol}, {result.head_name}")
    below += [f"- {'; '.join(dict.fromkeys(rows_of))}: {note}" for note, rows_of in of.items()]
    return "\n".join([*lines, *(["", *below] if below else [])])


def _row(result: Result, shared: Sequence[str]) -> tuple[str, ...]:
    others = [f"{name} {result.percent(name)}" for name in result.metrics if name != result.headline]
    missing = f" ({result.n_missing:,} missing)" if result.n_missing else ""
    return (
        f"{result.protocol} {result.setting}".strip(),
        f"{result.dataset} {result.split}",
        result.head_name,
        f"{result.headline} {result.percent(result.headline)}",
        f"{result.n:,} {result.unit}{missing}",
        ", ".join(condition for condition in result.conditions if condition not in shared),
        " · ".join(others),
    )


def _interval(value: float, bounds: tuple[float, float]) -> str:
    """`± 1.2`, in percentage points, or `[1.5, 88.2]` where one side is longer than the other by more than one."""
    low, high = (100 * bound for bound in bounds)
    below, above = 100 * value - low, high - 100 * value
    return f"[{low:.1f}, {high:.1f}]" if abs(above - below) > 1 else f"± {max(below, above):.1f}"
