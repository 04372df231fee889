from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from sparsify import schema
from sparsify.errors import UsageError


@dataclass(frozen=True)
class Row:
    label: str
    where: dict[str, Any] = field(default_factory=dict)
    each: str | None = None


@dataclass(frozen=True)
class Layout:
    title: str
    rows: list[Row]
    kind: Literal["table", "curve"] = "table"
    steps: tuple[int, ...] = (1,)
    within: float | None = None
    value: int | float = 1


GOOD = {"title": "t", "rows": [{"label": "a", "where": {"x": 1}}]}


def test_nested_dataclasses_come_out_of_plain_data():
    layout = schema.load(Layout, GOOD | {"steps": [1, 2], "within": 1}, "table1.yaml")
    assert layout == Layout("t", [Row("a", {"x": 1})], steps=(1, 2), within=1.0)
    assert isinstance(layout.within, float)
    assert isinstance(schema.load(Layout, GOOD | {"value": 3}, "t").value, int)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"rows": [{"label": "a", "eahc": "b"}]},
            r"table1.yaml.rows\[0\] has no key of that name. Got: eahc.*did you mean each",
        ),
        ({"titel": "x"}, "Got: titel.*did you mean title"),
        ({"rows": [{}]}, r"rows\[0\] lacks label"),
        ({"rows": {"label": "a"}}, "rows has the wrong kind of value.*a list"),
        ({"title": 3}, "title has the wrong kind.*Allowed: text"),
        ({"title": True}, "title"),
        ({"kind": "pie"}, "kind has no such value.*table, curve"),
        ({"steps": [1, "2"]}, r"steps\[1\].*a whole number"),
        ({"steps": [True]}, r"steps\[0\]"),
        ({"within": "1%"}, "within"),
        ({"rows": [{"label": "a", "where": []}]}, r"rows\[0\].where.*a mapping"),
    ],
    ids=str,
)
def test_what_does_not_fit_says_where(change, words):
    with pytest.raises(UsageError, match=words):
        schema.load(Layout, GOOD | change, "table1.yaml")


def test_a_missing_key_is_named():
    with pytest.raises(UsageError, match=r"table1\.yaml lacks rows"):
        schema.load(Layout, {"title": "t"}, "table1.yaml")
