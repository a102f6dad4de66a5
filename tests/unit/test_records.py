"""``kvmlite.records.dataclass``: what the standard decorator gives, without importing it."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from kvmlite.records import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Two required fields, one with a default, one made anew."""

    x: int
    y: int
    label: str = ""
    tags: list[str] = field(default_factory=list)

    def moved(self, dx: int) -> Point:
        return dataclasses.replace(self, x=self.x + dx)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    value: int

    def __post_init__(self) -> None:
        if self.value < 0:
            raise ValueError(f"{self.value} is negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Empty:
    pass


def test_fields_are_set_by_keyword() -> None:
    point = Point(x=1, y=2)
    assert (point.x, point.y, point.label, point.tags) == (1, 2, "", [])


def test_a_missing_field_is_named() -> None:
    with pytest.raises(TypeError, match=r"Point\(\) missing keyword argument: 'y'"):
        Point(x=1)  # type: ignore[call-arg]


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match=r"Point\(\) got an unexpected keyword argument 'z'"):
        Point(x=1, y=2, z=3)  # type: ignore[call-arg]


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        Point(1, 2)  # type: ignore[misc]


def test_a_record_is_frozen() -> None:
    point = Point(x=1, y=2)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'x'"):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'x'"):
        del point.x  # type: ignore[misc]
    assert point.x == 1


def test_a_record_has_no_other_attributes() -> None:
    assert not hasattr(Point(x=1, y=2), "__dict__")


def test_each_instance_gets_its_own_default() -> None:
    assert Point(x=1, y=2).tags is not Point(x=1, y=2).tags


def test_equality_is_by_type_and_value() -> None:
    assert Point(x=1, y=2) == Point(x=1, y=2)
    assert Point(x=1, y=2) != Point(x=1, y=3)
    assert Checked(value=1) != Empty()
    assert Empty() == Empty()


def test_equal_records_hash_alike() -> None:
    assert hash(Checked(value=7)) == hash(Checked(value=7))
    assert len({Checked(value=7), Checked(value=7), Checked(value=8)}) == 2


def test_repr_can_be_read_back() -> None:
    assert repr(Point(x=1, y=2, label="a")) == "Point(x=1, y=2, label='a', tags=[])"


def test_post_init_checks() -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        Checked(value=-1)


def test_replace_makes_a_changed_copy_and_checks_it() -> None:
    assert Point(x=1, y=2).moved(4) == Point(x=5, y=2)
    with pytest.raises(ValueError, match="negative"):
        dataclasses.replace(Checked(value=1), value=-1)


def test_fields_and_asdict_are_the_standard_ones() -> None:
    assert [f.name for f in dataclasses.fields(Point)] == ["x", "y", "label", "tags"]
    assert dataclasses.asdict(Point(x=1, y=2, tags=["t"])) == {"x": 1, "y": 2, "label": "", "tags": ["t"]}
    assert dataclasses.is_dataclass(Point)
    assert dataclasses.fields(Point)[2].default == ""


def test_a_record_matches_by_keyword() -> None:
    match Point(x=1, y=2):
        case Point(x=1, label=label):
            assert label == ""
        case _:
            pytest.fail("it did not match")


def test_a_record_can_be_copied_and_pickled() -> None:
    point = Point(x=1, y=2, tags=["t"])
    assert copy.deepcopy(point) == point
    assert copy.deepcopy(point).tags is not point.tags
    assert pickle.loads(pickle.dumps(point)) == point


@pytest.mark.parametrize("option", ["frozen", "slots", "kw_only"])
def test_only_frozen_slotted_keyword_records_exist(option: str) -> None:
    options = {"frozen": True, "slots": True, "kw_only": True, option: False}
    with pytest.raises(TypeError, match="records are frozen=True, slots=True, kw_only=True"):
        dataclass(**options)  # type: ignore[call-overload]
