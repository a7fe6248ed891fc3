"""The figures of a report. Every function takes plain arrays and writes one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import FuncFormatter, PercentFormatter

from sane_hf.reporting.style import BLUE, COLORMAP, GREEN, GREY, ORANGE, PALETTE, PURPLE, RED, panels

PROPERTY_NAMES = {"test_accuracy": "test accuracy", "epoch": "epoch", "generalization_gap": "generalisation gap"}


def plot_accuracy_spread(path: Path, epochs: np.ndarray, accuracy: np.ndarray) -> None:
    """Test accuracy of all networks of a zoo, epoch by epoch: every network a dot, quartiles as a box.

    Args:
        path: PNG to write.
        epochs: (n,) epoch of each checkpoint.
        accuracy: (n,) test accuracy, fraction of 1.
    """
    jitter = np.random.default_rng(0)
    with panels(path, width=1.7) as (axis,):
        ticks = np.unique(epochs)
        groups = [accuracy[epochs == epoch] for epoch in ticks]
        for position, values in enumerate(groups):
            x = position + jitter.uniform(-0.32, 0.32, len(values))
            axis.plot(x, values, ".", color=BLUE, markersize=2, alpha=0.25, rasterized=True)
        axis.boxplot(
            groups,
            positions=range(len(ticks)),
            widths=0.5,
            showfliers=False,
            medianprops={"color": RED, "linewidth": 2},
            boxprops={"linewidth": 1.2},
        )
        axis.set_xticks(range(len(ticks)), [str(int(epoch)) for epoch in ticks])
        axis.set(xlabel="epoch", ylabel="test accuracy", title="Spread of the zoo", ylim=(0, 1.02))
        axis.yaxis.set_major_formatter(PercentFormatter(1))


def plot_losses(path: Path, log_history: Sequence[Mapping]) -> None:
    """Loss curves of the training, and the explained variance of real weights where it was logged.

    Args:
        path: PNG to write.
        log_history: entries of the Trainer's `trainer_state.json`.
    """

    def series(key: str) -> tuple[list, list]:
        found = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        return [step for step, _ in found], [value for _, value in found]

    names = {key for entry in log_history for key in entry}
    r2_keys = [key for key in ("r2", "eval_r2") if key in names]
    parts = sorted(key for key in names if key.startswith("eval_loss_"))
    with panels(path, columns=2 if r2_keys else 1, width=1.25) as axes:
        axes[0].plot(*series("loss"), color=BLUE, label="train")
        if "eval_loss" in names:
            axes[0].plot(*series("eval_loss"), color=RED, marker="o", markersize=4, label="validation")
        for key, color in zip(parts, (ORANGE, GREEN, PURPLE), strict=False):
            label = "validation, " + key.removeprefix("eval_loss_")
            axes[0].plot(*series(key), color=color, linestyle="--", linewidth=1.2, label=label)
        axes[0].set(xlabel="step", ylabel="loss", title="Loss", yscale="log")
        for formatter in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
            formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axes[0].legend()
        for key, color, label in zip(r2_keys, (BLUE, RED), ("train", "validation"), strict=False):
            axes[1].plot(
                *series(key), color=color, label=label, marker="o" if key == "eval_r2" else None, markersize=4
            )
        if r2_keys:
            axes[1].set(xlabel="step", ylabel="R² over real weights", title="Reconstruction", ylim=(None, 1))
            axes[1].legend()


def plot_predictions(
    path: Path,
    truth: Mapping[str, np.ndarray],
    predictions: Mapping[str, Mapping[str, np.ndarray]],
    epochs: np.ndarray,
    captions: Mapping[str, Mapping[str, str]],
) -> None:
    """Predicted against true properties of test networks: a row per learner, a column per property.

    Args:
        path: PNG to write.
        truth: property -> (n,) true values.
        predictions: learner -> property -> (n,) predictions from the latents.
        epochs: (n,) epochs, which colour the dots.
        captions: learner -> property -> the score, as text.
    """
    with panels(path, columns=len(truth), rows=len(predictions)) as axes:
        for row, (learner, by_property) in enumerate(predictions.items()):
            for column, (name, true) in enumerate(truth.items()):
                axis = axes[row * len(truth) + column]
                x = true
                if name == "epoch":  # few values: spread the dots a little
                    x = true + np.random.default_rng(0).uniform(-0.3, 0.3, len(true))
                dots = axis.scatter(x, by_property[name], c=epochs, cmap=COLORMAP, s=7, alpha=0.7, rasterized=True)
                low, high = float(true.min()), float(true.max())
                axis.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--")
                label = PROPERTY_NAMES.get(name, name)
                axis.set(xlabel=f"true {label}", ylabel="predicted", title=f"{learner}: {captions[learner][name]}")
            axes[0].figure.colorbar(dots, ax=axes[(row + 1) * len(truth) - 1], label="epoch")


def plot_map(path: Path, points: np.ndarray, explained: np.ndarray, colors: Mapping[str, np.ndarray]) -> None:
    """A two-dimensional map of embeddings, once per property that colours it.

    Args:
        path: PNG to write.
        points: (n, 2) principal components.
        explained: (2,) shares of variance.
        colors: label -> (n,) values.
    """
    order = np.random.default_rng(0).permutation(len(points))  # no class on top of another
    with panels(path, columns=len(colors), width=1.25) as axes:
        for axis, (label, values) in zip(axes, colors.items(), strict=True):
            dots = axis.scatter(*points[order].T, c=values[order], cmap=COLORMAP, s=6, alpha=0.8, rasterized=True)
            axis.figure.colorbar(dots, ax=axis, label=label)
            axis.set(
                xlabel=f"first component ({explained[0]:.0%} of variance)",
                ylabel=f"second component ({explained[1]:.0%})",
                title=f"Embeddings by {label}",
            )


def plot_layers(
    path: Path,
    layers: Sequence[str],
    epochs: np.ndarray,
    distances: np.ndarray,
    scores: Mapping[str, Sequence[float]],
) -> None:
    """The layer-wise view: how far every layer's embedding moves in training, and what it knows by itself.

    Args:
        path: PNG to write.
        layers: names, in order of depth.
        epochs: (E,) epochs.
        distances: (3, E, L) quartiles over networks of the distance of a layer's embedding to its own at epoch 0, in
            units of the mean distance between two networks at that layer.
        scores: property -> (L,) R² of a ridge probe on that layer's embedding alone.
    """
    with panels(path, columns=2, width=1.35) as axes:
        for index, layer in enumerate(layers):
            color = PALETTE[index % len(PALETTE)]
            axes[0].plot(epochs, distances[1, :, index], color=color, marker="o", markersize=3.5, label=layer)
            axes[0].fill_between(epochs, distances[0, :, index], distances[2, :, index], color=color, alpha=0.13)
        axes[0].set(xlabel="epoch", ylabel="distance to epoch 0 (relative)", ylim=(0, None))
        axes[0].set_title("How far each layer moves")
        axes[0].legend()
        width = 0.8 / len(scores)
        for index, (name, values) in enumerate(scores.items()):
            x = np.arange(len(layers)) + (index - (len(scores) - 1) / 2) * width
            axes[1].bar(x, values, width * 0.92, color=PALETTE[index], label=PROPERTY_NAMES.get(name, name))
        axes[1].set_xticks(range(len(layers)), layers, rotation=30, ha="right")
        axes[1].axhline(0, color=GREY, linewidth=0.8)
        axes[1].set(ylabel="R², ridge, trained epochs", title="What one layer's embedding predicts")
        low, high = axes[1].get_ylim()
        axes[1].set_ylim(low, high + 0.3 * (high - low))  # room for the legend above the bars
        axes[1].legend(ncols=len(scores), loc="upper left", columnspacing=1, handlelength=1.2)


def plot_samples(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    anchors: float,
    scratch: float,
    notes: Sequence[str],
) -> None:
    """Accuracy of new networks, never trained, against their distance to the nearest decoded training network.

    Args:
        path: PNG to write.
        curves: label -> (distances, accuracies), sampled networks first and drawn boldest.
        anchors: accuracy of the anchors.
        scratch: accuracy of a network after one epoch of training from scratch.
        notes: one for every point of the first curve, the bandwidth.
    """
    styles = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (RED, "^", "--"), (PURPLE, "D", ":"), (GREEN, "v", "-."))
    with panels(path, width=1.8) as (axis,):
        for number, ((label, (x, y)), (color, marker, line)) in enumerate(zip(curves.items(), styles, strict=False)):
            order = np.argsort(x)
            distances, accuracies = np.asarray(x)[order], np.asarray(y)[order]
            width, size = (1.5, 4) if number else (2.8, 7)
            style = {"color": color, "marker": marker, "markersize": size, "linewidth": width}
            axis.plot(distances, accuracies, line, label=label, **style)
            if number == 0:
                for note, *point in zip(np.asarray(notes)[order], distances, accuracies, strict=True):
                    axis.annotate(note, point, textcoords="offset points", xytext=(5, 6), fontsize=8, color=color)
        axis.axhline(anchors, color=GREY, linewidth=1)
        axis.axhline(scratch, color=GREY, linewidth=1, linestyle=":")
        right = axis.get_xlim()[1]
        for level, text in ((anchors, "anchors"), (scratch, "from scratch, one epoch")):
            axis.text(right, level, text, ha="right", va="bottom", fontsize=8, color=GREY)
        axis.set(
            xlabel="distance to the nearest decoded training network / independent networks",
            ylabel="test accuracy, no training",
            title="New networks against simple ways to make them",
        )
        axis.set_ylim(axis.get_ylim()[0] - 0.04, None)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.legend(loc="lower left")


def plot_compression(
    path: Path,
    latents_per_weight: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    originals: Mapping[str, float],
) -> None:
    """Accuracy of decoded networks against latents per weight, beside networks with noise of the same error.

    Args:
        path: PNG to write.
        latents_per_weight: (K,) compressions.
        curves: label -> (K,) mean test accuracy; each decoded curve followed by that of noise, drawn dashed.
        originals: label -> mean test accuracy of networks before encoding.
    """
    with panels(path, width=1.5) as (axis,):
        for number, (label, values) in enumerate(curves.items()):
            color, noise = (BLUE, ORANGE)[number // 2 % 2], number % 2
            style = {"linestyle": "--", "marker": "^", "linewidth": 1.4} if noise else {"marker": "o"}
            axis.plot(latents_per_weight, values, color=color, label=label, **style)
        for (label, original), color in zip(originals.items(), (BLUE, ORANGE), strict=False):
            axis.axhline(original, color=color, linewidth=1, linestyle=":")
            axis.text(latents_per_weight[0], original, f"{label}, before", va="bottom", fontsize=8, color=color)
        axis.set_xscale("log", base=2)
        axis.set_xticks(latents_per_weight)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axis.minorticks_off()
        axis.set(xlabel="latents per weight", ylabel="test accuracy", title="What the decoder keeps")
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.legend()
