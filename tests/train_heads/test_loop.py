"""The training loop: what it learns, what it keeps, and that interruption changes nothing."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.extract.batches import FeatureBatch
from coldframe.train_heads.checkpoint import CheckpointError
from coldframe.train_heads.heads.temporal_transformer import TemporalTransformer
from coldframe.train_heads.loop import Data, fit
from coldframe.train_heads.run import DivergedError, Run, loss_of
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


@torch.no_grad()
def validation(head, data):
    batch = data.everything
    logits = head(batch, None).logits
    loss = nn.functional.cross_entropy(logits, batch.labels)
    return {"top_1": float((logits.argmax(-1) == batch.labels).float().mean()), "loss": float(loss)}


class Scripted:
    """A tally that says what it is told to."""

    def __init__(self, scores):
        self.script, self.n, self.hits, self.loss = iter(scores), 0, 0, 0.0

    def scores(self):
        return dict(zip(("top_1", "loss"), next(self.script), strict=True))


def new_run(folder, spec, head=None, **options):
    folder.mkdir(exist_ok=True)
    return Run(head or new_head(), spec, folder, math.ceil(60 / spec.batch_size), **options)


def run(folder, spec, head=None, data=None, val=None, scores=None, monkeypatch=None):
    """Train one head alone."""
    made = new_run(folder, spec, head)
    if scores is not None:
        script = Scripted(scores)
        monkeypatch.setattr("coldframe.train_heads.run.Tally", lambda: script)
    fit([made], Data(data or videos(), val or videos(seed=1), spec.batch_size, spec.seed))
    if made.error:
        raise made.error
    return made


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
    made = run(tmp_path, replace(SPEC, epochs=10))
    assert made.best.scores["top_1"] > 0.9
    assert not made.head.training
    assert validation(made.head, videos(seed=1)) == pytest.approx(made.best.scores)
    assert made.history[-1]["loss"] < made.history[0]["loss"] / 2
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == made.history
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
def test_the_best_epoch_is_kept(tmp_path, monkeypatch, scores, best):
    seen, end_epoch = [], Run.end_epoch

    def watched(self):
        seen.append({name: tensor.clone() for name, tensor in self.head.state_dict().items()})
        end_epoch(self)

    monkeypatch.setattr(Run, "end_epoch", watched)
    made = run(tmp_path, replace(SPEC, epochs=3), scores=scores, monkeypatch=monkeypatch)
    assert (made.best.epoch, made.best.step) == (best, best * 4)
    assert all(torch.equal(tensor, seen[best - 1][name]) for name, tensor in made.head.state_dict().items())


def test_patience_stops_early(tmp_path, monkeypatch):
    spec = replace(SPEC, epochs=9, patience=2)
    made = run(tmp_path, spec, scores=[(0.1, 1.0)] * 9, monkeypatch=monkeypatch)
    assert len(made.history) == 3


class Interrupted(Ram):
    """Ctrl-C at the third batch of a pass, counted from 1."""

    def __init__(self, data, when):
        super().__init__(data.everything["embedding"], data.everything.labels)
        self.when, self.passes = when, 0

    def batches(self, *args, **kwargs):
        self.passes += 1
        for number, batch in enumerate(super().batches(*args, **kwargs)):
            if number == 2 and self.passes == self.when:
                raise KeyboardInterrupt
            yield batch


def assert_same(one, other):
    """Two runs that ended with the same bits."""
    assert (one.best.epoch, one.best.step, one.best.scores) == (other.best.epoch, other.best.step, other.best.scores)
    assert without_seconds(one.history) == without_seconds(other.history)
    for name, tensor in other.head.state_dict().items():
        assert torch.equal(one.head.state_dict()[name], tensor)


def without_seconds(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


@pytest.mark.parametrize("where", ["validation", "batch", "first epoch"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, where):
    whole = run(tmp_path / "whole", SPEC)
    folder = tmp_path / "cut"
    data = Interrupted(videos(), {"batch": 3, "first epoch": 1}.get(where))
    val = Interrupted(videos(seed=1), {"validation": 3}.get(where))
    with pytest.raises(KeyboardInterrupt):
        run(folder, SPEC, data=data, val=val)
    torch.rand(7)  # what the caller draws in between is nobody's business
    resumed = run(folder, SPEC, head=new_head(seed=5) if where != "first epoch" else None)
    assert_same(resumed, whole)


def test_a_run_is_a_function_of_its_seed(tmp_path):
    torch.manual_seed(1)
    one = run(tmp_path / "one", SPEC).head
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same = run(tmp_path / "same", SPEC).head
    assert torch.equal(torch.get_rng_state(), state)
    other = run(tmp_path / "other", replace(SPEC, seed=1)).head
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.frames.position, other.frames.position)


def test_divergence_is_an_error_that_names_the_step(tmp_path):
    data = videos()
    data.everything["embedding"][7] = torch.nan
    with pytest.raises(DivergedError, match=r"step [1-4];.*loss nan.*lr"):
        run(tmp_path / "nan", SPEC, data=data)
    with pytest.raises(DivergedError, match="diverged at step"):
        run(tmp_path / "lr", replace(SPEC, lr=1e30, warmup_epochs=0.0, epochs=30))


def test_a_last_step_that_went_too_far_is_seen_by_the_validation(tmp_path, monkeypatch):
    with pytest.raises(DivergedError, match="validation after step 8; found loss nan"):
        run(tmp_path, SPEC, scores=[(0.5, 1.0), (0.9, math.nan), (0.7, 0.1)], monkeypatch=monkeypatch)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1


class Scale(nn.Module):
    """One weight whose loss is finite and whose gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, batch, text):
        return HeadOutput(losses={"root": self.weight.square().sum().sqrt()})


