"""Class names become words, sentences and unit vectors; the cache returns what was computed or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.extract.text import TEMPLATES, TextFeatures, encode_classes, readable
from coldframe.extract.towers import Tower, load_tower

NAMES = ("ApplyEyeMakeup", "brush_hair", "YoYo")


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower("coldframe-tiny", "random", device="cpu", seed=3)


@pytest.fixture
def counted(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call encoded."""
    calls: list[int] = []
    encode = tower.encode_text

    def count(texts: list[str]) -> torch.Tensor:
        calls.append(len(texts))
        return encode(texts)

    monkeypatch.setattr(tower, "encode_text", count)
    return calls


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("YoYo", "yo yo"),
        ("Archery", "archery"),
        ("WatchTVShow", "watch TV show"),
        ("TV", "TV"),
        ("brush_hair", "brush hair"),
        ("smile", "smile"),
        ("Clean_and_Jerk", "clean and jerk"),
        ("push-up", "push-up"),
        ("passing American football (in game)", "passing American football (in game)"),
        ("massaging person's head", "massaging person's head"),
        ("Pushing [something] from left to right", "Pushing [something] from left to right"),
        ("  two   spaces ", "two spaces"),
        ("_", ""),
    ],
)
def test_class_names_become_words(name: str, words: str) -> None:
    assert readable(name) == words


def test_an_embedding_is_the_normalised_mean_of_normalised_sentences(tower: Tower) -> None:
    templates = ("a video of {}.", "{} and {}")
    text = encode_classes(tower, NAMES, templates)
    for i, words in enumerate(("apply eye makeup", "brush hair", "yo yo")):
        rows = tower.encode_text([f"a video of {words}.", f"{words} and {words}"])
        mean = (rows[0] / rows[0].norm() + rows[1] / rows[1].norm()) / 2
        torch.testing.assert_close(text.embedding[i], mean / mean.norm())
    assert text.class_names == NAMES
    assert text.templates == templates
    assert text.logit_scale == tower.logit_scale
    assert text.tower == tower.spec.weights_sha256


def test_one_plain_template_is_the_text_itself(tower: Tower) -> None:
    found = encode_classes(tower, ["smile", "wave"], "plain").embedding
    torch.testing.assert_close(found, F.normalize(tower.encode_text(["smile", "wave"]), dim=-1))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_named_set_of_templates_works(tower: Tower, name: str) -> None:
    text = encode_classes(tower, NAMES, name)
    assert text.templates == TEMPLATES[name]
    assert len(set(text.templates)) == len(text.templates)
    torch.testing.assert_close(text.embedding.norm(dim=-1), torch.ones(3))


def test_some_classes_can_be_chosen(tower: Tower) -> None:
    text = encode_classes(tower, NAMES, "plain")
    some = text.select(torch.tensor([2, 0])).to("cpu")
    assert isinstance(some, TextFeatures)
    assert some.class_names == ("YoYo", "ApplyEyeMakeup")
    assert torch.equal(some.embedding, text.embedding[[2, 0]])
    assert text.class_names == NAMES


def test_what_cannot_be_a_sentence_is_refused(tower: Tower) -> None:
    with pytest.raises(UnknownName, match=r"no set of templates is named 'vidoe'\. Did you mean video"):
        encode_classes(tower, NAMES, "vidoe")
    with pytest.raises(ConfigError, match="where the class name goes"):
        encode_classes(tower, NAMES, ["a video"])
    with pytest.raises(ConfigError, match="where the class name goes"):
        encode_classes(tower, NAMES, [])
    for names in ([], ["smile", "_"]):
        with pytest.raises(ConfigError, match="every class needs a name"):
            encode_classes(tower, names)
    with pytest.raises(ConfigError, match="exceed the 77 tokens"):
        encode_classes(tower, ["very " * 80 + "long"])


# ---- the cache


def test_the_cache_returns_what_was_computed(tower: Tower, counted: list[int], tmp_path: Path) -> None:
    first = encode_classes(tower, NAMES, "photo", tmp_path / "text")
    again = encode_classes(tower, NAMES, "photo", str(tmp_path / "text"))
    assert counted == [3]
    assert torch.equal(first.embedding, again.embedding)
    assert (first.class_names, first.logit_scale) == (again.class_names, again.logit_scale)
    assert [path.suffix for path in (tmp_path / "text").iterdir()] == [".safetensors"]


def test_whatever_can_change_a_text_changes_the_file(tower: Tower, counted: list[int], tmp_path: Path) -> None:
    encode_classes(tower, NAMES, "photo", tmp_path)
    encode_classes(tower, NAMES[::-1], "photo", tmp_path)
    encode_classes(tower, NAMES, "plain", tmp_path)
    other = load_tower("coldframe-tiny", "random", device="cpu", seed=4)
    assert not torch.equal(
        encode_classes(other, NAMES, "photo", tmp_path).embedding,
        encode_classes(tower, NAMES, "photo", tmp_path).embedding,
    )
    assert counted == [3, 3, 3]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_cache_file_is_made_anew(tower: Tower, counted: list[int], tmp_path: Path) -> None:
    wanted = encode_classes(tower, NAMES, "photo", tmp_path).embedding
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-2] ^= 0x01
    for damage in (b"", b"text", whole[: len(whole) // 2], whole[:-4], bytes(flipped)):
        path.write_bytes(damage)
        for _ in range(2):  # made anew, then read
            assert torch.equal(encode_classes(tower, NAMES, "photo", tmp_path).embedding, wanted)
    assert counted == [3] * 6
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_other_classes_under_the_same_name_is_not_believed(
    tower: Tower, counted: list[int], tmp_path: Path
) -> None:
    encode_classes(tower, NAMES, "photo", tmp_path)
    (path,) = tmp_path.iterdir()
    wrong = encode_classes(tower, ["smile", "wave", "jump"], "photo", tmp_path / "other")
    (other,) = (tmp_path / "other").iterdir()
    other.replace(path)
    right = encode_classes(tower, NAMES, "photo", tmp_path)
    assert not torch.equal(right.embedding, wrong.embedding)
    assert counted == [3, 3, 3]


def test_a_cache_that_cannot_be_written_stops_nothing(tower: Tower, counted: list[int], tmp_path: Path) -> None:
    wanted = encode_classes(tower, NAMES, "photo", tmp_path / "text").embedding
    (file,) = (tmp_path / "text").iterdir()
    file.unlink()
    file.mkdir()  # EISDIR
    (tmp_path / "file").touch()  # ENOTDIR
    for folder in (tmp_path / "text", tmp_path / "file"):
        assert torch.equal(encode_classes(tower, NAMES, "photo", folder).embedding, wanted)
    assert list((tmp_path / "text").iterdir()) == [file]
    assert counted == [3, 3, 3]
