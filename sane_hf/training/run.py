"""A training run from a recipe: zoo, tokenizer, model, Trainer, and the folder that `from_pretrained` loads."""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from sane_hf.checkpoints import write_json_atomic, write_text_atomic
from sane_hf.modeling import SaneConfig, SaneForPreTraining, WeightTokenizer
from sane_hf.zoos import ZooMatrix, load_images, load_matrix

from .arguments import Recipe, ViewArguments, load_recipe
from .behavior import BehaviorLoss
from .targets import LAYER_STATISTICS, Standardizer, behavior_statistics, layer_statistics, zoo_logits
from .trainer import SaneTrainer
from .windows import ZooWindows, collate

logger = logging.getLogger(__name__)

TARGET_IMAGES = 128  # unlabelled training images that label-free behaviour is measured on
TARGET_LIMIT = 5.0  # standardised targets are clipped here, so that one broken network does not rule the loss
FINISHED = "training.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `train.py`: a recipe, then overrides such as `--trainer.max_steps 20`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit("usage: accelerate launch train.py RECIPE.yaml [--trainer.max_steps 20] [--seed 1] ...")
    try:
        train(arguments[0], arguments[1:])
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train.py: {error}") from error


def train(recipe: str | Path, overrides: Sequence[str] | dict[str, Any] = ()) -> Path:
    """Train SANE as a recipe says; an interrupted run continues from its last complete checkpoint.

    Args:
        recipe: YAML file, see `Recipe`.
        overrides: dotted names and values, as on the command line (`["--seed", "1"]`) or as a dict.

    Returns:
        The output folder: model, tokenizer, recipe, `trainer_state.json` and, when finished, `training.json`.

    Raises:
        ValueError: a recipe that contradicts itself, or another recipe than the one that the folder was begun with.
    """
    overrides = overrides if isinstance(overrides, dict) else parse_overrides(overrides)
    plan = load_recipe(recipe, overrides)
    folder = Path(plan.output_dir)
    if _is_finished(folder, plan):
        logger.info("%s: training is finished, nothing to do (remove the folder to train again)", folder)
        return folder
    set_seed(plan.seed)
    zoo = load_matrix(plan.zoo, plan.split_seed)
    tokenizer = build_tokenizer(zoo, plan)
    trainer = build_trainer(zoo, tokenizer, plan)
    checkpoint = newest_complete_checkpoint(folder)
    if checkpoint:
        logger.warning("%s: continuing from %s", folder, checkpoint.name)
    if trainer.is_world_process_zero():
        write_text_atomic(folder / "recipe.yaml", yaml.safe_dump(plan.to_dict(), sort_keys=False))
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = {**result.metrics, **trainer.evaluate()}
    trainer.save_model()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(folder)
        trainer.save_state()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        finished = {"recipe": plan.to_dict(), "metrics": metrics, "peak_memory_bytes": peak}
        write_json_atomic(folder / FINISHED, finished)
    return folder


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with most steps among those that were written to the end; the user is told of others.

    The Trainer writes into the final folder, its state last of all, so a checkpoint without it was cut short.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if (checkpoint / TRAINER_STATE_NAME).is_file():
            return checkpoint
        logger.warning("%s was cut short while it was written, and is not used: remove it", checkpoint)
    return None


def build_tokenizer(zoo: ZooMatrix, plan: Recipe) -> WeightTokenizer:
    """Tokenizer with statistics of the training split, the permutation groups and the canonical reference."""
    try:
        tokenizer = WeightTokenizer(**plan.tokenizer)
    except TypeError as error:  # an argument that WeightTokenizer does not have
        raise ValueError(f"tokenizer: {str(error).replace('WeightTokenizer.__init__() ', '')}") from error
    tokenizer.fit(zoo.state_dict(weights) for weights in zoo.of_split("train").flat)
    reference = zoo.state_dict(zoo.reference)
    tokenizer.set_groups(reference, zoo.groups)
    tokenizer.set_reference(reference)
    return tokenizer


