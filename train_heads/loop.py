"""One plain training loop: read it from the top.

Whatever is random is a function of (seed, epoch), so a run that was interrupted and resumed ends with the same bits as
one that was not. Its state is written whole between epochs, so Ctrl-C may fall anywhere.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data_manifests.errors import ColdframeError
from ..extract.batches import FeatureBatch
from ..extract.progress import Progress
from ..extract.text import TextFeatures
from .build import own_randomness, reseed
from .checkpoint import read_state, trained_tensors, write_state
from .optim import build_optimiser, learning_rate
from .specs import Episodes, HeadOutput, TrainSpec

CHECK_EVERY = 20  # steps between two looks at the loss; each look waits for the GPU
SAVING_SHARE = 10  # a state that took a second is not written again for ten
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DivergedError(ColdframeError, ArithmeticError):
    """The loss or a gradient became infinite or NaN."""


class Batches(Protocol):
    """What a loop asks of the training data: of a `FeatureDataset`, or an `EpisodeDataset`."""

    def __len__(self) -> int:
        """Videos, or episodes, of an epoch."""
        ...

    def batches(
        self, batch_size: int, shuffle_seed: int | None = None, *, pin: bool = False
    ) -> Iterator[FeatureBatch] | Iterator[Episodes]:
        """All of an epoch once, in the order that the seed draws; `pin` them where an accelerator takes them."""
        ...


Validate = Callable[[nn.Module], Mapping[str, float]]  # -> {"top_1": larger is better, "loss": smaller breaks ties}


@dataclass(frozen=True, slots=True)
class Fitted:
    """Where the best weights, now in the head, come from."""

    epoch: int  # counted from 1
    step: int
    scores: Mapping[str, float]
    history: tuple[Mapping[str, float], ...]  # one record an epoch


def fit(
    head: nn.Module,
    data: Batches,
    text: TextFeatures | None,
    spec: TrainSpec,
    *,
    validate: Validate,
    folder: Path,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> Fitted:
    """Train a head and leave it with the weights of its best epoch; go on where an interrupted run in `folder` stopped.

    Args:
        data: training videos, every one with a label in [0, C), or episodes of them.
        text: class texts, on any device; None for a head that does not read them.
        validate: scores the head on videos it does not train on, after each epoch.
        folder: of the run; `history.jsonl` grows there by a line an epoch.
        quiet: show no progress.

    Raises:
        ConfigError: the head has nothing to train.
        DivergedError: a loss or gradient was not finite.
        CheckpointError: the state of the interrupted run cannot be read.
    """
    device = torch.device(device)
    head.to(device)
    text = None if text is None else text.to(device)
    optimiser = build_optimiser(head, spec)
    scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16" and device.type == "cuda")

    steps_per_epoch = math.ceil(len(data) / spec.batch_size)
    n_steps = spec.epochs * steps_per_epoch
    n_warmup = min(round(spec.warmup_epochs * steps_per_epoch), n_steps - 1)

    epoch, best, history = 0, {}, []
    if state := read_state(folder, device):
        epoch, best, history = state["epoch"], state["best"], state["history"]
        head.load_state_dict(state["head"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])

    saved_at = saving_s = 0.0
    with own_randomness(device), Progress(n_steps - epoch * steps_per_epoch, "steps", quiet=quiet) as progress:
        while epoch < spec.epochs and not (best and 0 < spec.patience <= epoch - best["epoch"]):
            started = time.monotonic()
            seed = _epoch_seed(spec.seed, epoch)
            reseed(device, seed)

            losses, norms = [], []
            head.train()
            batches = data.batches(spec.batch_size, seed, pin=device.type == "cuda")
            for step, batch in enumerate(batches, start=epoch * steps_per_epoch):
                rate = learning_rate(step, n_steps, n_warmup, spec)
                loss, norm = _step(head, batch.to(device, torch.float32), text, spec, optimiser, scaler, rate)
                losses.append(loss)
                norms.append(norm)
                if len(losses) % CHECK_EVERY == 0 or len(losses) == steps_per_epoch:
                    n_unseen = (len(losses) - 1) % CHECK_EVERY + 1
                    _check(losses[-n_unseen:], norms[-n_unseen:], step, scaler)
                    best_so_far = f"{best['scores']['top_1']:.3f}" if best else "none"
                    progress.update(n_unseen, epoch=epoch + 1, loss=f"{losses[-1]:.3f}", best_top_1=best_so_far)

            head.eval()
            with torch.no_grad():
                scores = dict(validate(head))

            epoch += 1
            step = epoch * steps_per_epoch
            if not best or _rank(scores) > _rank(best["scores"]):
                best = {"epoch": epoch, "step": step, "scores": scores, "head": _copy(trained_tensors(head))}
            means = {"loss": float(torch.stack(losses).mean()), "gradient_norm": float(torch.stack(norms).mean())}
            seconds = round(time.monotonic() - started, 3)
            validation = {f"val_{name}": score for name, score in scores.items()}
            history.append(
                {
                    "epoch": epoch,
                    "step": step,
                    "lr": optimiser.param_groups[0]["lr"],
                    **means,
                    **validation,
                    "seconds": seconds,
                }
            )
            _write_history(folder, history)
            if time.monotonic() - saved_at >= SAVING_SHARE * saving_s:
                saved_at = time.monotonic()
                state = {"epoch": epoch, "best": best, "history": history, "head": trained_tensors(head)}
                write_state(folder, state | {"optimiser": optimiser.state_dict(), "scaler": scaler.state_dict()})
                saving_s = time.monotonic() - saved_at

    head.load_state_dict(best["head"], strict=False)
    head.eval()
    return Fitted(best["epoch"], best["step"], best["scores"], tuple(history))


def _step(
    head: nn.Module,
    batch: FeatureBatch | Episodes,
    text: TextFeatures | None,
    spec: TrainSpec,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """One step down; the loss and the norm of the gradient before clipping, both still on the device."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    with torch.autocast(batch.labels.device.type, DTYPES[spec.precision], enabled=spec.precision != "fp32"):
        loss = _loss(head(batch, text), batch.labels, spec.label_smoothing)
    optimiser.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    norm = nn.utils.clip_grad_norm_(head.parameters(), spec.clip_norm or math.inf)
    scaler.step(optimiser)
    scaler.update()
    return loss.detach(), norm.detach()


