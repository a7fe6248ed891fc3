"""The report of a training run: every stage of the evaluation, then metrics, plots, page and card."""

from __future__ import annotations

import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.console import Console

from sane_hf.checkpoints import write_json_atomic, write_text_atomic
from sane_hf.reporting import plots
from sane_hf.reporting.card import write_card
from sane_hf.reporting.claims import Claim, check_claims, percent
from sane_hf.reporting.generating import DRAWN, KEPT, generation
from sane_hf.reporting.looking import embedding_map, layer_moves
from sane_hf.reporting.probing import PROBES, TARGETS, TRAINED, embedding, probing
from sane_hf.reporting.reconstructing import reconstruction
from sane_hf.reporting.stages import Stages, one_thread
from sane_hf.reporting.subject import ANCHORS, Subject, load_subject
from sane_hf.reporting.tables import (
    claims_table,
    figures_table,
    generation_table,
    probe_table,
    reconstruction_table,
    terminal_table,
)

logger = logging.getLogger(__name__)

GENERATION_KEYS = (
    "sampler",
    "bandwidth",
    "accuracy_epoch_0",
    "accuracy_epoch_1",
    "distance_to_decoded",
    "distance_to_train",
    "noise_accuracy",
    "average_accuracy",
    "tolerant_noise_accuracy",
)
RECONSTRUCTION_KEYS = (
    "r2",
    "latents_per_weight",
    "anchor_accuracy",
    "decoded_accuracy",
    "noise_accuracy_at_same_error",
    "test_accuracy",
    "test_decoded_accuracy",
)
QUICK_TEST_NETWORKS = 200


