"""When a checkpoint's class names are those of the data, and what is said when they are not."""

import pytest

from hf_maskformer.evaluation.class_agreement import check_class_names
from hf_maskformer.model.label_spec import LabelSpec

DATA = ("road, route", "Traffic-Light", "dining table")


def check(names, data=DATA, **settings):
    check_class_names("model", dict(enumerate(names)), LabelSpec(dict(enumerate(data))), **settings)


@pytest.mark.parametrize(
    "names",
    [
        DATA,
        ("ROAD", "traffic light", "dining_table"),
        ("route", "traffic_light ", "diningtable"),
        ("way; route", "TrafficLight", "Dining Table, table"),
    ],
)
def test_spellings_of_the_same_names_agree(names, caplog):
    check(names)
    assert caplog.text == ""


def test_keys_of_a_json_file_are_sorted_as_numbers():
    names = {str(index): f"class {index}" for index in range(12)}
    check_class_names("model", dict(sorted(names.items())), LabelSpec({int(key): name for key, name in names.items()}))


def test_names_nobody_gave_follow_the_datas_order(caplog):
    check(("LABEL_0", "LABEL_1", "LABEL_2"))
    assert "the model names no classes (LABEL_0, ...)" in caplog.text
    check(("a", "b"), data=("label_0", "label_1"))
    assert "the data names no classes (label_0, ...)" in caplog.text


def test_one_placeholder_among_names_is_a_name():
    with pytest.raises(ValueError, match="1 is 'LABEL_1' in the model and 'Traffic-Light' in the data"):
        check(("road", "LABEL_1", "dining table"))


def test_another_number_is_an_error_in_any_case():
    for settings in ({}, {"ignore_names": True}):
        with pytest.raises(ValueError, match="the model has 2 classes but the data 3"):
            check(("LABEL_0", "LABEL_1"), **settings)


def test_another_order_is_an_error():
    with pytest.raises(ValueError, match="the model has the data's classes in another order"):
        check(("a", "c", "B"), data=("A", "b", "c"))


def test_the_first_differences_are_listed():
    with pytest.raises(
        ValueError, match=r"0 is 'a' .* 'b' in the data, 2 is 'x' .*, 3 is 'x' .* and 2 more\. If only"
    ):
        check(("a", "c", "x", "x", "x", "x"), data=("b", "c", "d", "e", "f", "g"))


def test_differences_can_be_accepted(caplog):
    check(("a", "b", "c"), ignore_names=True)
    assert "class names are not compared: 0 is 'a' in the model and 'road, route' in the data" in caplog.text
