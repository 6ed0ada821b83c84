import pytest
import torch

from coldframe.extract.specs import SpecMismatch
from coldframe.train_heads.layouts import back_to_theirs, renamed, stretched

NAMES = {"their.a": "a", "their.b": "b"}


def test_renamed_and_back() -> None:
    theirs = {"their.b": torch.ones(2, dtype=torch.float16), "their.a": torch.zeros(1)}
    ours = renamed(theirs, NAMES, "a toy")
    assert set(ours) == {"a", "b"}
    assert ours["b"].dtype == torch.float32
    back = back_to_theirs(ours, NAMES)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name].float()) for name in theirs)


def test_missing_and_unknown_names_are_told_but_not_all_of_them() -> None:
    with pytest.raises(SpecMismatch, match=r"not the weights of a toy: missing their\.b; unknown their\.c"):
        renamed({"their.a": torch.zeros(1), "their.c": torch.zeros(1)}, NAMES, "a toy")
    with pytest.raises(SpecMismatch, match="unknown 0, 1, 2, 3, 4, 5 …"):
        renamed({str(i): torch.zeros(1) for i in range(9)}, {}, "nothing")


def test_a_table_is_stretched_between_the_centres_of_its_segments() -> None:
    table = torch.tensor([[0.0, 3.0], [2.0, 1.0]])
    torch.testing.assert_close(stretched(table, 4), torch.tensor([[0.0, 3.0], [0.5, 2.5], [1.5, 1.5], [2.0, 1.0]]))
    assert stretched(table, 2) is table
    torch.testing.assert_close(stretched(table, 1), torch.tensor([[1.0, 2.0]]))