def report(run_dir: str | Path, zoo: str | None = None, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Evaluate a training run, and write its report into the run's folder.

    Every stage is kept under `evaluation/` and not repeated while model, zoo and code are the same, so an interrupted
    report goes on where it stopped.

    Args:
        run_dir: output folder of a training run.
        zoo: folder or Hub id of the zoo, where it is no longer where the recipe says.
        seed: of everything that is drawn in the evaluation.
        quick: fewer networks and bandwidths, no trees on raw weights: a look, not a result.

    Returns:
        The content of metrics.json, which is written with `report.md`, `plots/` and the card `README.md`.

    Raises:
        ValueError: if the folder holds no finished run, or the zoo does not fit it.
        ImportError: without the extra that plots and probes need.
    """
    folder = Path(run_dir)
    subject = load_subject(folder, zoo)
    stages = Stages(folder / "evaluation", subject.content)
    settings = {"seed": seed, "quick": quick}
    limit = QUICK_TEST_NETWORKS if quick else None
    with one_thread():
        layer_embeddings = stages.run("embedding", lambda: embedding(subject))["layers"]
        decoded = stages.run("reconstruction", lambda: reconstruction(subject, seed, limit), **settings)
        generated = stages.run("generation", lambda: generation(subject, seed, quick), **settings)
    probed = stages.run("probing", lambda: probing(subject, layer_embeddings, seed, quick), **settings)

    finished = json.loads((folder / "training.json").read_text())
    training = finished["metrics"]
    metrics: dict[str, Any] = {
        **{name: probed["scores"][name] for name in PROBES},
        "reconstruction": {key: decoded["full"][key] for key in RECONSTRUCTION_KEYS},
        "generation": [{key: point[key] for key in GENERATION_KEYS} for point in generated["points"]],
        "generation_other_samplers": [{key: point[key] for key in GENERATION_KEYS} for point in generated["others"]],
        "scratch": generated["scratch"],
        "seconds": {"training": training["train_runtime"], **stages.seconds},
        "peak_memory_bytes": max(finished.get("peak_memory_bytes", 0), stages.peak_memory),
    }
    held_out = {"original": decoded["full"]["test_accuracy"], "decoded": decoded["full"]["test_decoded_accuracy"]}
    claims = check_claims(metrics, generated["points"], held_out)
    _draw(folder, subject, layer_embeddings, probed, decoded, generated)
    facts = _facts(folder, subject, metrics, layer_embeddings, training)
    _write_page(folder, facts, claims, metrics, probed, decoded, generated)
    tables = {
        "probe_table": probe_table(metrics["probe"]),
        "probe_trained_table": probe_table(metrics["probe_trained"]),
        "figures_table": figures_table(metrics),
    }
    write_card(folder, metrics, {**facts, **tables})
    write_json_atomic(folder / "metrics.json", metrics)  # last: where it stands, the report is whole
    console = Console()
    console.print(terminal_table(claims, str(folder)))
    console.print(f"Read {folder / 'report.md'}; figures in {folder / 'metrics.json'}, plots in {folder / 'plots'}")
    return metrics


def _draw(
    folder: Path,
    subject: Subject,
    layer_embeddings: np.ndarray,
    probed: dict[str, Any],
    decoded: dict[str, Any],
    generated: dict[str, Any],
) -> None:
    """All plots."""
    where, columns = folder / "plots", subject.zoo.columns
    test = subject.rows("test")
    plots.plot_accuracy_spread(where / "accuracy_spread.png", subject.epochs, columns["test_accuracy"])
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    plots.plot_losses(where / "losses.png", history)
    learners = {"ridge": "probe", "trees": "probe_trees"}
    scores = {learner: probed["scores"][name] for learner, name in learners.items()}
    plots.plot_predictions(
        where / "predictions.png",
        {target: columns[target][test] for target in TARGETS},
        {learner: {target: probed[f"{learner}_{target}"] for target in TARGETS} for learner in learners},
        subject.epochs[test],
        {
            learner: {target: "R² {r2:.3f}, τ {tau:.2f}".format(**found[target]["latents"]) for target in TARGETS}
            for learner, found in scores.items()
        },
    )
    points, shares = embedding_map(subject, layer_embeddings.reshape(len(layer_embeddings), -1))
    colors = {"test accuracy": columns["test_accuracy"][test], "epoch": subject.epochs[test]}
    plots.plot_map(where / "embedding_map.png", points, shares, colors)
    moves = layer_moves(subject, layer_embeddings)
    plots.plot_layers(where / "layers.png", moves.layers, moves.epochs, moves.distances, probed["layers"])
    curve = decoded["curve"]
    plots.plot_compression(
        where / "compression.png",
        [point["latents_per_weight"] for point in curve],
        {
            "anchors, decoded": [point["decoded_accuracy"] for point in curve],
            "anchors, noise of equal error": [point["noise_accuracy_at_same_error"] for point in curve],
            "test split, decoded": [point["test_decoded_accuracy"] for point in curve],
            "test split, noise of equal error": [point["test_noise_accuracy_at_same_error"] for point in curve],
        },
        {"anchors": decoded["full"]["anchor_accuracy"], "test split": decoded["full"]["test_accuracy"]},
    )
    plots.plot_samples(
        where / "samples.png",
        {
            label: ([point[x] for point in generated["points"]], [point[y] for point in generated["points"]])
            for label, x, y in (
                ("samples", "distance_to_decoded", "accuracy_epoch_0"),
                ("anchors and isotropic noise", "distance_to_decoded", "isotropic_noise_accuracy"),
                ("anchors and noise shaped by their spread", "distance_to_decoded", "shaped_noise_accuracy"),
                ("averages of anchors", "average_distance", "average_accuracy"),
                ("anchors and noise that behaviour tolerates", "distance_to_decoded", "tolerant_noise_accuracy"),
            )
        },
        decoded["full"]["anchor_accuracy"],
        generated["scratch"]["accuracy_epoch_1"],
        [f"{point['bandwidth']:g}" for point in generated["points"]],
    )


def _facts(
    folder: Path, subject: Subject, metrics: dict[str, Any], layer_embeddings: np.ndarray, training: dict[str, Any]
) -> dict[str, Any]:
    """What page and card say beside the figures."""
    columns = subject.zoo.columns
    train, test = subject.rows("train"), subject.rows("test")
    state = json.loads((folder / "trainer_state.json").read_text())
    return {
        "run_name": folder.name,
        "model_name": folder.name,
        "model_path": folder.name if folder.is_absolute() else folder.as_posix(),
        "source": subject.source,
        "zoo_name": subject.zoo.name,
        "architecture": subject.zoo.architecture,
        "images": subject.images.name,
        "networks": len(np.unique(columns["model_id"])),
        "models": len(np.unique(columns["model_id"][train])),
        "test_models": len(np.unique(columns["model_id"][test])),
        "checkpoints": len(train),
        "epochs": np.unique(subject.epochs).tolist(),
        "weights": subject.layout.num_weights,
        "features": layer_embeddings[0].size,
        "parameters": f"{sum(p.numel() for p in subject.model.parameters()):,}",
        "steps": state["global_step"],
        "batch_size": state["train_batch_size"],
        "minutes": f"{training['train_runtime'] / 60:.1f}",
        "test_images": len(subject.images.test),
        "trained": TRAINED,
        "anchors": ANCHORS,
        "drawn": DRAWN,
        "kept": KEPT,
        "content": subject.content,
        "seconds": metrics["seconds"],
        "peak_memory": metrics["peak_memory_bytes"],
    }


def _write_page(
    folder: Path,
    facts: dict[str, Any],
    claims: list[Claim],
    metrics: dict[str, Any],
    probed: dict[str, Any],
    decoded: dict[str, Any],
    generated: dict[str, Any],
) -> None:
    """report.md."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["percent"] = percent
    template = resources.files("sane_hf.model_cards").joinpath("sane_report.md").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        **facts,
        claims=claims_table(claims),
        probes={name: probe_table(probed["scores"][name]) for name in PROBES},
        reconstruction=reconstruction_table(decoded["curve"]),
        decoded_epochs=decoded["epochs"],
        generation=generation_table(generated["points"]),
        others=generation_table(generated["others"]),
        independent=f"{generated['independent_distance']:.1f}",
        scratch=metrics["scratch"],
        anchor_accuracy=metrics["reconstruction"]["anchor_accuracy"],
    )
    write_text_atomic(folder / "report.md", page)
