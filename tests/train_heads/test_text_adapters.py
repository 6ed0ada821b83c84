"""Adapted sentences: what is kept of the frozen part is exact, and what is trained is not kept."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from coldframe.extract.towers import Tower, load_tower
from coldframe.train_heads import text_adapters
from coldframe.train_heads.text_adapters import AdaptedSentences, KeptStreams, TextInsert

SENTENCES = ("a video of a red disc", "a square")


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower("coldframe-tiny", "random", device="cpu")


@pytest.fixture
def build(tower):
    def built(n=1, both=False, init="original", **options):
        torch.manual_seed(0)
        inserts = nn.ModuleList(TextInsert(tower.shape.text_width, 8, both, init) for _ in range(n))
        return AdaptedSentences(tower.tokenize(SENTENCES), tower, inserts, **options)

    return built


@pytest.mark.parametrize(("n", "both"), [(1, False), (1, True), (2, False), (2, True)])
@torch.no_grad()
def test_untrained_they_are_the_towers(build, tower, n, both):
    frozen = tower.encode_text(SENTENCES)
    torch.testing.assert_close(build(n, both, init="identity")(), frozen, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(build(n, both)(), frozen, atol=1e-3)


@pytest.mark.parametrize(("n", "both", "kept_tokens"), [(1, False, 1), (1, True, 8), (2, False, 8)])
def test_what_is_kept_gives_what_a_whole_pass_gives(build, tower, n, both, kept_tokens):
    """Values and gradients, though the ends alone are kept where one block is adapted, behind its attention."""
    sentences, ids = build(n, both), tower.tokenize(SENTENCES)
    assert sentences.constant.shape[1] == kept_tokens
    whole = tower.text.project(tower.text.resume(tower.text.embed(ids), inserts=sentences.inserts), ids.argmax(dim=-1))
    torch.testing.assert_close(sentences(), whole, atol=1e-5, rtol=1e-5)
    target = torch.linspace(-1, 1, whole.numel()).view_as(whole)
    ours = torch.autograd.grad((sentences() * target).sum(), list(sentences.parameters()))
    theirs = torch.autograd.grad((whole * target).sum(), list(sentences.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "both"), [(1, False), (1, True), (2, False), (2, True)])
@torch.no_grad()
def test_other_sentences_are_read_at_some_places(build, tower, n, both):
    sentences, ids, places = (
        build(n, both),
        tower.tokenize(["a blue disc", "a disc", "blue"]),
        torch.tensor([[1, 3]] * 3),
    )
    whole = tower.text.resume(tower.text.embed(ids), inserts=sentences.inserts)
    for _ in range(2):
        torch.testing.assert_close(sentences.read(ids, places), whole[:, [1, 3]], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_gradients_they_are_computed_once_until_a_parameter_changes(build, monkeypatch):
    sentences, calls = build(), []
    project = sentences.tower.project
    monkeypatch.setattr(sentences.tower, "project", lambda *args: calls.append(1) or project(*args))
    before = sentences()
    assert torch.equal(sentences(), before)
    assert len(calls) == 1
    sentences.inserts[0].pre_mlp.up.bias.add_(1)
    assert not torch.allclose(sentences(), before)
    assert len(calls) == 2


@torch.no_grad()
def test_a_share_of_the_frozen_embedding(build, tower):
    adapted, frozen = normalize(build()(), dim=-1), normalize(tower.encode_text(SENTENCES), dim=-1)
    blended = build(share=[1.0, 0.25])()
    torch.testing.assert_close(blended[0], adapted[0])
    torch.testing.assert_close(blended[1], 0.25 * adapted[1] + 0.75 * frozen[1], atol=1e-5, rtol=1e-5)
    assert (blended[1] - adapted[1]).abs().max() > 1e-3


def test_nothing_frozen_is_remembered(build):
    assert set(build().state_dict()) == {name for name, _ in build().named_parameters()}


def read(tower):
    return lambda ids: tower.text.resume(tower.text.embed(ids), to_layer=1)


def test_a_sentence_that_comes_again_is_not_read_again(tower):
    """And its bits do not depend on what came with it, so that a resumed run ends as one that was not interrupted."""
    ids, calls = tower.tokenize([*SENTENCES, SENTENCES[0]]), []
    streams = KeptStreams(lambda row: calls.append(1) or read(tower)(row))
    first, again = streams(ids), streams(ids[[1, 0]])
    assert len(calls) == 2
    assert torch.equal(again, first[[1, 2]])
    assert torch.equal(KeptStreams(read(tower))(ids[:1]), first[:1])
    torch.testing.assert_close(first, read(tower)(ids), atol=1e-5, rtol=1e-5)


def test_no_more_is_kept_than_there_is_room_for(tower, monkeypatch):
    ids = tower.tokenize([f"{n} squares" for n in ("two", "three", "four", "five")])
    streams = KeptStreams(read(tower))
    monkeypatch.setattr(text_adapters, "KEPT_BYTES", 2 * streams(ids[:1]).nbytes)
    everything = streams(ids)
    assert [list(row) for row in streams._streams] == ids[2:].tolist()
    assert torch.equal(streams(ids), everything)


def test_what_was_read_without_gradients_can_be_trained_on(build, tower):
    sentences, ids, places = build(), tower.tokenize(SENTENCES), torch.tensor([[1], [1]])
    with torch.inference_mode():
        sentences.read(ids, places)
    sentences.read(ids, places).sum().backward()
    assert all(parameter.grad is not None for parameter in sentences.parameters())
