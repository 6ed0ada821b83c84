"""Settings of a run: a TOML file, then `--set key=value`, into a head's config, a TrainSpec and an EpisodeTraining."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..data_manifests.errors import ConfigError, UnknownName
from .heads import find
from .specs import EpisodeTraining, TrainSpec

OUR_TABLES = ("head", "train", "episodes")
OTHER_TABLES = ("recipe", "extract", "features", "protocol", "short")  # of the same file, for others

Spec = TypeVar("Spec")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is asked to do."""

    head: Any  # the head's own config
    train: TrainSpec
    episodes: EpisodeTraining | None = None  # of a head that learns from episodes; they are then the batches


def settings(head: str, toml: Path | None = None, sets: Sequence[str] = ()) -> Settings:
    """Resolve what a run is asked to do; what is not said keeps its default.

    Args:
        toml: `[head]` (with `name`, or not), `[train]` and, where the head learns from episodes, `[episodes]`; other
            stages' tables are left alone.
        sets: `head.layers=2`, `train.lr=1e-3`, or `lr=1e-3` where one table alone has the key; stronger than the file.

    Raises:
        UnknownName: no such head, table or key; names the nearest.
        ConfigError: no TOML, a value of the wrong type, an ambiguous key, a combination that cannot be.
    """
    specs = _specs(head)
    tables: dict[str, dict[str, Any]] = {name: {} for name in specs}
    for table, key, value in _read(toml, [head])[1]:
        _refuse_unread(table, key, [specs])
        tables[table][key] = value
    for assignment in sets:
        table, key, text = _split(assignment, specs)
        tables[table][key] = _parse(text, _hints(specs[table])[key], f"{table}.{key}")
    return _filled(specs, tables)


def variants(heads: Sequence[str], toml: Path | None = None, sets: Sequence[str] = ()) -> list[tuple[str, Settings]]:
    """Resolve what a sweep is asked to do: every combination of the values that are listed, for each of the heads.

    Args:
        toml: as in `settings`, where a list stands for each of its items; a setting that is a list itself takes a list of
            lists. Of several heads each takes the settings in [head] that it has, or the one that is named all of them.
        sets: `lr=1e-3,1e-4`; for a setting that is a list itself `key=[1,2],[3]`.

    Raises:
        As `settings` does; a setting is unknown if none of the heads has it.
    """
    if not heads:
        raise ConfigError("no head is named", fix="Name one or several: HEAD,HEAD.")
    specs = {head: _specs(head) for head in heads}
    options: dict[str, dict[tuple[str, str], list[Any]]] = {head: {} for head in heads}
    named, given = _read(toml, heads)
    for table, key, value in given:
        takers = [head for head in heads if table != "head" or named in (None, head)]
        _refuse_unread(table, key, [specs[head] for head in takers])
        for head in takers:
            if hint := _keys(specs[head], table).get(key):
                options[head][table, key] = _listed(value, hint, f"{table}.{key}")
    for assignment in sets:
        for head, (table, key, text) in _takers(assignment, specs).items():
            options[head][table, key] = _parse_list(text, _hints(specs[head][table])[key], f"{table}.{key}")

    if any("episodes" not in tables for tables in specs.values()):
        for head in heads:
            if "episodes" in specs[head]:
                options[head].pop(("train", "batch_size"), None)  # it is of the heads that learn from batches of videos

    made: dict[tuple[str, Settings], None] = {}  # in order, and the same run once
    for head in heads:
        for values in itertools.product(*options[head].values()):
            tables: dict[str, dict[str, Any]] = {name: {} for name in specs[head]}
            for (table, key), value in zip(options[head], values, strict=True):
                tables[table][key] = value
            made[head, _filled(specs[head], tables)] = None
    return list(made)


def fill(spec: type[Spec], table: Mapping[str, Any], where: str) -> Spec:
    """Make a dataclass of plain settings from a table of TOML or JSON.

    Raises:
        UnknownName: a key that it lacks.
        ConfigError: a value of the wrong type.
    """
    hints = _hints(spec)
    for key in table:
        if key not in hints:
            raise UnknownName(f"setting in [{where}]", key, hints)
    return spec(**{key: _check(value, hints[key], f"{where}.{key}") for key, value in table.items()})


def complete(given: Settings, *, is_batch_size_given: bool = False) -> Settings:
    """The batch size of episodic training is its episodes to a step.

    Raises:
        ConfigError: another batch size was asked for.
    """
    if given.episodes is None:
        return given
    per_step, batch_size = given.episodes.per_step, given.train.batch_size
    if is_batch_size_given and batch_size != per_step:
        raise ConfigError(
            "this head learns from episodes, and its batch size is episodes.per_step",
            seen=f"train.batch_size={batch_size}",
            wanted=f"{per_step}, or none",
            fix="Write per_step=… instead.",
        )
    return dataclasses.replace(given, train=dataclasses.replace(given.train, batch_size=per_step))


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Flat tables as TOML, which `settings` reads again; None is left out, as TOML has no word for it."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        # A JSON number, text, truth value or list of them is the same in TOML.
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def _specs(head: str) -> dict[str, type]:
    """The tables of a head's settings."""
    episodes: dict[str, type] = {"episodes": EpisodeTraining} if find(head).learns_from_episodes else {}
    return {"head": find(head).config, "train": TrainSpec, **episodes}


