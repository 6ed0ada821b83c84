"""Published results as settings: one TOML file for each, `train-head HEAD --config NAME`.

[recipe]    the result: data set, protocol, figure, its source, the hardware and minutes that its authors give
[extract]   flags of `coldframe extract`; which features follows from the head
[head] [train] [episodes] [protocol]   settings, as in any file for --config
[short]     what to change to see it run on the clips of `coldframe demo`
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data_manifests.errors import ConfigError, UnknownName
from ..heads import find as find_head
from ..settings import Settings, settings

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Recipe:
    """One published result and what to run for it."""

    name: str
    title: str  # the first line of the file
    dataset: str
    protocol: str  # of `coldframe eval`
    published: float  # per cent
    metric: str
    source: str
    hardware: str  # of the published run; "not published" where nothing says
    minutes: float  # of the published training on it; 0 where nothing says
    note: str  # what differs from the published run, "" for nothing
    head: str
    extract: Mapping[str, Any]
    protocol_settings: Mapping[str, Any]
    short: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file."""
        return FOLDER / f"{self.name}.toml"

    @property
    def short_sets(self) -> list[str]:
        """The short form, as values of --set."""
        return [f"{key}={_word(value)}" for key, value in self.short.items()]

    @property
    def features(self) -> tuple[str, ...]:
        """Stored features that the head of this recipe reads."""
        return find_head(self.head).features(self.settings().head)

    def settings(self, is_short: bool = False) -> Settings:
        """The head's config and how it is trained, of the recipe or of its short form."""
        return settings(self.head, self.path, self.short_sets if is_short else [])

    def commands(self) -> tuple[str, ...]:
        """What to type, from videos to the number."""
        flags = " ".join(f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in self.extract.items())
        lists = f"{self.dataset}.csv"
        lines = [f"coldframe extract {lists} --store store --features {','.join(self.features)} {flags}".rstrip()]
        scored = f"--head {self.head}"
        if find_head(self.head).is_trained:
            run = f"runs/{self.name}"
            lines.append(f"coldframe train-head {self.head} --store store --config {self.name} --out {run}")
            scored = f"--checkpoint {run}"
        else:
            config = tomllib.loads(self.path.read_text(encoding="utf-8"))["head"]
            scored += "".join(f" --set {key}={_word(value)}" for key, value in config.items() if key != "name")
        asked = "".join(f" --{key} {value}" for key, value in self.protocol_settings.items())
        return (*lines, f"coldframe eval {self.protocol} --store store {scored}{asked}")


def names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name: str) -> Recipe:
    """Read a recipe.

    Raises:
        UnknownName: no such recipe.
        ConfigError: one that lacks a field.
    """
    if name not in names():
        raise UnknownName("recipe", name, names())
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    try:
        return Recipe(
            name=name,
            title=text.splitlines()[0].removeprefix("# "),
            head=tables["head"]["name"],
            extract=tables["extract"],
            protocol_settings=tables.get("protocol", {}),
            short=tables["short"],
            **tables["recipe"],
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"recipe {name} is incomplete: {error}") from error


def _word(value: Any) -> str:
    """A TOML value as --set takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