def test_a_gradient_that_is_not_finite_is_an_error(tmp_path):
    with pytest.raises(DivergedError, match="gradient norm nan"):
        run(tmp_path, SPEC, head=Scale())


def test_loss_by_hand():
    logits, labels = torch.tensor([[0.0, math.log(3)]]), torch.tensor([1])
    output = HeadOutput(logits=logits, losses={"motion": torch.tensor(2.0)})
    right, wrong = -math.log(0.75), -math.log(0.25)
    assert loss_of(output, labels, 0.0).item() == pytest.approx(right + 2)
    assert loss_of(output, labels, 0.2).item() == pytest.approx(0.9 * right + 0.1 * wrong + 2)
    assert loss_of(HeadOutput(losses={"motion": torch.tensor(2.0)}), labels, 0.0).item() == 2
    of_episodes = HeadOutput(logits=torch.stack([logits, -logits]))  # [n, Q, W]
    assert loss_of(of_episodes, torch.tensor([[1], [1]]), 0.0).item() == pytest.approx((right + wrong) / 2)


def test_gradients_are_clipped(tmp_path):
    made, norms = new_run(tmp_path, replace(SPEC, epochs=1, clip_norm=1e-3)), []

    def watch(*_):
        norms.append(torch.stack([p.grad.norm() for p in made.head.parameters()]).norm().item())

    made.optimiser.register_step_pre_hook(watch)
    fit([made], Data(videos(), videos(seed=1), SPEC.batch_size))
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)
    assert made.history[0]["gradient_norm"] > 1e-2  # before clipping
    assert all(parameter.grad is None for parameter in made.head.parameters())  # no memory while others work


def test_bf16_trains(tmp_path):
    made = run(tmp_path, replace(SPEC, epochs=6, precision="bf16"))
    assert made.best.scores["top_1"] > 0.8
    assert all(parameter.dtype == torch.float32 for parameter in made.head.parameters())