def _loss(output: HeadOutput, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of the logits [..., C], where there are any, with labels [...]; plus the head's own terms."""
    terms = list(output.losses.values())
    if output.logits is not None:
        logits = output.logits.float().flatten(0, -2)
        terms.append(cross_entropy(logits, labels.flatten(), label_smoothing=label_smoothing))
    return torch.stack(terms).sum()


def _check(losses: list[Tensor], norms: list[Tensor], last_step: int, scaler: torch.amp.GradScaler) -> None:
    """Raise DivergedError at the first loss or gradient that is not finite."""
    is_bad = ~torch.stack(losses).isfinite()
    if not scaler.is_enabled():  # a scaler tries large scales and takes back those that overflow
        is_bad |= ~torch.stack(norms).isfinite()
    if is_bad.any():
        first = int(is_bad.int().argmax())
        raise DivergedError(
            f"training diverged at step {last_step - len(losses) + 2 + first}",
            seen=f"loss {float(losses[first]):g}, gradient norm {float(norms[first]):g}",
            fix="Lower the learning rate (--set lr=…), clip (--set clip_norm=1), or use --set precision=fp32.",
        )


def _rank(scores: Mapping[str, float]) -> tuple[float, float]:
    return scores["top_1"], -scores["loss"]


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    lines = "".join(f"{json.dumps(record)}\n" for record in history)
    (folder / "history.jsonl").write_text(lines, encoding="utf-8")
