"""Two gloo ranks record what one rank records on the joint batch."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import two_ranks
from torch import nn

from resdiag.catalog.set_metrics import columns_of
from resdiag.catalog.table import LOCAL
from resdiag.watch.loop.attach import attach

pytestmark = pytest.mark.timeout(900)  # the first one starts the ranks

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "distributed.md"


def of_attention(frame):
    """Its columns of the set of attention, which is not recorded over several ranks."""
    return [name for name in frame if name in columns_of("attention")]


def assert_equal(found, expected, tolerance=1e-6):
    """Every column to a relative 1e-6; numbers that are zero but for rounding have a floor."""
    expected = expected.drop(columns=of_attention(expected))
    assert list(found.columns) == list(expected.columns)
    assert len(found) == len(expected) > 0
    for name in expected.columns.drop("point", errors="ignore"):
        a, b = found[name].to_numpy(float), expected[name].to_numpy(float)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-12, err_msg=name)


def assert_same_run(found, expected):
    assert found["notes"] == expected["notes"]
    assert found["blocks"] == expected["blocks"]
    assert_equal(found["frame"], expected["frame"])
    local = [*LOCAL]  # of a rank's own batch: missing, and said to be
    assert found["curve"][local].isna().all(axis=None)
    reasons = {item["metric"]: item["reason"] for item in found["unavailable"]}
    assert {reasons[metric] for metric in local} == {"not added up over ranks"}
    assert all("several ranks" in reasons[name] for name in of_attention(expected["frame"]))
    assert_equal(found["curve"].drop(columns=local), expected["curve"].drop(columns=local))
    assert set(found["frame"].point) == {"reduced"}


EQUAL = [
    # relu_nobn is compared metric by metric in test_every_metric.py
    *[((name, kind), {}) for name in ("elu_pre", "vit") for kind in ("ddp", "fsdp")],
    (("vit", "ddp", "inner"), {}),
    (("elu_pre", "ddp", "uneven"), {"sizes": two_ranks.SPLITS["uneven"]}),
    (("relu_nobn", "fsdp", "uneven"), {"sizes": two_ranks.SPLITS["uneven"]}),
    (("relu_nobn", "ddp", "parts"), {"parts": 2}),
    (("elu_pre", "fsdp", "copies"), {}),
    # the first two samples of each rank are the first four of this order
    (("relu_nobn", "ddp", "samples"), {"samples": 4, "order": [0, 1, 4, 5, 2, 3, 6, 7]}),
]


@pytest.mark.parametrize(("case", "options"), EQUAL, ids=["-".join(case) for case, _ in EQUAL])
def test_two_ranks_record_what_one_records(ranks, case, options):
    expected = two_ranks.one_rank(case[0], **options)
    assert_same_run(ranks[0][case], expected)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(ranks[0][case]["weights"][name], weight)


@pytest.mark.parametrize("case", [case for case, _ in EQUAL], ids="-".join)
def test_every_rank_has_the_same_record_bit_for_bit(ranks, case):
    for table in ("frame", "curve"):
        pd.testing.assert_frame_equal(
            ranks[0][case][table], ranks[1][case][table], check_exact=True
        )


COMPILED = [("elu_pre", "core"), ("relu_nobn", "full")]


@pytest.mark.parametrize(("name", "metrics"), COMPILED)
def test_two_ranks_that_run_compiled_record_what_one_records_eagerly(ranks, name, metrics):
    found = ranks[0][name, "compiled", metrics]
    expected = two_ranks.one_rank(name, metrics=metrics, moment_samples=16)
    assert found["notes"] == []
    assert (found["graphs"], found["breaks"]) == (1, {})
    assert_equal(found["frame"], expected["frame"])
    local = [*LOCAL]
    assert_equal(found["curve"].drop(columns=local), expected["curve"].drop(columns=local))
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight)


@pytest.mark.parametrize("case", [("elu_pre", "ddp"), ("vit", "fsdp")], ids="-".join)
def test_watching_changes_no_bit_of_the_training(ranks, case):
    watched, alone = ranks[0][case]["weights"], ranks[0][*case, "unwatched"]["weights"]
    assert watched.keys() == alone.keys()
    assert all(torch.equal(watched[name], alone[name]) for name in alone)


def test_two_sums_a_recorded_step_and_none_else(ranks):
    for rank in ranks:
        settle, *sums = rank["collectives"]["calls"]
        assert settle == 2 * 4
        assert len(sums) == 2 * 2
        assert sums[:2] == sums[2:]
        assert rank["collectives"]["left"] == 0


def test_a_step_that_one_rank_left_out_is_nan_and_said(ranks):
    here, there = ranks[0]["absent"], ranks[1]["absent"]
    values = here["frame"].drop(columns=["block", "point"]).set_index("step")
    assert values.loc[1].isna().all(axis=None)
    assert values.loc[[0, 2], "output_mean"].notna().all()
    assert list(there["frame"].step.unique()) == [0, 2]
    pd.testing.assert_frame_equal(
        here["frame"][here["frame"].step != 1].reset_index(drop=True), there["frame"]
    )
    assert any("not by rank 1" in note for note in here["notes"])


def test_gradients_that_were_not_reduced_are_nan_and_said(ranks):
    for rank in ranks:
        found = rank["unreduced"]
        assert found["frame"].grad_param.isna().all()
        assert found["curve"].grad_norm.isna().all()
        assert found["frame"].grad_output.notna().all()
        assert any("no_sync()" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("strangers", "different weights, so they do not train one model"),
        ("stages", "different blocks (3 on rank 0, 6 on rank 1), as in pipeline parallel"),
        ("joined", "under join() ranks run out of steps"),
    ],
)
def test_ranks_that_do_not_belong_together_stop_the_watching(ranks, case, words):
    for rank in ranks:
        assert any(words in note and "reduce=False" in note for note in rank[case]["notes"])
        assert rank[case].get("all NaN", True)


def test_a_rank_that_does_not_come_ends_the_watching_not_the_training(ranks):
    (note,) = ranks[0]["late"]["notes"]
    assert "watching stopped at step 0: rank 0 did not meet rank 1" in note
    assert "equally often" in note
    assert ranks[0]["late"]["weight"] == ranks[1]["late"]["weight"]


def test_attaching_on_one_rank_only_is_refused(ranks):
    error = ranks[0]["lonely"]["error"]
    assert error.startswith("rank 0 waited 1 s for the others: call attach on every rank")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("tensor parallel", "tensor parallel: activations are spread over ranks by feature"),
        ("FSDP1", "use torch.distributed.fsdp.fully_shard (FSDP2)"),
        ("local shards", "reduce=False: the parameters are shards"),
        ("demand", "force_record() on one rank would wait for the others"),
    ],
)
def test_refusals_name_the_remedy(ranks, case, words):
    assert words in ranks[0]["refused"][case]


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        attach(nn.DataParallel(nn.Linear(2, 2)))


def test_deepspeed_is_refused():
    engine = type("DeepSpeedEngine", (nn.Linear,), {"__module__": "deepspeed.runtime.engine"})
    with pytest.raises(ValueError, match="DistributedDataParallel or fully_shard"):
        attach(engine(2, 2))
    empty = nn.Linear(2, 2)
    empty.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 leaves parameters empty"):
        attach(empty)


def test_a_remote_module_is_refused():
    from torch.distributed.nn.api.remote_module import _RemoteModule

    # built without __init__, which would look for an RPC worker
    remote = _RemoteModule.__new__(type("Made", (_RemoteModule,), {"__new__": object.__new__}))
    nn.Module.__init__(remote)
    with pytest.raises(ValueError, match="attach on the worker that holds the module"):
        attach(remote)


@pytest.mark.parametrize("variant", ["original", "elu_after", "elu"])
def test_with_batchnorm_the_record_is_that_of_the_ranks_own_samples(ranks, variant):
    joint = ranks[0]["own"][variant]["frame"]
    own = [rank["own"][variant, "own"]["frame"] for rank in ranks]
    assert not ranks[0]["own"][variant]["notes"]
    # DDP has averaged the parameters' gradients all the same, and that is no clipping
    assert not ranks[0]["own"][variant, "own"]["notes"]
    assert set(own[0].point) == {"reduced"}
    np.testing.assert_array_equal(own[0].grad_param, joint.grad_param)

    def over_ranks(column, power=1):
        return np.mean([frame[column].to_numpy(float) ** power for frame in own], axis=0)

    for site in ("input", "branch", "shortcut", "sum", "output"):
        # of equally many samples, means and second moments of the ranks average
        for column in (f"{site}_mean", f"{site}_second_moment"):
            np.testing.assert_allclose(joint[column], over_ranks(column), rtol=1e-5, atol=1e-7)
    for column in ("grad_input", "grad_sum", "grad_output"):
        np.testing.assert_allclose(joint[column] ** 2, over_ranks(column, 2), rtol=1e-5)
    for column in ("negative_fraction", "slope_mean", "saturated_fraction", "skip_gain"):
        np.testing.assert_allclose(joint[column], over_ranks(column), rtol=1e-5)
    assert not np.allclose(own[0].grad_output, own[1].grad_output, rtol=1e-3)
    # each rank normalises its own samples, so over all of them too the mean is the learned one
    np.testing.assert_allclose(joint.branch_channel_mean_rms, 0, atol=1e-7)


@pytest.mark.parametrize("case", two_ranks.THREE, ids="-".join)
def test_three_ranks_with_unequal_batches_record_what_one_records(three, case):
    options = {"parts": 2} if "parts" in case else {}
    expected = two_ranks.one_rank(case[0], sizes=two_ranks.SPLITS["three"], **options)
    for rank in three:
        assert_same_run(rank[case], expected)


def test_shards_in_mixed_precision_are_recorded_and_train_on_in_the_same_bits(ranks):
    expected = two_ranks.one_rank("elu_pre")["frame"]
    for rank in ranks:
        found, plain = rank["mixed"]["watched"], rank["mixed"]["plain"]
        assert found["notes"] == []
        assert all(torch.equal(found["weights"][k], plain["weights"][k]) for k in plain["weights"])
        for column in ("grad_param", "grad_sum", "grad_output", "output_channel_std"):
            # bfloat16 keeps 8 bits: 0.4 % for each of some ten operations in a row
            np.testing.assert_allclose(found["frame"][column], expected[column], rtol=0.05)
        # float32 weights whose step in float32 is far below what bfloat16 could hold
        np.testing.assert_allclose(found["frame"].update_ratio, expected.update_ratio, rtol=0.05)


def test_one_broken_number_on_one_rank_is_seen_on_all(ranks):
    for rank in ranks:
        frame = rank["broken"]["frame"]
        share = frame.input_nonfinite.iloc[0]
        # a 3x3 convolution spreads one pixel of a corner to four, in every channel; of eight images
        assert share == pytest.approx(4 / (two_ranks.BATCH * 16 * 16), rel=1e-6)
        assert np.isnan(frame.input_mean.iloc[0])


def test_shards_are_read_at_one_point_never_locally(ranks):
    expected = two_ranks.one_rank("elu_pre", steps=1)["frame"]
    for rank in ranks:
        second, named = rank["points"][None], rank["points"]["pre_clip"]
        assert second["frame"].grad_param_pre_clip.isna().all()
        assert any("grad_read_point='pre_clip'" in note for note in second["notes"])
        # one loss, unclipped: what is read before the clipping is what one rank reads
        np.testing.assert_allclose(named["frame"].grad_param, expected.grad_param, rtol=1e-6)
        assert set(named["frame"].point) == {"pre_clip"}


def script():
    (found,) = re.findall(r"^```python\n(.*?)^```$", HOWTO.read_text("utf-8"), re.M | re.S)
    return found


def test_the_page_s_script_runs_under_torchrun_as_on_one_rank(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(script(), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "train.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["record.parquet"]
    two = pd.read_parquet(tmp_path / "record.parquet")

    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    alone = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in alone.items():
        monkeypatch.setenv(name, str(value))
    exec(compile(script(), "distributed.md", "exec"), {"__name__": "__main__"})
    one = pd.read_parquet("record.parquet")

    assert_equal(two, one, tolerance=1e-4)  # float32
    assert set(two.point) == {"reduced"}
    assert set(one.point) == {"local"}