def _filled(specs: Mapping[str, type], tables: Mapping[str, Mapping[str, Any]]) -> Settings:
    filled: dict[str, Any] = {name: fill(spec, tables[name], name) for name, spec in specs.items()}
    return complete(Settings(**filled), is_batch_size_given="batch_size" in tables["train"])


def _read(path: Path | None, heads: Sequence[str]) -> tuple[str | None, list[tuple[str, str, Any]]]:
    """The head that a file names, and its settings that are for this stage: table, key, value."""
    if path is None:
        return None, []
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no settings at {path}: {error.strerror}") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for name, table in tables.items():
        if name not in (*OUR_TABLES, *OTHER_TABLES) or not isinstance(table, dict):
            raise UnknownName(f"table of {path}", name, (*OUR_TABLES, *OTHER_TABLES))
    named = tables.get("head", {}).pop("name", None)
    if named is not None and named not in heads:
        raise ConfigError(f"{path} is for another head", seen=named, wanted=" or ".join(heads))
    return named, [(name, key, value) for name in OUR_TABLES for key, value in tables.get(name, {}).items()]


def _refuse_unread(table: str, key: str, specs: Sequence[Mapping[str, type]]) -> None:
    """Raise where none of the heads has a setting."""
    known = {name for spec in specs for name in _keys(spec, table)}
    if not known and table == "episodes":
        raise ConfigError("there are settings in [episodes], and the head does not learn from episodes", seen=key)
    if key not in known:
        raise UnknownName(f"setting in [{table}]", key, known)


def _takers(assignment: str, specs: Mapping[str, Mapping[str, type]]) -> dict[str, tuple[str, str, str]]:
    """The heads that have a setting, each with its table, key and value."""
    found, errors = {}, []
    for head, tables in specs.items():
        try:
            found[head] = _split(assignment, tables)
        except UnknownName as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _split(assignment: str, specs: Mapping[str, type]) -> tuple[str, str, str]:
    """`table.key=value` or `key=value` as table, key, value."""
    name, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError("a setting is given as key=value", seen=repr(assignment))
    name = name.strip()
    table, _, key = name.rpartition(".")
    choices = [f"{t}.{k}" for t, spec in specs.items() for k in _hints(spec)]
    found = [choice for choice in choices if name in (choice, choice.partition(".")[2] if not table else choice)]
    if not found:
        raise UnknownName("setting", name, choices if table else {choice.partition(".")[2] for choice in choices})
    if len(found) > 1:
        raise ConfigError(f"{name!r} is a setting of both", fix=f"Write {' or '.join(found)}.")
    return found[0].partition(".")[0], key, text.strip()


def _keys(specs: Mapping[str, type], table: str) -> dict[str, Any]:
    return _hints(specs[table]) if table in specs else {}


def _hints(spec: type) -> dict[str, Any]:
    """Names and types of the fields of a dataclass."""
    hints = typing.get_type_hints(spec)
    return {field.name: hints[field.name] for field in dataclasses.fields(spec)}


def _parse(text: str, hint: Any, where: str) -> Any:
    """Read a value of the command line as what the field holds."""
    choices = _alternatives(hint)
    if type(None) in choices and text.lower() == "none":
        return None
    kind = next(choice for choice in choices if choice is not type(None))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_parse(part.strip(), item, where) for part in text.split(",")) if text else ()
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{where} is true or false", seen=repr(text))
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise _wrong_type(where, text, hint) from error


def _parse_list(text: str, hint: Any, where: str) -> list[Any]:
    """Read the values of one setting that are to be tried."""
    parts = text.split(",")
    if _is_list(hint):
        parts = re.findall(r"\[([^\[\]]*)\]", text) if text.startswith("[") else [text]
    return [_parse(part.strip(), hint, where) for part in parts]


def _listed(value: Any, hint: Any, where: str) -> list[Any]:
    """The values in a file that are to be tried: those of a list, unless the setting is a list itself."""
    several = isinstance(value, list) and (not _is_list(hint) or all(isinstance(item, list) for item in value))
    if several and not value:
        raise ConfigError(f"{where} is an empty list", wanted="a value, or some to try")
    return value if several else [value]


def _is_list(hint: Any) -> bool:
    return any(typing.get_origin(kind) is tuple for kind in _alternatives(hint))


def _check(value: Any, hint: Any, where: str) -> Any:
    """Hold a value to its field's type; an int is a float, a list is a tuple."""
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            return tuple(_check(item, typing.get_args(kind)[0], where) for item in value)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is kind and (kind is not float or math.isfinite(value)):
            return value
    raise _wrong_type(where, value, hint)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _wrong_type(where: str, value: Any, hint: Any) -> ConfigError:
    wanted = getattr(hint, "__name__", hint)
    many = isinstance(value, list) or (isinstance(value, str) and "," in value)
    fix = "`coldframe sweep` tries several values." if many else None
    return ConfigError(f"{where} has a value of the wrong type", seen=repr(value), wanted=wanted, fix=fix)
