"""Training: recipes, views, self-supervised targets, the behavioural loss, and the run itself."""

from .arguments import BehaviorArguments, Recipe, ViewArguments, load_recipe
from .behavior import BehaviorLoss
from .run import main, train
from .trainer import SaneTrainer
from .windows import ZooWindows, collate

__all__ = [
    "BehaviorArguments",
    "BehaviorLoss",
    "Recipe",
    "SaneTrainer",
    "ViewArguments",
    "ZooWindows",
    "collate",
    "load_recipe",
    "main",
    "train",
]
