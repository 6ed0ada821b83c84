"""Words of class sentences, masked and found again with the help of the video: M2-CLIP's multi-task decoder.

Source: M2-CLIP, Wang et al. 2024, arXiv:2401.11649; the classifier of words is BERT's, Devlin et al. 2019,
    arXiv:1810.04805.
Differs: the vocabulary is made of the training classes, sorted, where the published one is a file. The loss of a batch in
    which nothing is masked is zero, not NaN. A tower whose joint width is not its text width has a trained map between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from ..data_manifests.errors import ConfigError
from ..extract.towers import Tower
from .text_adapters import TextInsert

MASK = "mask"  # the word that stands for a masked one
IGNORED = -100  # the label of a token that nobody asks about


class MaskedSentences(nn.Module):
    """The C training sentences as tokens, of which each draw hides some words.

    A word may be several tokens; hidden, it is the one token of the word "mask", and that token's label is the word.
    """

    ids: Tensor
    word: Tensor
    label: Tensor
    is_first: Tensor
    n_masked: Tensor

    def __init__(self, sentences: Sequence[str], tower: Tower, share: float) -> None:
        """Cut the sentences, lower-cased, into words at white space; `share` of each one's words, at least one, is hidden.

        Raises:
            ConfigError: the tower's tokenizer has no one token for "mask".
        """
        super().__init__()
        rows = [words_of(sentence) for sentence in sentences]
        place = {word: i for i, word in enumerate(vocabulary(sentences))}
        (start, *mask, end), *cut = _cut([MASK, *place], tower)
        tokens_of = dict(zip(place, (inside[1:-1] for inside in cut), strict=True))
        if len(mask) != 1:
            raise ConfigError(
                f'the tokenizer of {tower.spec.model} cuts "{MASK}" in pieces', fix="Set masked_share=0: hide no words."
            )
        (self.mask,) = mask
        length = 2 + max(sum(len(tokens_of[word]) for word in row) for row in rows)
        tables = {name: torch.full((len(rows), length), -1) for name in ("ids", "word", "label", "is_first")}
        tables["ids"].zero_()
        for i, row in enumerate(rows):
            tables["ids"][i, 0], position = start, 1
            for j, word in enumerate(row):
                inside = slice(position, position := position + len(tokens_of[word]))
                tables["ids"][i, inside] = torch.tensor(tokens_of[word])
                tables["word"][i, inside], tables["label"][i, inside] = j, place[word]
                tables["is_first"][i, inside.start] = 1
            tables["ids"][i, position] = end
        tables["is_first"] = tables["is_first"] > 0
        self.n_most = max(max(1, round(share * len(row))) for row in rows)  # hidden words of a sentence
        tables["n_masked"] = torch.tensor([max(1, round(share * len(row))) for row in rows])
        for name, table in tables.items():
            self.register_buffer(name, table.to(tower.device), persistent=False)

    def forward(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Hide words of the sentences of classes [B]: token ids [B, S], and the row of the vocabulary at each, or IGNORED.

        In training the words are drawn from torch's generator; in evaluation they are the last ones.
        """
        word, is_first = self.word[classes], self.is_first[classes]  # [B, S]
        is_hidden = self._chosen(classes).gather(1, word.clamp_min(0)) & (word >= 0)
        ids = self.ids[classes].masked_fill(is_hidden, self.mask)
        label = self.label[classes].masked_fill(~is_hidden, IGNORED)
        is_kept = ~is_hidden | is_first  # of the tokens of a hidden word one stays, and the rest of the text moves up
        order = (~is_kept).int().argsort(dim=1, stable=True)
        is_beyond = ~is_kept.gather(1, order)
        ids = ids.gather(1, order).masked_fill(is_beyond, 0)
        label = label.gather(1, order).masked_fill(is_beyond, IGNORED)
        return ids, label

    def _chosen(self, classes: Tensor) -> Tensor:
        """Which words to hide, [B, S] by their place in the sentence."""
        word = self.word[classes]
        places = torch.arange(word.shape[1], device=word.device)
        drawn = torch.rand(word.shape, device=word.device) if self.training else places.expand_as(word) + 1.0
        drawn = drawn.masked_fill(places > word.max(dim=1, keepdim=True).values, -1)  # no such word
        rank = drawn.argsort(dim=1, descending=True).argsort(dim=1)
        return rank < rearrange(self.n_masked[classes], "b -> b 1")


class WordDecoder(nn.Module):
    """The fusion block, in which a sentence attends to the frames of a video, and a classifier of words.

    The block has the frozen weights of the text tower's last one, and adapters of its own. In it no token reads another
    token of its sentence, so that tokens nobody asks about may be left out.
    """

    def __init__(self, tower: Tower, insert: TextInsert, n_words: int) -> None:
        super().__init__()
        width, joint = tower.shape.text_width, tower.shape.embed_dim
        self.tower, self.insert = tower.text, insert
        self.bridge = nn.Identity() if width == joint else nn.Linear(joint, width)
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder = nn.Linear(width, n_words)
        for linear in (self.dense, self.decoder):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, stream: Tensor, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Sentences behind the last text block [B, S, D_t], frame embeddings [B, T, E] -> words [B, S, V], as logits."""
        block = self.tower.block(self.tower.layers)
        x = self.insert.before_attention(stream, block, None)
        x = block.finish(x, block.attend(x, self.bridge(frames), mask), self.insert)
        x = self.tower.module.ln_final(x)
        return self.decoder(self.layer_norm(gelu(self.dense(x))))


def masked_word_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of words [B, S, V] where labels [B, S] are not IGNORED; zero where all are."""
    total = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp_min(1)


def masked_places(labels: Tensor, n_most: int) -> Tensor:
    """Where labels [B, S] are not IGNORED, and behind those places others, up to `n_most`: [B, n_most]."""
    return (labels == IGNORED).int().argsort(dim=1, stable=True)[:, :n_most]


def words_of(sentence: str) -> list[str]:
    """Its words, lower-cased, as white space parts them."""
    return sentence.lower().split()


def vocabulary(sentences: Sequence[str]) -> tuple[str, ...]:
    """All words of some sentences, sorted."""
    return tuple(sorted({word for sentence in sentences for word in words_of(sentence)}))


def _cut(words: Sequence[str], tower: Tower) -> list[list[int]]:
    """The token ids of each word, between those that begin and end a text."""
    ids = tower.tokenize(words)
    return [row[: end + 1] for row, end in zip(ids.tolist(), ids.argmax(dim=-1).tolist(), strict=True)]
