"""The whole report of a small run: complete, resumable, and readable where it is read."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from sane_hf.checkpoints import save_checkpoint
from sane_hf.reporting import report
from sane_hf.reporting import run as reporting_run
from sane_hf.reporting.claims import check_claims

TARGETS = {"test_accuracy", "epoch", "generalization_gap"}
FEATURES = {
    "latents",
    "weight_statistics",
    "log_weight_statistics",
    "latents_and_log_statistics",
    "raw_weights",
    "metadata",
}


@pytest.fixture(scope="module")
def reported(finished_run, tmp_path_factory):
    """The run with its report, which was interrupted once before the last stage."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting_run, "probing", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            report(folder, quick=True)
        assert not (folder / "metrics.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("embedding", "reconstruction", "generation"):
            patch.setattr(reporting_run, stage, _interrupt)  # kept: must not run again
        report(folder, quick=True)
    return folder


def _interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def metrics(reported):
    return json.loads((reported / "metrics.json").read_text())


def test_metrics_have_the_promised_form(metrics):
    assert set(metrics) == {
        *("probe", "probe_trained", "probe_trees", "probe_trees_trained"),
        *("reconstruction", "generation", "generation_other_samplers", "scratch", "seconds", "peak_memory_bytes"),
    }
    for name in ("probe", "probe_trained", "probe_trees", "probe_trees_trained"):
        assert set(metrics[name]) == TARGETS
        for scores in metrics[name].values():
            assert set(scores) == (FEATURES - {"raw_weights"} if "trees" in name else FEATURES)
            assert all(set(score) == {"r2", "tau"} for score in scores.values())
    assert set(metrics["reconstruction"]) == {
        *("r2", "latents_per_weight", "anchor_accuracy", "decoded_accuracy", "noise_accuracy_at_same_error"),
        *("test_accuracy", "test_decoded_accuracy"),
    }
    for point in metrics["generation"]:
        assert set(point) == {
            *("sampler", "bandwidth", "accuracy_epoch_0", "accuracy_epoch_1", "distance_to_decoded"),
            *("distance_to_train", "noise_accuracy", "average_accuracy", "tolerant_noise_accuracy"),
        }
    assert set(metrics["scratch"]) == {"accuracy_epoch_0", "accuracy_epoch_1"}
    assert {"training", "embedding", "probing", "reconstruction", "generation"} <= set(metrics["seconds"])
    assert metrics["peak_memory_bytes"] > 1 << 20


def test_the_page_shows_figures_that_exist_and_every_goal(reported, metrics):
    page = (reported / "report.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len([link for link in links if link.endswith(".png")]) == 7
    for link in links:
        assert (reported / link).exists(), link
    held_out = {"original": 0.8, "decoded": 0.8}
    points = json.loads((reported / "evaluation" / "generation.json").read_text())["result"]["points"]
    for claim in check_claims(metrics, points, held_out):
        assert claim.goal in page
    first = metrics["probe"]["test_accuracy"]["latents"]
    assert f"{first['r2']:.3f} ({first['tau']:.2f})" in page
    assert "{{" not in page


def test_the_card_is_one_the_hub_reads_and_its_lines_run(reported, metrics, subject, tmp_path):
    card = ModelCard.load(reported / "README.md")
    assert card.data.library_name == "transformers"
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    expected = round(metrics["probe"]["epoch"]["latents"]["r2"], 4)
    assert values["R² of epoch, ridge on latents, all epochs"] == expected
    checkpoint = tmp_path / "network.safetensors"
    save_checkpoint(subject.layout.unflatten(subject.flat[0]), checkpoint)
    lines = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    lines = lines.replace("path/to/checkpoint.safetensors", str(checkpoint)).replace(
        'model="run"', f'model="{reported}"'
    )
    scope = {}
    exec(lines, scope)
    assert scope["embeddings"].shape == (1, 2 * 5 * subject.model.config.latent_size)


def test_goals_are_reached_by_figures_alone(metrics):
    better = json.loads(json.dumps(metrics))
    for name in ("probe", "probe_trained"):
        for scores in better[name].values():
            scores["latents"]["r2"] = scores["weight_statistics"]["r2"] + 0.01
    better["reconstruction"].update(anchor_accuracy=0.97, decoded_accuracy=0.93, latents_per_weight=1.0)
    for point in better["generation"]:
        point.update(accuracy_epoch_0=0.95, accuracy_epoch_1=0.96, noise_accuracy=0.94, average_accuracy=0.94)
        point["average_distance"] = point["distance_to_decoded"]
    points, held_out = better["generation"], {"original": 0.80, "decoded": 0.76}

    def missed(**held_out_instead):
        claims = check_claims(better, points, held_out_instead or held_out)
        return [claim.goal for claim in claims if not claim.reached]

    assert missed() == []
    points[-1]["noise_accuracy"] = 0.95  # equal is not better
    assert [goal for goal in missed() if "noise" in goal] == missed()
    points[-1].update(noise_accuracy=0.9, average_accuracy=0.96)
    assert [goal for goal in missed() if "averaging" in goal] == missed() != []
    points[-1]["average_distance"] /= 2  # averages that stay nearer are not compared
    assert missed() == []
    better["reconstruction"]["latents_per_weight"] = 1.5
    assert len(missed()) == 1
    better["reconstruction"]["latents_per_weight"] = 1.0
    assert len(missed(original=0.80, decoded=0.74)) == 1
