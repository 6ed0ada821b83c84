"""AdamW over what a head trains, and the learning rate of every step."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW

from ..data_manifests.errors import ConfigError
from .specs import TrainSpec


def build_optimiser(head: nn.Module, spec: TrainSpec) -> AdamW:
    """AdamW over the trainable parameters, weight decay on weight matrices alone unless `spec.decay_all`.

    Raises:
        ConfigError: the head has nothing to train.
    """
    decayed, kept = [], []
    for module in head.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_decayed = spec.decay_all or _is_weight_matrix(module, name, parameter)
                (decayed if is_decayed else kept).append(parameter)
    if not decayed and not kept:
        raise ConfigError(
            "this head has nothing to train",
            fix="Evaluate it as it is: `coldframe eval PROTOCOL --store STORE --head NAME`.",
        )
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=spec.lr, fused=True)


def learning_rate(step: int, n_steps: int, n_warmup: int, spec: TrainSpec) -> float:
    """The rate of a step, counted from 0: a straight line up to `spec.lr`, then half a cosine down to a share of it."""
    if step < n_warmup:
        return spec.lr * (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    return spec.lr * (spec.min_lr_ratio + (1 - spec.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def _is_weight_matrix(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether decay should shrink it: not biases and norms (one axis), nor tables of positions, tokens and queries.

    The modules of torch call what multiplies an activation `weight` or `…_weight`; heads hold their tables as bare
    parameters under other names, or in an Embedding.
    """
    return parameter.ndim > 1 and name.endswith("weight") and not isinstance(module, nn.Embedding)
