"""The training loop: what it learns, what it keeps, and that interruption changes nothing."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.batches import FeatureBatch
from coldframe.train_heads.checkpoint import CheckpointError
from coldframe.train_heads.heads.temporal_transformer import TemporalTransformer
from coldframe.train_heads.loop import DivergedError, _loss, fit
from coldframe.train_heads.specs import HeadOutput, TrainSpec


class Ram:
    """Videos in memory, with the face of a FeatureDataset."""

    def __init__(self, embedding, labels):
        mask = torch.ones(embedding.shape[:2], dtype=torch.bool)
        self.everything = FeatureBatch({"embedding": embedding}, mask, labels, tuple(map(str, range(len(labels)))))

    def __len__(self):
        return len(self.everything)

    def batches(self, batch_size, shuffle_seed=None, *, pin=False):
        generator = torch.Generator().manual_seed(shuffle_seed or 0)
        for rows in torch.randperm(len(self), generator=generator).split(batch_size):
            yield self.everything.select(rows)


def videos(n=60, width=16, seed=0):
    """Three classes that differ in their mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(99))
    return Ram(centres[labels][:, None] + torch.randn(n, 4, width, generator=generator), labels)


def new_head(seed=0, dropout=0.3) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return TemporalTransformer(4, 16, 3, layers=1, heads=2, dropout=dropout, positions="matched", logit_scale=1.0)


def validation(data):
    @torch.no_grad()
    def validate(head):
        batch = data.everything
        logits = head(batch, None).logits
        loss = nn.functional.cross_entropy(logits, batch.labels)
        return {"top_1": float((logits.argmax(-1) == batch.labels).float().mean()), "loss": float(loss)}

    return validate


def run(folder, spec, head=None, data=None, validate=None):
    folder.mkdir(exist_ok=True)
    head = head or new_head()
    data = data or videos()
    return head, fit(head, data, None, spec, validate=validate or validation(videos(seed=1)), folder=folder)


SPEC = TrainSpec(epochs=4, batch_size=16, lr=3e-3)


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to train"):
        run(tmp_path, SPEC, head=nn.Identity())


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": 0},
        {"lr": -1.0},
        {"batch_size": 0},
        {"val_fraction": 1.0},
        {"precision": "int8"},
        {"label_smoothing": 2.0},
    ],
)
def test_numbers_that_cannot_train_are_refused(setting):
    with pytest.raises(ConfigError):
        TrainSpec(**setting)


def test_it_learns(tmp_path):
    head, fitted = run(tmp_path, replace(SPEC, epochs=10))
    assert fitted.scores["top_1"] > 0.9
    assert not head.training
    assert validation(videos(seed=1))(head) == pytest.approx(fitted.scores)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"] / 2
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == list(fitted.history)
    assert [line["epoch"] for line in lines] == list(range(1, 11))
    assert lines[-1]["step"] == 10 * math.ceil(60 / 16)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 1.0), (0.8, 9.0), (0.7, 0.1)], 2),  # by top-1
        ([(0.5, 1.0), (0.5, 0.5), (0.5, 0.7)], 2),  # then by loss
        ([(0.5, 1.0), (0.5, 1.0), (0.5, 1.0)], 1),  # then the first
    ],
)
def test_the_best_epoch_is_kept(tmp_path, scores, best):
    seen, script = [], iter(scores)

    def validate(head):
        seen.append({name: tensor.clone() for name, tensor in head.state_dict().items()})
        return dict(zip(("top_1", "loss"), next(script), strict=True))

    head, fitted = run(tmp_path, replace(SPEC, epochs=3), validate=validate)
    assert (fitted.epoch, fitted.step) == (best, best * 4)
    assert all(torch.equal(tensor, seen[best - 1][name]) for name, tensor in head.state_dict().items())


