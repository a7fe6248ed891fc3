"""The model card of a run, with its measured figures in the form that the Hub reads (model-index)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sane_hf.checkpoints import write_text_atomic

TAGS = ["sane", "weight-space-learning", "model-zoo", "hyper-representations"]


def write_card(folder: Path, metrics: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
    """Write README.md, the model card, into the folder of a run.

    Args:
        folder: of the run.
        metrics: content of metrics.json.
        facts: what else `model_cards/sane_card.md` names, and `source`, folder or Hub id of the zoo.

    Returns:
        The file.
    """
    published = not Path(facts["source"]).exists()  # only what is on the Hub can be linked there
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=TAGS,
        datasets=[facts["source"]] if published else None,
        metrics=["r_squared", "accuracy"],
        model_name=facts["model_name"],
        eval_results=evaluation_results(metrics, facts["source" if published else "zoo_name"], facts["zoo_name"]),
    )
    template = resources.files("sane_hf.model_cards").joinpath("sane_card.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, metrics=metrics, **facts)
    file = folder / "README.md"
    write_text_atomic(file, str(card))
    return file


def evaluation_results(metrics: Mapping[str, Any], dataset: str, dataset_name: str) -> list[EvalResult]:
    """The figures that stand in the card's metadata.

    Args:
        metrics: content of metrics.json.
        dataset: Hub id of the zoo, or its name where it is not published.
        dataset_name: its name.

    Returns:
        R² of ridge probes on the latents, reconstruction R², and the accuracies of decoded and sampled networks.
    """

    def result(task: str, metric: str, name: str, value: float, config: str | None = None) -> EvalResult:
        return EvalResult(
            task_type=task,
            task_name="Property prediction" if task == "tabular-regression" else "Weight generation",
            dataset_type=dataset,
            dataset_name=dataset_name,
            dataset_split="test",
            dataset_config=config,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )

    found = []
    for key, epochs in (("probe", "all epochs"), ("probe_trained", "trained epochs")):
        for target, scores in metrics[key].items():
            name = f"R² of {target}, ridge on latents, {epochs}"
            found.append(result("tabular-regression", "r_squared", name, scores["latents"]["r2"]))
    reconstruction, sample = metrics["reconstruction"], metrics["generation"][0]
    found += [
        result("other", "r_squared", "R² of reconstructed weights", reconstruction["r2"]),
        result("other", "accuracy", "Accuracy of decoded anchors", reconstruction["decoded_accuracy"]),
        result("other", "accuracy", "Accuracy of sampled networks, no training", sample["accuracy_epoch_0"]),
    ]
    return found