def build_trainer(zoo: ZooMatrix, tokenizer: WeightTokenizer, plan: Recipe) -> SaneTrainer:
    """Data sets, model and Trainer of a run."""
    layout = tokenizer.layout(zoo.state_dict(zoo.reference))
    parts = {split: zoo.of_split(split) for split in ("train", "validation")}
    statistics = _standardized(*(layer_statistics(part.flat, layout) for part in parts.values()))
    images = load_images(plan.behavior.images).train.images if plan.behavior.images else None
    behavior: tuple[torch.Tensor | None, ...] = (None, None)
    if images is not None and plan.behavior.targets:
        behavior = _standardized(*_behavior_targets(parts, layout, images, plan.behavior.components, plan.seed))
    unvaried = ViewArguments(0.0, 0.0, plan.views.window, plan.views.second_view)
    windows = [
        ZooWindows(part.flat, layout, tokenizer, zoo.groups, views, statistics[i], behavior[i], plan.seed)
        for i, (part, views) in enumerate(zip(parts.values(), (plan.views, unvaried), strict=True))
    ]
    model = SaneForPreTraining(build_config(plan, layout, behavior[0]))
    loss = None
    if plan.behavior.weight:
        loss = BehaviorLoss(
            zoo.architecture, parts["train"].configs, layout, tokenizer, images, plan.behavior.queries, plan.seed
        )
    return SaneTrainer(
        model=model,
        args=_training_arguments(plan),
        train_dataset=windows[0],
        eval_dataset=windows[1],
        data_collator=collate,
        behavior_loss=loss,
        behavior=plan.behavior,
    )


def build_config(plan: Recipe, layout, behavior: torch.Tensor | None) -> SaneConfig:
    """The recipe's model, with the sizes that follow from zoo and tokenizer where it leaves them out."""
    rows = int(layout.positions()[:, 2].max()) + 1
    sizes = {
        "token_size": layout.token_size,
        "latent_size": layout.token_size,
        "max_positions": [layout.num_tokens, len(layout.layers), rows],
        "gamma": 0.0,
    }
    if plan.model.get("statistics_weight"):
        sizes["statistics_size"] = LAYER_STATISTICS
        sizes["behavior_size"] = 0 if behavior is None else behavior.shape[1]
    known = {field.name for field in dataclasses.fields(SaneConfig)}
    if unknown := sorted(set(plan.model) - known):
        raise ValueError(f"model.{unknown[0]} is not known; known are {', '.join(sorted(known))}")
    return SaneConfig(**{**sizes, **plan.model})


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Dotted command-line overrides to a dict; values are read as YAML.

    Raises:
        ValueError: an argument that is no `--name value` or `--name=value`.

    Example:
        >>> parse_overrides(["--trainer.max_steps", "20", "--views.noise=0.0", "--split_seed", "null"])
        {'trainer.max_steps': 20, 'views.noise': 0.0, 'split_seed': None}
    """
    overrides, rest = {}, list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or (not equals and not rest):
            raise ValueError(f"{name}: overrides are given as --name value, for example --trainer.max_steps 20")
        overrides[name[2:]] = yaml.safe_load(value if equals else rest.pop(0))
    return overrides


def _training_arguments(plan: Recipe) -> TrainingArguments:
    defaults = {
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    try:
        return TrainingArguments(output_dir=plan.output_dir, seed=plan.seed, **{**defaults, **plan.trainer})
    except TypeError as error:  # an argument that TrainingArguments does not have
        raise ValueError(f"trainer: {str(error).replace('TrainingArguments.__init__() ', '')}") from error


def _is_finished(folder: Path, plan: Recipe) -> bool:
    """Whether the folder holds the finished run of this very recipe; refuses to mix two recipes in one folder."""
    begun = folder / "recipe.yaml"
    if begun.is_file() and (before := yaml.safe_load(begun.read_text())) != (now := _plain(plan)):
        changed = sorted(key for key in now if before.get(key) != now[key])
        raise ValueError(
            f"{folder}: was begun with another recipe (different: {', '.join(changed)}): choose another output_dir, "
            "or remove the folder"
        )
    return (folder / FINISHED).is_file()


def _plain(plan: Recipe) -> dict[str, Any]:
    """As it reads back from YAML (tuples are lists there)."""
    return yaml.safe_load(yaml.safe_dump(plan.to_dict()))


def _standardized(train: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    standardize = Standardizer.fit(train)
    return tuple(standardize(values).clamp(-TARGET_LIMIT, TARGET_LIMIT) for values in (train, *others))


def _behavior_targets(
    parts: dict[str, ZooMatrix], layout, images: torch.Tensor, components: int, seed: int
) -> list[torch.Tensor]:
    """Label-free behaviour of every checkpoint: summary numbers, and the main components of its answers."""
    chosen = images[torch.from_numpy(np.random.default_rng(0).permutation(len(images))[:TARGET_IMAGES])]
    logits = [zoo_logits(part.architecture, part.configs, part.flat, layout, chosen) for part in parts.values()]
    answers = [part.softmax(dim=-1).flatten(1) for part in logits]
    mean = answers[0].mean(dim=0)
    torch.manual_seed(seed)  # the randomised decomposition draws, and after it the model's initial weights
    basis = torch.pca_lowrank(answers[0] - mean, q=components + 4, center=False)[2][:, :components]
    return [
        torch.cat([behavior_statistics(part), (answer - mean) @ basis], dim=1)
        for part, answer in zip(logits, answers, strict=True)
    ]
