"""One head in training: everything that belongs to it alone, and what it does with a batch. The loop brings the batches."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data_manifests.errors import ColdframeError
from ..extract.batches import FeatureBatch
from ..extract.text import TextFeatures
from .checkpoint import read_state, trained_tensors, write_state
from .optim import build_optimiser, learning_rate, set_learning_rate
from .randomness import Randomness
from .specs import Episodes, HeadOutput, TrainSpec

STEADIER = "Lower the learning rate (--set lr=…), clip (--set clip_norm=1), or use --set precision=fp32."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DivergedError(ColdframeError, ArithmeticError):
    """The loss or a gradient became infinite or NaN."""


@dataclass(slots=True)
class Tally:
    """Answers to the validation set so far."""

    n: int = 0
    hits: int = 0
    loss: float = 0.0

    def scores(self) -> dict[str, float]:
        """top_1: larger is better; loss: smaller breaks ties."""
        return {"top_1": self.hits / self.n, "loss": self.loss / self.n}


@dataclass(slots=True)
class Best:
    """The epoch with the best scores."""

    epoch: int  # counted from 1
    step: int
    scores: Mapping[str, float]
    head: dict[str, Tensor] = field(repr=False)  # its weights


class Run:
    """A head, its optimiser, its random numbers, its history and its best epoch."""

    def __init__(
        self,
        head: nn.Module,
        spec: TrainSpec,
        folder: Path,
        n_batches: int,
        *,
        text: TextFeatures | None = None,
        text_of_validation: TextFeatures | None = None,
        features: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare, and go on where an interrupted run in the folder stopped.

        Args:
            folder: of the run; `history.jsonl` grows there by a line an epoch.
            n_batches: of an epoch.
            text: class texts; None for a head that does not read them.
            text_of_validation: of the classes that validation asks about, where they are others.
            features: of the batches, those that the head is shown; None shows all.

        Raises:
            ConfigError: the head has nothing to train.
            CheckpointError: the state of the interrupted run cannot be read.
        """
        self.device = torch.device(device)
        self.head, self.spec, self.folder, self.features = head.to(self.device), spec, folder, features
        self.text = None if text is None else text.to(self.device)
        asked = text_of_validation or text
        self.text_of_validation = None if asked is None else asked.to(self.device)
        self.n_batches, self.n_steps = n_batches, spec.epochs * n_batches
        self.optimiser = build_optimiser(head, spec)
        is_scaled = spec.precision == "fp16" and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_scaled)
        self.randomness = Randomness(self.device)

        self.epoch = 0  # that are done
        self.best: Best | None = None
        self.history: list[dict[str, Any]] = []  # a record an epoch
        self.error: DivergedError | None = None
        self._resume()

    @property
    def is_going(self) -> bool:
        """Whether there is an epoch to come."""
        waited = self.epoch - self.best.epoch if self.best else 0
        is_tired = 0 < self.spec.patience <= waited
        return self.error is None and self.epoch < self.spec.epochs and not is_tired

    def begin_epoch(self, seed: int) -> None:
        """Whatever is random in this epoch is a function of the seed."""
        self._began = time.monotonic()
        self.randomness.reseed(seed)
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._n_checked = 0
        self._tally = Tally()
        self.head.train()

    def step(self, batch: FeatureBatch | Episodes) -> None:
        """One step down; the loss and the norm of the gradient before clipping stay on the device."""
        spec = self.spec
        n_warmup = min(round(spec.warmup_epochs * self.n_batches), self.n_steps - 1)
        rate = learning_rate(self.epoch * self.n_batches + len(self._losses), self.n_steps, n_warmup, spec)
        set_learning_rate(self.optimiser, rate)
        with self.randomness:
            with torch.autocast(self.device.type, DTYPES[spec.precision], enabled=spec.precision != "fp32"):
                output = self.head(self._shown(batch), self.text)
                loss = loss_of(output, batch.labels, spec.label_smoothing)
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.head.parameters(), spec.clip_norm or math.inf)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)  # now: the gradients of the next run take their place in memory
        self._losses.append(loss.detach())
        self._norms.append(norm.detach())

    @property
    def last_loss(self) -> float:
        """Of the last step; waits for the device."""
        return float(self._losses[-1])

    def check(self) -> None:
        """Look at the steps since the last check; waits for the device.

        Raises:
            DivergedError: a loss or a gradient was not finite; names the step.
        """
        losses, norms = self._losses[self._n_checked :], self._norms[self._n_checked :]
        is_bad = ~torch.stack(losses).isfinite()
        if not self.scaler.is_enabled():  # a scaler tries large scales and takes back those that overflow
            is_bad |= ~torch.stack(norms).isfinite()
        if is_bad.any():
            first = int(is_bad.int().argmax())
            raise DivergedError(
                f"training diverged at step {self.epoch * self.n_batches + self._n_checked + first + 1}",
                seen=f"loss {float(losses[first]):g}, gradient norm {float(norms[first]):g}",
                fix=STEADIER,
            )
        self._n_checked = len(self._losses)

    def answer(self, batch: FeatureBatch | Episodes) -> None:
        """Score a batch of the validation set, as evaluation does."""
        with torch.no_grad(), self.randomness:
            logits = self._logits(self._shown(batch)).float().flatten(0, -2)
        labels = batch.labels.flatten()
        self._tally.n += len(labels)
        self._tally.hits += int((logits.argmax(dim=-1) == labels).sum())
        self._tally.loss += float(cross_entropy(logits, labels, reduction="sum"))

    def end_epoch(self) -> None:
        """Keep the weights if they are the best so far, and add to the history.

        Raises:
            DivergedError: the loss of the validation set is not finite, as after a last step that went too far.
        """
        scores = self._tally.scores()
        step = (self.epoch + 1) * self.n_batches
        if not math.isfinite(scores["loss"]):
            raise DivergedError(
                f"training diverged by the validation after step {step}", seen=f"loss {scores['loss']:g}", fix=STEADIER
            )
        self.epoch += 1
        if self.best is None or rank(scores) > rank(self.best.scores):
            weights = {name: tensor.clone() for name, tensor in trained_tensors(self.head).items()}
            self.best = Best(self.epoch, step, scores, weights)
        self.history.append(
            {
                "epoch": self.epoch,
                "step": step,
                "lr": max(group["lr"] for group in self.optimiser.param_groups),
                "loss": float(torch.stack(self._losses).mean()),
                "gradient_norm": float(torch.stack(self._norms).mean()),
                **{f"val_{name}": score for name, score in scores.items()},
                "seconds": round(time.monotonic() - self._began, 3),
            }
        )
        lines = "".join(f"{json.dumps(record)}\n" for record in self.history)
        (self.folder / "history.jsonl").write_text(lines, encoding="utf-8")

    def save(self) -> None:
        """Write what is needed to go on after an interruption."""
        assert self.best is not None
        best = {"epoch": self.best.epoch, "step": self.best.step, "scores": self.best.scores, "head": self.best.head}
        state = {"epoch": self.epoch, "best": best, "history": self.history, "head": trained_tensors(self.head)}
        more = {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}
        write_state(self.folder, state | more)

    def finish(self) -> Best:
        """Leave the head with the weights of its best epoch."""
        assert self.best is not None
        self.head.load_state_dict(self.best.head, strict=False)
        self.head.eval()
        return self.best

    def _shown(self, batch: FeatureBatch | Episodes) -> Any:
        """A batch as this head alone would have it: what others need is not there."""
        return batch if self.features is None else batch.only(self.features)

    def _logits(self, batch: FeatureBatch | Episodes) -> Tensor:
        head: Any = self.head
        if isinstance(batch, FeatureBatch):
            return head(batch, self.text_of_validation).logits  # [B, C]
        text = self.text_of_validation
        names = None if text is None else text.embedding[batch.class_ids]  # [n, W, E]
        return head.episode_logits(batch.bank, batch.support, batch.query, names)  # [n, Q, W]

    def _resume(self) -> None:
        if state := read_state(self.folder, self.device):
            self.epoch, self.best, self.history = state["epoch"], Best(**state["best"]), state["history"]
            self.head.load_state_dict(state["head"], strict=False)
            self.optimiser.load_state_dict(state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])


def loss_of(output: HeadOutput, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of the logits [..., C], where there are any, with labels [...]; plus the head's own terms."""
    terms = list(output.losses.values())
    if output.logits is not None:
        logits = output.logits.float().flatten(0, -2)
        terms.append(cross_entropy(logits, labels.flatten(), label_smoothing=label_smoothing))
    return torch.stack(terms).sum()


def rank(scores: Mapping[str, float]) -> tuple[float, float]:
    """By which scores are compared: the larger is the better."""
    return scores["top_1"], -scores["loss"]
