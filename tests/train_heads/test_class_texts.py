"""Class sentences in a text tower with inserts: encoded seldom, and never differently for that."""

import pytest
import torch
from torch import Tensor, nn

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.blocks import Insert
from coldframe.extract.towers import Tower, load_tower
from coldframe.train_heads.class_texts import AdaptedTexts, from_descriptions, from_templates

SENTENCES = [["a cat", "one cat that sits on a mat"], ["a dog", "the dog"], ["a b", "c"]]


class Shift(Insert):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(0.1 * torch.arange(width))

    def before_mlp(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x + self.shift


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower("coldframe-tiny", "random", device="cpu", seed=3)


@pytest.fixture
def texts(tower: Tower) -> AdaptedTexts:
    inserts = nn.ModuleList(Shift(tower.shape.text_width) for _ in range(tower.shape.text_layers))
    return AdaptedTexts(SENTENCES, tower, inserts)


def counted(texts: AdaptedTexts, monkeypatch) -> list[int]:
    """How many texts each call of `encode` was given, as it happens."""
    seen: list[int] = []
    encode = texts.encode
    monkeypatch.setattr(texts, "encode", lambda ids: [seen.append(len(ids)), encode(ids)][1])
    return seen


def test_without_inserts_it_is_the_tower(tower):
    frozen = AdaptedTexts(SENTENCES, tower, nn.ModuleList())
    wanted = tower.encode_text([text for row in SENTENCES for text in row]).unflatten(0, (3, 2))
    torch.testing.assert_close(frozen.all(), wanted, atol=1e-5, rtol=1e-5)
    assert frozen.ids.shape[-1] < tower.shape.context_length  # padding is not computed
    assert not frozen.state_dict()


def test_kept_embeddings_equal_new_ones_until_a_parameter_changes(texts, monkeypatch):
    seen = counted(texts, monkeypatch)
    with torch.no_grad():
        first = texts.all()
        assert texts.all() is first
        assert seen == [6]
        texts.inserts[0].shift.data.add_(1)
        changed = texts.all()
        assert seen == [6, 6]
        assert not torch.allclose(changed, first)
    torch.testing.assert_close(texts.all(), changed)  # with gradients it is always computed
    assert seen == [6, 6, 6]
    with torch.inference_mode():
        assert texts.all() is changed
    texts.load_state_dict({name: x.clone() for name, x in texts.state_dict().items()})
    with torch.no_grad():
        assert texts.all() is changed  # the same weights again


def test_a_batch_encodes_each_of_its_sentences_once(texts, tower, monkeypatch):
    one = AdaptedTexts([row[:1] for row in SENTENCES], tower, texts.inserts)
    seen, labels = counted(one, monkeypatch), torch.tensor([2, 0, 2, 2])
    found = one.of(labels)
    assert seen == [2]
    torch.testing.assert_close(found, one.all()[labels, 0], atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert texts.inserts[0].shift.grad is not None


def test_a_sample_draws_one_of_the_sentences_of_its_class(texts):
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(10)
    with torch.no_grad():
        found, every = texts.of(labels), texts.all()
    is_drawn = ((found[:, None] - every[labels]).abs() < 1e-4).all(dim=-1)  # [30, 2]
    assert (is_drawn.sum(dim=1) == 1).all()
    assert is_drawn.any(dim=0).all()


def test_templates_take_readable_names():
    assert from_templates(["ApplyLipstick", "a b"], ["{}", "see {} {}"]) == [
        ["apply lipstick", "see apply lipstick apply lipstick"],
        ["a b", "see a b a b"],
    ]


@pytest.mark.parametrize(
    "header", ["SNo, Class Name, description", "SNo,name,Description", "\ufeffid,class,description"]
)
def test_descriptions_are_found_by_name(tmp_path, header):
    path = tmp_path / "d.csv"
    path.write_text(f'{header}\n\n1, Pour Tea, "tea, poured"\n2,run,to run \n3,half a row\n', encoding="utf-8")
    assert from_descriptions(["run", "PourTea", "pour_tea"], path) == [["to run"], ["tea, poured"], ["tea, poured"]]
    with pytest.raises(ConfigError, match=r"2 classes have no description.*wave, half a row"):
        from_descriptions(["wave", "run", "half a row"], path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no descriptions at"),
        (b"", "an empty file"),
        (b"name,text\nrun,to run\n", "found name, text"),
        (b"name,description\nrun,one\nrun,one\nrun,two\n", "in two ways"),
        (b"\xff\xfe\x00", "not a CSV in UTF-8"),
    ],
)
def test_files_that_are_no_descriptions_are_refused(tmp_path, content, said):
    path = tmp_path / "d.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        from_descriptions(["run"], path)


def test_a_sentence_that_is_too_long_is_named(tower):
    with pytest.raises(ConfigError, match="so so so"):
        AdaptedTexts([["so " * 100]], tower, nn.ModuleList())
