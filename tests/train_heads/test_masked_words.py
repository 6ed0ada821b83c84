"""Masked sentences against the tokenizer's own, and the block in which they see a video."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.towers import Tower, load_tower
from coldframe.train_heads.masked_words import (
    IGNORED,
    MaskedSentences,
    WordDecoder,
    masked_places,
    masked_word_loss,
    vocabulary,
    words_of,
)
from coldframe.train_heads.text_adapters import TextInsert

SENTENCES = (
    "A video of jump",
    "A video of Pretending to unscrew something, very slowly (really)",  # words of many tokens
    "A video of playing drums or a bass guitar",
)


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower("coldframe-tiny", "random", device="cpu")


@pytest.fixture(scope="module")
def masked(tower: Tower) -> MaskedSentences:
    return MaskedSentences(SENTENCES, tower, 0.2)


def draws(masked, n=40):
    """(class, ids, labels) of many sentences."""
    classes = torch.arange(len(SENTENCES)).repeat(n)
    torch.manual_seed(0)
    ids, labels = masked.train()(classes)
    return list(zip(classes.tolist(), ids, labels, strict=True))


def hidden_words(tower, labels):
    return [vocabulary(SENTENCES)[label] for label in labels[labels != IGNORED].tolist()]


def test_a_masked_sentence_is_what_the_tokenizer_makes_of_its_words(tower, masked):
    """Each draw is the sentence with as many words replaced as it has labels, in order."""
    for i, ids, labels in draws(masked):
        words, left = words_of(SENTENCES[i]), hidden_words(tower, labels)
        assert len(left) == max(1, round(0.2 * len(words)))
        candidates = {
            " ".join("mask" if j in chosen else word for j, word in enumerate(words)) for chosen in places(words, left)
        }
        wanted = tower.tokenize(sorted(candidates))[:, : len(ids)]
        assert any(torch.equal(ids, row) for row in wanted)


def places(words, hidden):
    """All ways to find some words, in order, in a sentence."""
    if not hidden:
        return [()]
    return [
        (j, *(j + 1 + k for k in rest))
        for j, word in enumerate(words)
        if word == hidden[0]
        for rest in places(words[j + 1 :], hidden[1:])
    ]


def test_the_label_of_a_mask_is_the_word_behind_it(tower, masked):
    mask_id = int(tower.tokenize(["mask"])[0, 1])
    for _, ids, labels in draws(masked):
        assert torch.equal(ids == mask_id, labels != IGNORED)


def test_every_word_is_hidden_now_and_then(tower, masked):
    seen = {word for _, _, labels in draws(masked, 200) for word in hidden_words(tower, labels)}
    assert seen == set(vocabulary(SENTENCES))


def test_in_evaluation_the_last_words_are_hidden(tower, masked):
    ids, labels = masked.eval()(torch.tensor([2, 0]))
    assert hidden_words(tower, labels[0]) == ["bass", "guitar"]
    assert hidden_words(tower, labels[1]) == ["jump"]
    for row, text in zip(ids, ("a video of playing drums or a mask mask", "a video of mask"), strict=True):
        assert torch.equal(row, tower.tokenize([text])[0, : len(row)])


def test_places_of_masks_come_first(masked):
    _, labels = masked.train()(torch.arange(3).repeat(5))
    places = masked_places(labels, masked.n_most)
    assert places.shape == (15, 2)
    for row, found in zip(labels, places, strict=True):
        n = int((row != IGNORED).sum())
        assert found[:n].tolist() == (row != IGNORED).nonzero()[:, 0].tolist()


def test_the_seed_draws_the_words(masked):
    def drawn(seed):
        torch.manual_seed(seed)
        return masked.train()(torch.arange(3).repeat(5))[0]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_a_share_hides_as_many_words_as_it_says(tower):
    _, labels = MaskedSentences(SENTENCES, tower, 1.0).train()(torch.tensor([0, 1, 2]))
    assert (labels != IGNORED).sum(dim=1).tolist() == [len(words_of(sentence)) for sentence in SENTENCES]


def test_the_vocabulary_is_sorted_and_lower_case():
    assert vocabulary(["A video of Jump", "a video of run"]) == ("a", "jump", "of", "run", "video")


def test_a_tokenizer_that_cuts_the_word_is_refused(tower, monkeypatch):
    tokenize = tower.tokenize
    monkeypatch.setattr(tower, "tokenize", lambda texts: tokenize([text.replace("mask", "m ask") for text in texts]))
    with pytest.raises(ConfigError, match="masked_share=0"):
        MaskedSentences(SENTENCES, tower, 0.2)


def test_the_loss_is_the_mean_over_masked_words():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[IGNORED, 1, IGNORED], [4, IGNORED, 0]])
    asked = torch.stack([logits[0, 1], logits[1, 0], logits[1, 2]])
    torch.testing.assert_close(masked_word_loss(logits, labels), cross_entropy(asked, torch.tensor([1, 4, 0])))


def test_nothing_masked_is_no_loss():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = masked_word_loss(logits, torch.full((2, 3), IGNORED))
    assert loss == 0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@torch.no_grad()
def test_words_depend_on_the_real_frames(tower):
    """Also where the joint width is not that of the texts, and a trained map stands between them."""
    torch.manual_seed(0)
    decoder = WordDecoder(tower, TextInsert(tower.shape.text_width, 8, both=True, init="original"), 7)
    stream, frames = torch.randn(2, 6, tower.shape.text_width), torch.randn(2, 4, tower.shape.embed_dim)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    logits = decoder(stream, frames, mask)
    assert logits.shape == (2, 6, 7)
    noisy = frames.masked_fill(~mask[..., None], 1e4)
    torch.testing.assert_close(decoder(stream, noisy, mask), logits)
    assert not torch.allclose(decoder(stream, frames + 1e-1 * torch.randn_like(frames), mask), logits, atol=1e-4)
    torch.testing.assert_close(decoder(stream[:, [4, 1]], frames, mask), logits[:, [4, 1]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoder(stream[:1], frames[:1, :2], None), logits[:1], atol=1e-5, rtol=1e-5)
