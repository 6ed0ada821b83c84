"""A sweep: many heads and settings trained side by side, and the table of what came of them.

Selection is by validation videos; the test split is not read. What was validated on other videos or episodes is no
comparison, so each kind of validation has a best run of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data_manifests.errors import ConfigError
from ..data_manifests.records import Manifest
from ..extract.store import FeatureStore
from .checkpoint import Checkpoint
from .pipeline import Job, train_together
from .run import DivergedError, rank
from .run_folder import SETTINGS
from .settings import Settings, settings

LONGEST_NAME = 120  # of a run's folder


@dataclass(frozen=True, slots=True)
class SweepRow:
    """A run of a sweep."""

    head: str
    varied: Mapping[str, Any]  # of the settings that vary in the sweep, those that it has
    folder: Path
    validated_on: str
    checkpoint: Checkpoint | None  # None: it diverged
    error: str  # why
    is_best: bool  # of those validated on the same

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = self.checkpoint
        scores = {} if found is None else {"epoch": found.epoch, "scores": dict(found.scores)}
        facts = {"head": self.head, "settings": dict(self.varied), "run": str(self.folder), "best": self.is_best}
        return facts | {"validated_on": self.validated_on, "error": self.error or None} | scores


@dataclass(frozen=True, slots=True)
class SweepReport:
    """The runs of a sweep, by validation score."""

    rows: tuple[SweepRow, ...]  # the best first, those that diverged last

    @property
    def n_diverged(self) -> int:
        """Runs without a checkpoint."""
        return sum(row.checkpoint is None for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"n_runs": len(self.rows), "n_diverged": self.n_diverged, "runs": [row.to_json() for row in self.rows]}

    def describe(self) -> str:
        """A Markdown table whose columns also line up as plain text; below it, what went wrong."""
        names = tuple(dict.fromkeys(name for row in self.rows for name in row.varied))
        head = ("", "head", *names, "top-1", "loss", "epoch", "validated on", "run")
        rows = [_cells(row, names) for row in self.rows]
        widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
        padded = [[cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in (head, *rows)]
        lines = ["| " + " | ".join(cells) + " |" for cells in padded]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        lines += (
            ["", *(f"- {row.folder.name}: {row.error}" for row in self.rows if row.error)] if self.n_diverged else []
        )
        return "\n".join(lines)


def sweep(
    store: FeatureStore,
    manifest: Manifest,
    variants: Sequence[tuple[str, Settings]],
    out: Path | str,
    *,
    templates: Sequence[str] | str = "video",
    device: str = "auto",
    quiet: bool = False,
) -> SweepReport:
    """Train heads and settings side by side on one pass over the cache; each run has a folder of its own in `out`.

    Runs of another seed, batch size or episodes see other batches and have a pass of their own, one after the other. The
    same call after an interruption goes on; a call with more variants trains those alone.

    Args:
        variants: heads and what is asked of each, as `settings.variants` lists them.

    Raises:
        As `train` does, but for DivergedError: a run that diverges is reported, and the others go on.
    """
    out = Path(out)
    if (out / SETTINGS).exists():
        raise ConfigError(f"{out} is the folder of one run", fix="Choose another folder for the sweep.")
    jobs = [Job(head, asked, out / run_name(head, asked)) for head, asked in variants]
    ended = train_together(store, manifest, jobs, templates=templates, device=device, quiet=quiet)
    is_carved = not manifest.split("val").records
    return _report(jobs, ended, _varied(jobs), is_carved)


def run_name(head: str, asked: Settings) -> str:
    """The head and all that differs from its defaults: the same run has the same folder in whatever sweep."""
    defaults = _flat(settings(head))
    changed = {name: value for name, value in _flat(asked).items() if value != defaults[name]}
    short = _short_names(changed)
    name = ",".join([head, *(f"{short[key]}={_word(value)}" for key, value in changed.items())])
    if len(name) <= LONGEST_NAME and re.fullmatch(r"[\w.,=+-]+", name):
        return name
    return f"{head},{hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:12]}"


def _report(
    jobs: Sequence[Job],
    ended: Sequence[Checkpoint | DivergedError],
    varied: Sequence[Mapping[str, Any]],
    is_carved: bool,
) -> SweepReport:
    rows: list[SweepRow] = []
    for job, values, end in zip(jobs, varied, ended, strict=True):
        found = None if isinstance(end, DivergedError) else end
        error = str(end) if isinstance(end, DivergedError) else ""
        rows.append(SweepRow(job.head, values, job.out, _validated_on(found, is_carved), found, error, is_best=False))
    rows.sort(key=lambda row: rank(row.checkpoint.scores) if row.checkpoint else (-1.0, 0.0), reverse=True)
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if row.checkpoint and row.validated_on not in seen:
            rows[number] = dataclasses.replace(row, is_best=True)
            seen.add(row.validated_on)
    return SweepReport(tuple(rows))


def _validated_on(checkpoint: Checkpoint | None, is_carved: bool) -> str:
    """Runs with the same words answered the same questions."""
    if checkpoint is None:
        return ""
    train = checkpoint.train
    carved = f", carved with seed {train.seed}" if is_carved else ""
    return f"{checkpoint.validated_on}{carved}"


def _varied(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Of each run, the settings that differ between runs of its head, or in how any two runs are trained."""
    flat = [_flat(job.asked) for job in jobs]
    values: dict[str, set[Any]] = {}
    for job, found in zip(jobs, flat, strict=True):
        for name, value in found.items():
            owner = f"{job.head} {name}" if name.startswith("head.") else name
            values.setdefault(owner, set()).add(value)
    names = {owner.rpartition(" ")[2] for owner, found in values.items() if len(found) > 1}
    short = _short_names(names)
    return [{short[name]: value for name, value in found.items() if name in names} for found in flat]


def _flat(asked: Settings) -> dict[str, Any]:
    """All settings as `table.key`; the batch size of episodes is theirs."""
    tables = {name: table for name in ("head", "train", "episodes") if (table := getattr(asked, name)) is not None}
    flat = {
        f"{name}.{key}": value for name, table in tables.items() for key, value in dataclasses.asdict(table).items()
    }
    if asked.episodes is not None:
        del flat["train.batch_size"]
    return flat


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """`train.lr` as `lr`, where no other table has that key."""
    keys = Counter(name.partition(".")[2] for name in names)
    return {name: key if keys[key := name.partition(".")[2]] == 1 else name for name in names}


def _word(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "+".join(map(_word, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _cells(row: SweepRow, names: Sequence[str]) -> tuple[str, ...]:
    settings_of = [_word(row.varied[name]) if name in row.varied else "" for name in names]
    if row.checkpoint is None:
        return ("", row.head, *settings_of, "diverged", "", "", "", row.folder.name)
    scores = row.checkpoint.scores
    top_1, loss, epoch = f"{100 * scores['top_1']:.1f} %", f"{scores['loss']:.3f}", str(row.checkpoint.epoch)
    best = "best" if row.is_best else ""
    return (best, row.head, *settings_of, top_1, loss, epoch, row.validated_on, row.folder.name)