def test_a_damaged_state_is_an_error(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        run(tmp_path, SPEC)


# ---- side by side


class Probe(nn.Module):
    """A head of another kind, with dropout of its own."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(4)
            self.map = nn.Linear(16, 3)

    def forward(self, batch, text):
        kept = nn.functional.dropout(batch["embedding"].mean(1), 0.4, self.training)
        noise = torch.randn(()).abs() if self.training else torch.zeros(())
        return HeadOutput(self.map(kept), losses={"noise": noise * self.map.bias.square().sum()})


JOBS = (  # as different as runs over the same batches can be
    (lambda: new_head(), SPEC),
    (lambda: new_head(seed=3, dropout=0.1), replace(SPEC, epochs=6, lr=1e-2, label_smoothing=0.1)),
    (Probe, replace(SPEC, epochs=3, weight_decay=0.0)),
    (Probe, replace(SPEC, epochs=9, patience=1, lr=0.3, warmup_epochs=0.0)),
)


def together(folder, jobs=JOBS, data=None, val=None, ended=lambda run: None):
    folder.mkdir(exist_ok=True)
    runs = [new_run(folder / str(number), spec, make()) for number, (make, spec) in enumerate(jobs)]
    fit(runs, Data(data or videos(), val or videos(seed=1), SPEC.batch_size, SPEC.seed), ended=ended)
    return runs


def test_runs_side_by_side_end_with_the_bits_of_runs_alone(tmp_path):
    runs, order = [], []
    runs = together(tmp_path / "sweep", ended=lambda run: order.append(run.spec))
    for number, (made, (make, spec)) in enumerate(zip(runs, JOBS, strict=True)):
        assert_same(made, run(tmp_path / f"alone{number}", spec, head=make()))
        assert not made.head.training
    assert [len(made.history) for made in runs][:3] == [4, 6, 3]
    assert len(runs[3].history) < 9
    assert len(order) == 4
    assert order.index(JOBS[2][1]) < order.index(JOBS[0][1]) < order.index(JOBS[1][1])


@pytest.mark.parametrize("when", [1, 2, 5])
def test_runs_side_by_side_can_be_interrupted(tmp_path, when):
    whole = together(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        together(tmp_path / "cut", data=Interrupted(videos(), when))
    for left, right in zip(together(tmp_path / "cut"), whole, strict=True):
        assert_same(left, right)


def test_runs_that_were_stopped_at_different_epochs_end_as_they_would_have(tmp_path):
    whole = together(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    for number, when in ((0, 2), (1, 5), (2, 3)):
        make, spec = JOBS[number]
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut" / str(number), spec, head=make(), data=Interrupted(videos(), when))
    for left, right in zip(together(tmp_path / "cut"), whole, strict=True):
        assert_same(left, right)


def test_a_run_that_diverges_is_dropped_and_the_others_go_on(tmp_path):
    bad = (Probe, replace(SPEC, lr=1e30, warmup_epochs=0.0))
    ended = []
    runs = together(tmp_path / "sweep", (JOBS[0], bad, JOBS[2]), ended=ended.append)
    assert ended[0] is runs[1]
    assert isinstance(runs[1].error, DivergedError)
    assert_same(runs[0], run(tmp_path / "alone0", JOBS[0][1], head=JOBS[0][0]()))
    assert_same(runs[2], run(tmp_path / "alone2", JOBS[2][1], head=Probe()))
    (only,) = together(tmp_path / "bad", (bad,))
    assert only.error


def test_every_batch_is_read_once(tmp_path):
    class Counted(Ram):
        n = 0

        def batches(self, *args, **kwargs):
            for batch in super().batches(*args, **kwargs):
                Counted.n += 1
                yield batch

    together(tmp_path / "sweep", JOBS[:3], data=Counted(videos().everything["embedding"], videos().everything.labels))
    assert Counted.n == 6 * 4  # the epochs of the longest


def test_a_run_sees_the_features_that_it_asked_for(tmp_path):
    made = new_run(tmp_path, SPEC, features=("tokens.2",))
    fit_data = Data(videos(), videos(seed=1), SPEC.batch_size)
    with pytest.raises(UnknownName, match=r"tokens\.2"):
        fit([made], fit_data)
