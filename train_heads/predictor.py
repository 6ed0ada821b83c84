"""A head at work: what evaluation asks of one, in NumPy, whatever device it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..extract.batches import FeatureBatch
from ..extract.text import TextFeatures
from .heads import find


@dataclass(eq=False)
class Predictor:
    """A head that is built, loaded and on its device. Fits the protocols of evaluate/predictors.py."""

    head: str
    config: Mapping[str, Any]  # the head's own settings
    module: nn.Module
    needs: tuple[str, ...]
    class_names: tuple[str, ...]
    text: TextFeatures | None  # of class_names; None for a head that does not read them
    device: torch.device
    checkpoint: str = ""
    manifest_fingerprint: str = ""
    seen_classes: tuple[str, ...] = ()
    selection: str = ""
    seed: int | None = None

    def __post_init__(self) -> None:
        """Say what kind of head it is."""
        self.tasks = find(self.head).tasks
        self.uses_class_names = self.text is not None or bool(getattr(self.module, "uses_class_names", False))
        self.templates = () if self.text is None else self.text.templates
        self.is_transductive = bool(getattr(self.module, "is_transductive", False))
        self.module.eval()

    def logits(self, batch: FeatureBatch) -> NDArray[np.float32]:
        """Scores [B, C] of a batch; larger is likelier."""
        with torch.inference_mode():
            output = self.module(batch.to(self.device, torch.float32), self.text)
        return output.logits.float().cpu().numpy()

    def episode_logits(
        self, bank: FeatureBatch, support: NDArray[np.int64], query: NDArray[np.int64], class_ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Scores [n, Q, W] of queries [n, Q] against supports [n, W, K], rows of the bank; class_ids [n, W]."""
        s, q, ways = (torch.tensor(rows, device=self.device) for rows in (support, query, class_ids))
        text = None if self.text is None else self.text.embedding[ways]  # [n, W, E]
        head: Any = self.module
        with torch.inference_mode():
            logits = head.episode_logits(bank.to(self.device, torch.float32), s, q, text)
        return logits.float().cpu().numpy()
