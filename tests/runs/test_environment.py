import json

import pytest

from resdiag.runs.environment import CHANGES_BITS, differences, environment


def test_an_environment_is_plain_data_with_every_field_that_can_change_bits():
    here = environment("cpu", "float32")
    assert json.loads(json.dumps(here)) == here
    assert set(CHANGES_BITS) <= set(here)
    assert here["device"] == "cpu"
    assert here["device_name"]


def test_an_environment_does_not_differ_from_itself():
    here = environment("cpu", "float32")
    assert differences(here, json.loads(json.dumps(here))) == []


@pytest.mark.parametrize("key", CHANGES_BITS)
def test_each_field_that_can_change_bits_is_a_difference(key):
    here = environment("cpu", "float32")
    assert differences({**here, key: "old"}, here) == [f"{key}: old -> {here[key]}"]


def test_git_and_python_do_not_change_bits():
    here = environment("cpu", "float32")
    assert differences({**here, "git": "x", "python": "y", "platform": "z"}, here) == []
