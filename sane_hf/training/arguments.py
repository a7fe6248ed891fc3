"""What a recipe may say: one YAML file holds a whole run (zoo, tokenizer, model, views, behavior, trainer)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SECTIONS = ("tokenizer", "model", "views", "behavior", "trainer")


@dataclass
class ViewArguments:
    """How a checkpoint is varied each time it is read. Nothing of it is written to disk.

    Attributes:
        permuted: share of every batch that is read in a fresh random permutation of its hidden units; the rest is read
            as aligned to the zoo's reference. Every sample draws its own permutation.
        noise: standard deviation of multiplicative Gaussian noise on the (standardised) tokens of the encoder's input.
        window: tokens per window; none reads whole networks. Every sample draws its own window.
        second_view: read every checkpoint twice, canonical and permuted, for the contrastive loss.
    """

    permuted: float = 0.5
    noise: float = 0.1
    window: int | None = None
    second_view: bool = False

    def __post_init__(self):
        if not 0 <= self.permuted <= 1:
            raise ValueError(f"views.permuted={self.permuted} must be a share between 0 and 1")
        if self.noise < 0:
            raise ValueError(f"views.noise={self.noise} must not be negative")
        if self.window is not None and self.window < 1:
            raise ValueError(f"views.window={self.window} must be at least 1 token, or absent for whole networks")


@dataclass
class BehaviorArguments:
    """Losses that look at what networks do. Off by default; they need the zoo's images, never labels.

    Attributes:
        images: name of the image dataset that queries are drawn from; none switches everything here off.
        targets: teach the statistics head label-free behaviour (entropy, confidence, scale, output components).
        components: number of output components among those targets.
        weight: weight of the behavioural loss, the Kullback-Leibler divergence in nats between what the original and
            the decoded network answer; 0 switches it off.
        start: share of the training after which the behavioural loss sets in.
        networks: networks of each batch that it looks at, from the first; permuted ones stand last.
        queries: images per step.
        latent_noise: largest noise on the latents of half of them before decoding, in units of the latents' standard
            deviation over the batch; each draws its own level below that.
    """

    images: str | None = None
    targets: bool = True
    components: int = 12
    weight: float = 0.0
    start: float = 0.5
    networks: int = 32
    queries: int = 32
    latent_noise: float = 0.0

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"behavior.weight={self.weight} must not be negative")
        if not 0 <= self.start <= 1:
            raise ValueError(f"behavior.start={self.start} must be a share of the training between 0 and 1")
        if self.weight and self.images is None:
            raise ValueError(f"behavior.weight={self.weight} needs behavior.images: name the zoo's image dataset")


@dataclass
class Recipe:
    """A whole training run.

    Attributes:
        zoo: folder or Hub id of the zoo.
        output_dir: where model, tokenizer and checkpoints go.
        seed: seed of initial weights, order, views.
        split_seed: deals the models to train, validation and test anew; none keeps the zoo's own splits.
        tokenizer: arguments of `WeightTokenizer`.
        model: arguments of `SaneConfig`; sizes that follow from the zoo (token_size, max_positions, head sizes) may be
            left out.
        views: see `ViewArguments`.
        behavior: see `BehaviorArguments`.
        trainer: arguments of transformers' `TrainingArguments`.
    """

    zoo: str
    output_dir: str
    seed: int = 0
    split_seed: int | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    views: ViewArguments = field(default_factory=ViewArguments)
    behavior: BehaviorArguments = field(default_factory=BehaviorArguments)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        gamma = self.model.get("gamma", 0.0)
        if gamma > 0 and not self.views.second_view:
            raise ValueError(f"model.gamma={gamma} asks for contrast between two views: set views.second_view: true")
        if self.views.second_view and gamma == 0:
            raise ValueError("views.second_view=true doubles the work for a contrast that model.gamma=0 switches off")
        if self.behavior.weight and self.views.window is not None:
            raise ValueError(
                f"behavior.weight={self.behavior.weight} runs whole networks, but views.window={self.views.window} "
                "cuts them: leave the window out, or set behavior.weight: 0"
            )
        for name in ("output_dir", "seed"):
            if name in self.trainer:
                raise ValueError(f"trainer.{name} is given at the top of a recipe: write `{name}:` there instead")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the YAML file."""
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: YAML file.
        overrides: values by dotted name, such as `{"trainer.max_steps": 20, "zoo": "org/zoo"}`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a name that no recipe has, or values that contradict each other.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "recipe.yaml"
        >>> _ = file.write_text("zoo: zoos/a\\noutput_dir: runs/a\\ntrainer:\\n  max_steps: 100\\n")
        >>> load_recipe(file, {"trainer.max_steps": 20, "views.noise": 0.0}).trainer
        {'max_steps': 20}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; the packaged ones lie in recipes/")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe is a mapping, found {type(content).__name__}")
    content |= {name: content.get(name) or {} for name in SECTIONS}
    for name, value in (overrides or {}).items():
        *parents, last = name.split(".")
        target = content
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"--{name}: {parent} is a value in {path}, not a section")
        target[last] = value
    for name in SECTIONS:
        if not isinstance(content[name], dict):
            raise ValueError(f"{path}: {name} is a section of settings, found {content[name]!r}")
    sections = {"views": ViewArguments, "behavior": BehaviorArguments}
    for section, cls in sections.items():
        content[section] = _build(cls, content[section], f"{path}: {section}.")
    return _build(Recipe, content, f"{path}: ")


def _build(cls: type, values: dict[str, Any], where: str):
    known = [f.name for f in dataclasses.fields(cls)]
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where}{unknown[0]} is not known; known are {', '.join(known)}")
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{where}{missing[0]} is missing")
    return cls(**values)
