"""What counts as read of a case, and that a case with something unread fails."""

from __future__ import annotations

import numpy as np
import pytest

from .cases import Case
from .dispatch import run_check
from .recording import leaves, plain, record

DATA = {
    "params": {"weight": 2.0, "sizes": [[1, 2], [3]], "nothing": None, "none_of": []},
    "note": "for the reader",
    "reference": ["whose/code.py"],
}
ALL = {"params.weight", "params.sizes.0.0", "params.sizes.0.1", "params.sizes.1.0", "params.nothing", "params.none_of"}


def unread_after(read) -> set[str]:
    """What is left of DATA, without arrays, when ``read`` has had its parameters."""
    case = Case("some_0", DATA, {})
    read(case.data["params"])
    return set(case.unread())


def test_only_leaves_that_were_read_count():
    assert unread_after(lambda params: None) == ALL
    assert unread_after(lambda params: params["weight"]) == ALL - {"params.weight"}
    assert unread_after(lambda params: params["sizes"]) == ALL
    assert unread_after(lambda params: params["sizes"][0][1]) == ALL - {"params.sizes.0.1"}
    assert unread_after(lambda params: params["sizes"][0][-2:]) == ALL - {"params.sizes.0.0", "params.sizes.0.1"}
    assert unread_after(lambda params: params.get("nothing")) == ALL - {"params.nothing"}
    assert unread_after(lambda params: params["none_of"]) == ALL - {"params.none_of"}


@pytest.mark.parametrize("look", [len, list, repr, bool, lambda x: "weight" in x, lambda x: list(x.keys())])
def test_looking_at_a_container_reads_nothing(look):
    assert unread_after(look) == ALL


def test_handing_over_a_container_reads_what_is_consumed():
    def take(weight, **others):
        pass

    scalars = {"params.weight", "params.nothing", "params.none_of"}
    assert unread_after(lambda params: take(**params)) == ALL - scalars
    assert unread_after(lambda params: dict(params)) == ALL - scalars
    assert unread_after(lambda params: {**params}) == ALL - scalars
    assert unread_after(lambda params: plain(params)) == set()
    first = {"params.sizes.0.0", "params.sizes.0.1"}
    assert unread_after(lambda params: tuple(params["sizes"][0])) == ALL - first
    assert unread_after(lambda params: np.array(params["sizes"][0])) == ALL - first


def test_comparing_reads_all():
    assert unread_after(lambda params: params == DATA["params"]) == set()
    assert unread_after(lambda params: DATA["params"] == params) == set()
    case = Case("some_0", DATA, {})
    assert case.data["params"] == DATA["params"] and case.data["params"]["sizes"] == [[1, 2], [3]]
    assert case.data["params"]["sizes"] != [[1, 2], [4]]


def test_skipped_paths_count_as_read():
    case = Case("some_0", DATA, {})
    case.skip("params", "sizes")
    assert set(case.unread()) == {"params.weight", "params.nothing", "params.none_of"}


def test_values_are_those_of_the_file():
    recorded = record(DATA, set())
    assert plain(recorded) == DATA and type(plain(recorded)["params"]["sizes"][0]) is list
    assert recorded["params"]["weight"] == 2.0 and recorded["params"]["sizes"][1][0] == 3
    assert len(list(leaves(DATA))) == len(ALL) + 2
    with pytest.raises(KeyError):
        recorded["params"]["missing"]
    with pytest.raises(IndexError):
        recorded["params"]["sizes"][2]


def check_everything(case: Case) -> None:
    plain(case.data["params"])
    case.tensor("out")


def check_but_the_weight(case: Case) -> None:
    assert case.data["params"]["sizes"] == [[1, 2], [3]]
    assert case.data["params"]["nothing"] is None and case.data["params"]["none_of"] == []
    case.tensor("out")


def check_but_the_array(case: Case) -> None:
    plain(case.data["params"])
    assert "out" in case.arrays and list(case.arrays) == ["out"]


def dispatch(check) -> None:
    run_check("some_0", Case("some_0", DATA, {"out": np.zeros(2)}), {"some": check, "so": None})


def test_a_check_must_read_all_parameters_and_arrays():
    dispatch(check_everything)
    with pytest.raises(AssertionError, match="reads nothing of: params.weight$"):
        dispatch(check_but_the_weight)
    with pytest.raises(AssertionError, match="reads nothing of: array out$"):
        dispatch(check_but_the_array)


def test_a_remark_that_is_no_text_is_a_parameter():
    case = Case("some_0", {"description": {"salt": 3}, "note": "for the reader"}, {})
    assert case.unread() == ["description.salt"]


def test_an_unknown_kind_fails():
    with pytest.raises(AssertionError, match="no check knows golden case 'other_0'"):
        run_check("other_0", Case("other_0", {}, {}), {"some": check_everything})
