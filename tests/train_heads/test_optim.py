"""The learning rate of every step, and what weight decay touches."""

import math

import pytest
from torch import nn

from coldframe.train_heads.heads.temporal_transformer import TemporalTransformer
from coldframe.train_heads.optim import build_optimiser, learning_rate, set_learning_rate
from coldframe.train_heads.specs import TrainSpec


def test_learning_rate_by_hand():
    spec = TrainSpec(lr=2.0, min_lr_ratio=0.1)
    rates = [learning_rate(step, n_steps=12, n_warmup=4, spec=spec) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert rates[12] == pytest.approx(0.2)
    assert learning_rate(0, 10, 0, spec) == 2.0
    assert rates[6] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))


def test_a_part_may_learn_at_a_share_of_the_rate():
    part, whole = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    part.lr_share = 0.5
    whole.lr_share = 0.1
    whole.append(part)
    head = nn.Sequential(whole, nn.Linear(2, 2))
    optimiser = build_optimiser(head, TrainSpec(lr=1.0))
    set_learning_rate(optimiser, 2.0)
    rate = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert [rate[id(p)] for p in head.parameters()] == pytest.approx([0.2, 0.2, 0.1, 0.1, 2.0, 2.0])


def test_decay_is_for_weight_matrices():
    head = TemporalTransformer(4, 16, 3, layers=1, heads=2, dropout=0.3, positions="matched", logit_scale=1.0)
    head.frames.blocks[0].mlp.c_fc.weight.requires_grad_(False)
    named = {id(parameter): name for name, parameter in head.named_parameters()}

    def decayed(spec):
        groups = build_optimiser(head, spec).param_groups
        return {named[id(p)] for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}, sum(
            len(group["params"]) for group in groups
        )

    names, n_parameters = decayed(TrainSpec())
    assert names == {
        "frames.blocks.0.attn.in_proj_weight",
        "frames.blocks.0.attn.out_proj.weight",
        "frames.blocks.0.mlp.c_proj.weight",
        "classifier.1.weight",
    }
    assert n_parameters == len(named) - 1
    assert len(decayed(TrainSpec(decay_all=True))[0]) == len(named) - 1
