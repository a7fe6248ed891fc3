"""transformers' Trainer, plus what SANE needs and it lacks: the behavioural loss, the parts of the loss in the log."""

from __future__ import annotations

from collections import defaultdict

import torch
from transformers import Trainer, TrainerCallback

from .arguments import BehaviorArguments
from .behavior import BehaviorLoss


class _EpochOfViews(TrainerCallback):
    """Tells the data of the epoch, which a data loader that skips to the middle of one, or shards, does not."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


LOGGED = ("loss_reconstruction", "loss_contrast", "loss_statistics", "r2")


class SaneTrainer(Trainer):
    """Trainer of `SaneForPreTraining` on `ZooWindows`.

    Args:
        behavior_loss: the behavioural loss, or none.
        behavior: its weight, start and latent noise.
        **kwargs: as for `Trainer`.
    """

    def __init__(
        self, *args, behavior_loss: BehaviorLoss | None = None, behavior: BehaviorArguments | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.add_callback(_EpochOfViews())
        self.behavior_loss, self.behavior = behavior_loss, behavior or BehaviorArguments()
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss, and in training the behavioural loss once it has set in."""
        index = inputs.pop("index")
        outputs = model(**inputs)
        loss = outputs.loss.mean()  # one number for each GPU under DataParallel
        if model.training and self._behavior_active():
            divergence = self._divergence(model, inputs, outputs, index)
            loss = loss + self.behavior.weight * divergence
            self._parts["loss_behavior"].append(divergence.detach())
        prefix = "" if model.training else "eval_"
        for name in LOGGED:
            if outputs.get(name) is not None:
                self._parts[prefix + name].append(outputs[name].detach().mean())
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}, checkpoints {index.tolist()[:8]}...: "
                "lower trainer.learning_rate or leave the rows out; the last saved checkpoint is untouched"
            )
        return (loss, outputs) if return_outputs else loss

    def _behavior_active(self) -> bool:
        started = self.state.global_step >= self.behavior.start * self.state.max_steps
        return self.behavior_loss is not None and self.behavior.weight > 0 and started

    def _divergence(self, model, inputs, outputs, index) -> torch.Tensor:
        """Divergence of decoded networks: half of them as they are, half from noised latents.

        The noised half, each at a level of its own, trains the decoder alone: through the encoder, what cannot be
        undone would crowd out what makes latents predict.
        """
        sane = self.accelerator.unwrap_model(model).sane
        rows = torch.arange(min(self.behavior.networks, len(index)), device=outputs.latents.device)
        latents = outputs.latents[rows]
        level = torch.rand(len(rows), 1, 1, device=rows.device) * self.behavior.latent_noise
        noise = level * outputs.latents.detach().std(dim=0) * torch.randn_like(latents)
        noised = torch.where(rows[:, None, None] % 2 == 1, latents.detach() + noise, latents)
        decoded = sane.decode(noised, inputs["positions"][rows])
        return self.behavior_loss(decoded, inputs["labels"][rows], index[rows], self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages of the loss's parts since the last log."""
        evaluating = any(name.startswith("eval_") for name in logs)
        for name in [name for name in self._parts if name.startswith("eval_") == evaluating]:
            logs[name] = torch.stack(self._parts.pop(name)).mean().item()
        super().log(logs, start_time)
