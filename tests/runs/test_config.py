import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import make_config

from resdiag.errors import UsageError
from resdiag.runs.config import BACKENDS, DTYPES, RunConfig
from resdiag.runs.watched_config import WatchedConfig

FINITE = st.floats(min_value=0, max_value=1e300)
COUNT = st.integers(min_value=1, max_value=2**63 - 1)
KINDS = {
    str: st.text(),
    bool: st.booleans(),
    int: COUNT,
    float: FINITE | st.integers(min_value=0, max_value=10**6),
    tuple[int, ...]: st.lists(COUNT).map(tuple),
}
BOUNDED = {
    "dtype": st.sampled_from(DTYPES),
    "backend": st.sampled_from(BACKENDS),
    "width": st.floats(min_value=0, max_value=64, exclude_min=True),
    "branch_scale": st.floats(min_value=0, max_value=1000, exclude_min=True),
}
CONFIGS = st.fixed_dictionaries(
    {f.name: BOUNDED.get(f.name, KINDS[f.type]) for f in fields(RunConfig)}
)


@given(CONFIGS)
def test_a_config_survives_json_with_its_digest_and_name(document):
    config = RunConfig(**document)
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.digest() == config.digest()
    assert again.name == config.name


@given(variant=st.text(), data=st.text())
def test_a_name_is_one_harmless_path_component(variant, data):
    name = make_config(variant=variant, data=data).name
    assert re.fullmatch(r"\w*-d8-s0-[0-9a-f]{8}", name, re.ASCII)
    assert len(name) < 120


def test_every_field_changes_the_digest():
    config = make_config()
    other = {str: "x", bool: None, int: 7, float: 0.125, tuple[int, ...]: (3,)}
    for field in fields(RunConfig):
        value = {"dtype": "bfloat16", "backend": "fast"}.get(field.name, other[field.type])
        changed = not getattr(config, field.name) if value is None else value
        assert make_config(**{field.name: changed}).digest() != config.digest(), field.name


def test_equal_numbers_of_another_type_are_the_same_config():
    assert make_config(lr=1) == make_config(lr=1.0)
    assert make_config(lr=1).digest() == make_config(lr=1.0).digest()
    assert make_config(weight_decay=-0.0).digest() == make_config(weight_decay=0.0).digest()


def test_an_unknown_key_is_refused_with_its_nearest_match():
    with pytest.raises(UsageError, match="unknown config key 'batchsize'; did you mean 'batch_"):
        RunConfig.from_dict({**make_config().to_dict(), "batchsize": 3})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", "10", "must be a whole number"),
        ("steps", 10.0, "must be a whole number"),
        ("steps", True, "must be a whole number"),
        ("steps", 0, "must be at least 1"),
        ("seed", -1, "must be at least 0"),
        ("seed", 2**63, "must be a whole number"),
        ("width", -1.0, "must be more than 0"),
        ("width", 65.0, "must be at most 64"),
        ("dtype", "f8", "must be one of float32, bfloat16"),
        ("backend", "engine?", "must be one of auto, eager"),
        ("lr", float("nan"), "must be a finite number"),
        ("lr", 10**4000, "must be a finite number"),
        ("lr", None, "must be a finite number"),
        ("augment", 1, "must be true or false"),
        ("variant", 3, "must be a text"),
        ("milestones", [1, "2"], "must be a list of whole numbers"),
        ("milestones", 4, "must be a list of whole numbers"),
    ],
)
def test_a_mistyped_value_is_refused_in_one_line(key, value, message):
    with pytest.raises(UsageError, match=f"config key '{key}' {message}") as caught:
        RunConfig.from_dict({**make_config().to_dict(), key: value})
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 200


def test_a_missing_key_is_named():
    document = make_config().to_dict()
    del document["lr"]
    with pytest.raises(UsageError, match="config key 'lr' is missing"):
        RunConfig.from_dict(document)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_anything_else_is_a_usage_error(document):
    with pytest.raises(UsageError) as caught:
        RunConfig.from_dict(document)
    assert "\n" not in caught.value.message


def test_a_watched_config_without_its_model_is_a_usage_error():
    with pytest.raises(UsageError, match="config key 'model' is missing"):
        WatchedConfig.from_dict({})


@pytest.mark.parametrize("module", ["config", "folder", "commit", "segments"])
def test_reading_a_run_does_not_import_torch(module):
    code = f"import sys, resdiag.runs.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