def test_patience_stops_early(tmp_path):
    _, fitted = run(tmp_path, replace(SPEC, epochs=9, patience=2), validate=lambda head: {"top_1": 0.1, "loss": 1.0})
    assert len(fitted.history) == 3


def without_seconds(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


@pytest.mark.parametrize("where", ["validation", "batch", "first epoch"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, where):
    whole, expected = run(tmp_path / "whole", SPEC)

    calls = 0

    def interrupted(head):
        nonlocal calls
        calls += 1
        if where == "validation" and calls == 3:
            raise KeyboardInterrupt
        return validation(videos(seed=1))(head)

    class Interrupted(Ram):
        def batches(self, *args, **kwargs):
            for number, batch in enumerate(super().batches(*args, **kwargs)):
                if number == 2 and calls == {"batch": 2, "first epoch": 0}.get(where):
                    raise KeyboardInterrupt
                yield batch

    data = Interrupted(videos().everything["embedding"], videos().everything.labels)
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run(folder, SPEC, data=data, validate=interrupted)
    torch.rand(7)  # what the caller draws in between is nobody's business
    resumed, fitted = run(folder, SPEC, head=new_head(seed=5) if where != "first epoch" else None)

    assert (fitted.epoch, fitted.step, fitted.scores) == (expected.epoch, expected.step, expected.scores)
    assert without_seconds(fitted.history) == without_seconds(expected.history)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


def test_a_run_is_a_function_of_its_seed(tmp_path):
    torch.manual_seed(1)
    one, _ = run(tmp_path / "one", SPEC)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same, _ = run(tmp_path / "same", SPEC)
    assert torch.equal(torch.get_rng_state(), state)
    other, _ = run(tmp_path / "other", replace(SPEC, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.frames.position, other.frames.position)


def test_divergence_is_an_error_that_names_the_step(tmp_path):
    data = videos()
    data.everything["embedding"][7] = torch.nan
    with pytest.raises(DivergedError, match=r"step [1-4];.*loss nan.*lr"):
        run(tmp_path / "nan", SPEC, data=data)
    with pytest.raises(DivergedError, match="diverged at step"):
        run(tmp_path / "lr", replace(SPEC, lr=1e30, warmup_epochs=0.0, epochs=30))


class Scale(nn.Module):
    """One weight whose loss is finite and whose gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, batch, text):
        return HeadOutput(losses={"root": self.weight.square().sum().sqrt()})


def test_a_gradient_that_is_not_finite_is_an_error(tmp_path):
    with pytest.raises(DivergedError, match="gradient norm nan"):
        run(tmp_path, SPEC, head=Scale(), validate=lambda head: {"top_1": 0.0, "loss": 0.0})


def test_loss_by_hand():
    logits, labels = torch.tensor([[0.0, math.log(3)]]), torch.tensor([1])
    output = HeadOutput(logits=logits, losses={"motion": torch.tensor(2.0)})
    right, wrong = -math.log(0.75), -math.log(0.25)
    assert _loss(output, labels, 0.0).item() == pytest.approx(right + 2)
    assert _loss(output, labels, 0.2).item() == pytest.approx(0.9 * right + 0.1 * wrong + 2)
    assert _loss(HeadOutput(losses={"motion": torch.tensor(2.0)}), labels, 0.0).item() == 2


def test_gradients_are_clipped(tmp_path):
    head = new_head()
    _, fitted = run(tmp_path, replace(SPEC, epochs=1, clip_norm=1e-3), head=head)
    norm = torch.stack([p.grad.norm() for p in head.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert fitted.history[0]["gradient_norm"] > 1e-2  # before clipping


def test_bf16_trains(tmp_path):
    head, fitted = run(tmp_path, replace(SPEC, epochs=6, precision="bf16"))
    assert fitted.scores["top_1"] > 0.8
    assert all(parameter.dtype == torch.float32 for parameter in head.parameters())


def test_a_damaged_state_is_an_error(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        run(tmp_path, SPEC)
