"""Sentences about classes, and a frozen text tower with inserts that reads them.

A head that trains inside the text tower embeds its classes anew at every step. Two things keep that cheap: a batch is
given the sentences of its own classes, each encoded once; and without gradients the embeddings of all classes are kept
until a parameter changes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from ..data_manifests.errors import ConfigError
from ..extract.text import readable
from ..extract.towers import TEXTS_AT_ONCE, Tower

NAME_COLUMNS = ("name", "class name", "class_name", "class")
TEXT_COLUMN = "description"

ACTIONCLIP = "actionclip"  # the name of the sentences below, which are as many as ActionCLIP's and ours
TEMPLATES = (
    "{}",
    "{}, an action.",
    "the action {}.",
    "the human action of {}.",
    "a video of {}.",
    "a short video of {}.",
    "a clip that shows {}.",
    "a video of the action {}.",
    "a photo of {}.",
    "a photo of the action {}.",
    "a frame of a video of {}.",
    "someone is {}.",
    "a person is {}.",
    "people are {}.",
    "a video of a person {}.",
    "what is seen here is {}.",
)


class AdaptedTexts(nn.Module):
    """P sentences of each of C classes in a text tower with an insert in each of its last blocks."""

    ids: Tensor

    def __init__(
        self, sentences: Sequence[Sequence[str]], tower: Tower, inserts: nn.ModuleList, checkpoint: bool = False
    ) -> None:
        """Tokenize C × P sentences.

        Raises:
            ConfigError: a sentence is longer than the tower reads.
            TowerError: the text tower is not CLIP's.
        """
        super().__init__()
        self.inserts, self.checkpoint = inserts, checkpoint
        self.tower = tower.text
        self.n_sentences = len(sentences[0])
        ids = tower.tokenize([text for row in sentences for text in row])
        ids = rearrange(up_to_the_longest(ids), "(c p) s -> c p s", p=self.n_sentences)
        self.register_buffer("ids", ids.to(tower.device), persistent=False)
        self._kept = Kept(self)

    def encode(self, ids: Tensor) -> Tensor:
        """Token ids [n, S] -> embeddings [n, E], un-normalised."""
        stream = self.tower.resume(self.tower.embed(ids), inserts=self.inserts, checkpoint=self.checkpoint)
        return self.tower.project(stream, ids.argmax(dim=-1))

    def of(self, labels: Tensor) -> Tensor:
        """A sentence of the class of each sample, drawn where a class has several: labels [B] -> [B, E]."""
        drawn = torch.randint(self.n_sentences, labels.shape, device=labels.device)
        rows, place = torch.unique(labels * self.n_sentences + drawn, return_inverse=True)
        return self.encode(self.ids.flatten(0, 1)[rows])[place]

    def all(self) -> Tensor:
        """Every sentence of every class, [C, P, E]; without gradients, computed once for each state of the parameters."""
        if torch.is_grad_enabled():
            return self._encode_all()
        return self._kept(self._encode_all)

    def _encode_all(self) -> Tensor:
        chunks = self.ids.flatten(0, 1).split(TEXTS_AT_ONCE)
        return rearrange(torch.cat([self.encode(ids) for ids in chunks]), "(c p) e -> c p e", p=self.n_sentences)


class Kept:
    """A tensor that depends on the parameters of a module, computed again where one of them has changed."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = module.parameters
        self._state: Tensor | None = None
        self._value: Tensor | None = None

    def __call__(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` says, or said of the same parameters: in float32, whoever asks for it first."""
        # By value: torch's fused optimisers do not count the changes that they make to a parameter.
        parts = [parameter.detach().flatten().float() for parameter in self._parameters()]
        state = torch.cat(parts) if parts else torch.empty(0)
        if self._state is None or self._state.device != state.device or not torch.equal(self._state, state):
            with torch.autocast(state.device.type, enabled=False):
                self._state, self._value = state, compute()
        assert self._value is not None
        return self._value


def up_to_the_longest(ids: Tensor) -> Tensor:
    """Token ids [C, S] without what is padding in all; a causal tower never reads what follows the end of a text."""
    return ids[:, : int(ids.argmax(dim=-1).max()) + 1]


def from_templates(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Every template with every class name, made readable, at its {}: C rows of P sentences."""
    return [[template.replace("{}", readable(name)) for template in templates] for name in class_names]


def from_descriptions(class_names: Sequence[str], path: Path) -> list[list[str]]:
    """The one description of each class in a CSV with the columns `name` (or `Class Name`) and `description`: C rows of 1.

    A name is found as it is spelt, or else as it reads: `brush_hair` finds `Brush hair`.

    Raises:
        ConfigError: the file cannot be read or lacks a column, or a class has no description or two that differ.
    """
    found = _read(path)
    as_read = {readable(name).casefold(): text for name, text in found.items()}
    rows = [[found.get(name) or as_read.get(readable(name).casefold(), "")] for name in class_names]
    missing = [name for name, (text,) in zip(class_names, rows, strict=True) if not text]
    if missing:
        shown = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise ConfigError(
            f"{len(missing)} classes have no description in {path}: {shown}", fix="Add a row for each of them."
        )
    return rows


def _read(path: Path) -> dict[str, str]:
    """Class name -> description."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, skipinitialspace=True) if row]
    except OSError as error:
        raise ConfigError(f"no descriptions at {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not a CSV in UTF-8: {error}") from error
    header = [cell.strip().casefold() for cell in rows[0]] if rows else []
    names = [column for column in NAME_COLUMNS if column in header]
    if not names or TEXT_COLUMN not in header:
        wanted = f"the columns name and {TEXT_COLUMN}"
        raise ConfigError(f"{path} has no class descriptions", seen=", ".join(header) or "an empty file", wanted=wanted)
    name, text = header.index(names[0]), header.index(TEXT_COLUMN)
    found: dict[str, str] = {}
    for row in rows[1:]:
        if len(row) > max(name, text):
            label, words = row[name].strip(), row[text].strip()
            if found.setdefault(label, words) != words:
                raise ConfigError(f"{path} describes {label!r} in two ways", fix="Keep one row for each class.")
    return found
