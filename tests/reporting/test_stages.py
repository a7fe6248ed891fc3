"""Kept results are used for the same content only, and a killed stage is not taken for a finished one."""

from __future__ import annotations

import numpy as np
import pytest

from sane_hf.reporting.stages import Stages, hash_files


def counting(result):
    def compute():
        compute.calls += 1
        return result

    compute.calls = 0
    return compute


def test_a_stage_runs_once_for_the_same_content_and_settings(tmp_path):
    compute = counting({"table": {"a": [1, 2]}, "array": np.arange(6.0).reshape(2, 3)})
    for _ in range(2):
        stages = Stages(tmp_path, {"model": "x"})
        result = stages.run("stage", compute, seed=0)
        assert result["table"] == {"a": [1, 2]}
        np.testing.assert_array_equal(result["array"], np.arange(6.0).reshape(2, 3))
        assert stages.seconds["stage"] >= 0
        assert stages.peak_memory > 1 << 20
    assert compute.calls == 1
    Stages(tmp_path, {"model": "x"}).run("stage", compute, seed=1)
    Stages(tmp_path, {"model": "y"}).run("stage", compute, seed=1)
    assert compute.calls == 3


def test_an_interrupted_stage_runs_again_and_leaves_the_others(tmp_path, monkeypatch):
    kept, lost = counting({"value": 1}), counting({"array": np.zeros(3)})
    stages = Stages(tmp_path, {})
    stages.run("kept", kept)
    monkeypatch.setattr(
        "sane_hf.reporting.stages.write_json_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        stages.run("lost", lost)
    monkeypatch.undo()
    stages = Stages(tmp_path, {})
    stages.run("kept", kept)
    stages.run("lost", lost)
    assert (kept.calls, lost.calls) == (1, 2)


def test_hash_sees_names_and_contents(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("1")
    second.write_text("1")
    before = hash_files([first])
    assert before != hash_files([second])
    first.write_text("2")
    assert before != hash_files([first])
