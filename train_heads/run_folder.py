"""The folder of a run: the settings that began it, and whether it may be gone on with."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data_manifests.errors import ConfigError
from ..data_manifests.records import Manifest
from ..extract.provenance import code_commit, code_versions
from ..extract.store import FeatureStore
from .checkpoint import is_finished, write_whole
from .settings import Settings, to_toml

SETTINGS = "settings.toml"


def describe_run(
    store: FeatureStore, manifest: Manifest, head: str, asked: Settings, templates: Sequence[str] | str
) -> str:
    """Everything that decides the run, as the TOML file that would start it again."""
    versions = ", ".join(f"{name} {number}" for name, number in code_versions().items())
    made = f"# {versions}, commit {code_commit() or 'unknown'}\n# store {store.path}, manifest {manifest.name}\n\n"
    return made + to_toml(
        {
            "head": {"name": head, **dataclasses.asdict(asked.head)},
            "train": dataclasses.asdict(asked.train),
            **({} if asked.episodes is None else {"episodes": dataclasses.asdict(asked.episodes)}),
            "features": {
                "store": store.fingerprint,
                "manifest": manifest.fingerprint,
                "templates": templates if isinstance(templates, str) else list(templates),
            },
        }
    )


def has_ended(folder: Path, settings: str) -> bool:
    """Whether this very run has already ended in a folder; writes nothing.

    Raises:
        ConfigError: the folder holds something else.
    """
    ours = tomllib.loads(settings)
    begun = _begun(folder / SETTINGS)
    if ours.keys() <= begun.keys():
        _expect_same(folder, begun, ours)
        return is_finished(folder)
    if folder.is_file() or (folder.exists() and any(not path.name.startswith(SETTINGS) for path in folder.iterdir())):
        raise ConfigError(f"{folder} holds something that is no run", fix="Choose another folder.")
    return False


def _begun(path: Path) -> dict[str, Any]:
    """The settings of a run that has begun; nothing where they are absent or were cut off while being written."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}


def begin(folder: Path, settings: str) -> None:
    """Write the settings of a run; those of one that goes on stay as they are."""
    if not tomllib.loads(settings).keys() <= _begun(folder / SETTINGS).keys():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / SETTINGS, settings.encode())


def _expect_same(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for table, values in ours.items():
        held = theirs.get(table, {})
        for key in [*values, *held]:
            seen, wanted = held.get(key), values.get(key)
            if seen != wanted:
                raise ConfigError(
                    f"{folder} holds a run with another {table}.{key}",
                    seen=repr(seen),
                    wanted=repr(wanted),
                    fix="Choose another folder, or remove it.",
                )
