"""AdamW over what a head trains, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import AdamW

from ..data_manifests.errors import ConfigError
from .specs import TrainSpec


def build_optimiser(head: nn.Module, spec: TrainSpec) -> AdamW:
    """AdamW over the trainable parameters, weight decay on weight matrices alone unless `spec.decay_all`.

    A module that declares a `lr_share` is trained, with all that it holds, at that share of the learning rate: the groups
    carry it for whoever sets the rate of a step.

    Raises:
        ConfigError: the head has nothing to train.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for path, module in head.named_modules():
        share = _lr_share(head, path)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_decayed = spec.decay_all or _is_weight_matrix(module, name, parameter)
                groups.setdefault((spec.weight_decay if is_decayed else 0.0, share), []).append(parameter)
    if not groups:
        raise ConfigError(
            "this head has nothing to train",
            fix="Evaluate it as it is: `coldframe eval PROTOCOL --store STORE --head NAME`.",
        )
    described: list[dict[str, Any]] = [
        {"params": found, "weight_decay": decay, "lr": share * spec.lr, "lr_share": share}
        for (decay, share), found in groups.items()
    ]
    return AdamW(described, lr=spec.lr, fused=True)


def set_learning_rate(optimiser: AdamW, rate: float) -> None:
    """Give every group its share of the rate of a step."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_share"]


def learning_rate(step: int, n_steps: int, n_warmup: int, spec: TrainSpec) -> float:
    """The rate of a step, counted from 0: a straight line up to `spec.lr`, then half a cosine down to a share of it."""
    if step < n_warmup:
        return spec.lr * (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    return spec.lr * (spec.min_lr_ratio + (1 - spec.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def _lr_share(head: nn.Module, path: str) -> float:
    """The product of what the modules on the way to a module declare."""
    steps = path.split(".") if path else []
    modules = [head.get_submodule(".".join(steps[:n])) for n in range(len(steps) + 1)]
    return math.prod(getattr(module, "lr_share", 1.0) for module in modules)


def _is_weight_matrix(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether decay should shrink it: not biases and norms (one axis), nor tables of positions, tokens and queries.

    The modules of torch call what multiplies an activation `weight` or `…_weight`; heads hold their tables as bare
    parameters under other names, or in an Embedding.
    """
    return parameter.ndim > 1 and name.endswith("weight") and not isinstance(module, nn.Embedding)
