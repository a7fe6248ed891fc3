"""SANE: a transformer autoencoder over sequences of weight tokens (Schürholt, Mahoney, Borth, ICML 2024)."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks_sane import (
    WEIGHT_STATISTICS,
    LayerPath,
    ResidualLinear,
    SaneAttention,
    SaneLayer,
    SanePositions,
    default_positions,
    layer_means,
    real_weights,
    token_weight,
    weight_statistics,
)
from .configuration_sane import SaneConfig
from .losses_sane import explained_variance, masked_mse, nt_xent


@dataclass
class SaneModelOutput(ModelOutput):
    """Output of `SaneModel`.

    Attributes:
        latents: (B, T, Z), the latent sequence; rows of padded tokens are zero.
        pooler_output: (B, Z), mean of the latents over real tokens, the paper's embedding of a network.
        last_hidden_state: (B, T, H), output of the last encoder layer.
        hidden_states: outputs of all encoder layers, on request.
        attentions: attention weights of all encoder layers, on request (eager attention).
    """

    latents: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class SaneForPreTrainingOutput(ModelOutput):
    """Output of `SaneForPreTraining`. Scalars are means over the batch.

    Attributes:
        loss: sum of the weighted parts, where there is something to compare with.
        reconstruction: (B, T, D), decoded tokens.
        latents: (B, T, Z).
        projection: (B, P), input of the contrastive loss.
        loss_reconstruction: scalar, mean squared error over real weights.
        loss_contrast: scalar, NT-Xent (only with a second view).
        loss_statistics: scalar, mean squared error of the statistics head (only with targets).
        r2: scalar, explained variance over real weights.
        hidden_states: outputs of all encoder layers, on request.
        attentions: attention weights of all encoder layers, on request (eager attention).
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    projection: torch.Tensor | None = None
    loss_reconstruction: torch.Tensor | None = None
    loss_contrast: torch.Tensor | None = None
    loss_statistics: torch.Tensor | None = None
    r2: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SanePreTrainedModel(PreTrainedModel):
    config: SaneConfig
    base_model_prefix = "sane"
    main_input_name = "tokens"
    input_modalities = []
    supports_gradient_checkpointing = True
    # losses are means over a batch: the Trainer has to divide them by its gradient accumulation steps itself
    accepts_loss_kwargs = False
    _no_split_modules = ["SaneLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SaneLayer, "attentions": SaneAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LayerPath):
            start = torch.randn_like(module.weight) * self.config.initializer_range
            if module.identity:
                start += torch.eye(*module.weight.shape[1:], device=start.device)
            init.copy_(module.weight, start)
            init.zeros_(module.bias)
        elif isinstance(module, ResidualLinear):
            depth = 2 * self.config.num_hidden_layers
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(depth))


class SaneModel(SanePreTrainedModel):
    """Encoder and decoder of SANE (paper, section 3.2).

    Example:
        >>> config = SaneConfig(token_size=8, latent_size=4, hidden_size=16, num_attention_heads=2)
        >>> model = SaneModel(config).eval()
        >>> positions = torch.zeros(2, 5, 3, dtype=torch.long)
        >>> mask = torch.ones(2, 5, 8, dtype=torch.bool)
        >>> latents = model.encode(torch.randn(2, 5, 8), mask, positions)
        >>> latents.shape, model.decode(latents, positions).shape
        (torch.Size([2, 5, 4]), torch.Size([2, 5, 8]))
    """

    _auto_class = "AutoModel"  # saves the code beside every model
    # the heads of SaneForPreTraining, from whose checkpoints this loads, too
    _keys_to_ignore_on_load_unexpected = [r"^(projection|statistics_head|behavior_head)\."]

    def __init__(self, config: SaneConfig):
        super().__init__(config)
        inputs = config.token_size
        if config.token_statistics:
            inputs += config.token_size + WEIGHT_STATISTICS
        self.token_embed = nn.Linear(inputs, config.hidden_size)
        self.positions = SanePositions(config)
        self.encoder = nn.ModuleList(SaneLayer(config) for _ in range(config.num_hidden_layers))
        self.latent_proj = nn.Linear(config.hidden_size, config.latent_size)
        self.latent_embed = nn.Linear(config.latent_size, config.hidden_size)
        self.decoder = nn.ModuleList(SaneLayer(config) for _ in range(config.num_decoder_layers))
        self.token_proj = nn.Linear(config.hidden_size, config.token_size)
        self.dropout = nn.Dropout(config.dropout)
        layers = config.max_positions[1]
        self.encoder_path = LayerPath(layers, inputs, config.latent_size, True) if config.layer_path else None
        self.decoder_path = (
            LayerPath(layers, config.latent_size, config.token_size, True) if config.layer_path else None
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SaneModelOutput:
        """Encode windows of weight tokens.

        Args:
            tokens: (B, T, D) float, weight tokens.
            mask: (B, T, D) bool, true where a weight is; all real if absent.
            positions: (B, T, 2 or 3) long; a sequence of one layer from index 0 if absent.
            attention_mask: (B, T) bool, false on padded tokens; all real if absent.
        """
        if positions is None:
            positions = default_positions(tokens, self.positions.sizes)
        mask = real_weights(tokens, mask, attention_mask)
        embedded = tokens
        if self.config.token_statistics:
            statistics = weight_statistics(tokens, mask, positions[..., 1], self.config.max_positions[1])
            embedded = torch.cat([tokens, (tokens * mask).abs(), statistics], dim=-1)
        hidden = self.dropout(self.token_embed(embedded) + self.positions(positions))
        bias = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        for layer in self.encoder:
            hidden = layer(hidden, bias, **kwargs)
        latents = self.latent_proj(hidden)
        if self.encoder_path is not None:
            latents = latents + self.encoder_path(embedded, positions[..., 1])
        if self.config.latents_per_weight is not None:
            latents = self.keep_latents(latents, mask, self.config.latents_per_weight)
        weight = token_weight(latents, attention_mask)
        latents = latents * weight[..., None]
        pooled = latents.sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)
        return SaneModelOutput(latents=latents, pooler_output=pooled, last_hidden_state=hidden)

    def encode(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latents (B, T, Z) of weight tokens; arguments as in `forward`."""
        return self(tokens, mask, positions, attention_mask, return_dict=True).latents

    def decode(
        self,
        latents: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode latents to weight tokens.

        Args:
            latents: (B, T, Z) float.
            positions: (B, T, 2 or 3) long, the positions that were encoded, or those of another architecture.
            attention_mask: (B, T) bool, false on padded tokens.

        Returns:
            (B, T, D) float; entries where the tokenizer pads mean nothing and are dropped when decoding to weights.
        """
        if positions is None:
            positions = default_positions(latents, self.positions.sizes)
        hidden = self.dropout(self.latent_embed(latents) + self.positions(positions))
        bias = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        for layer in self.decoder:
            hidden = layer(hidden, bias)
        tokens = self.token_proj(hidden)
        if self.decoder_path is not None:
            tokens = tokens + self.decoder_path(latents, positions[..., 1])
        return tokens

    @staticmethod
    def keep_latents(latents: torch.Tensor, mask: torch.Tensor, latents_per_weight: float | torch.Tensor):
        """Zero all but the first `ceil(latents_per_weight * n)` latents of every token of n real weights.

        Args:
            latents: (B, T, Z) float.
            mask: (B, T, D) bool, true where a weight is.
            latents_per_weight: float, or (B,) float for a budget of its own per sample.

        Returns:
            (B, T, Z) float.

        Example:
            >>> mask = torch.tensor([[[True, True, False], [True, False, False]]])
            >>> SaneModel.keep_latents(torch.ones(1, 2, 3), mask, 1.0)
            tensor([[[1., 1., 0.],
                     [1., 0., 0.]]])
        """
        budget = torch.as_tensor(latents_per_weight, device=latents.device, dtype=torch.float32).view(-1, 1)
        kept = (mask.sum(dim=-1) * budget).ceil()  # (B, T)
        return latents * (torch.arange(latents.shape[-1], device=latents.device) < kept[..., None])


class SaneForPreTraining(SanePreTrainedModel):
    """SANE with its training losses (paper, eqs. 2 to 4) and a self-supervised statistics head."""

    _auto_class = "AutoModelForPreTraining"

    def __init__(self, config: SaneConfig):
        super().__init__(config)
        self.sane = SaneModel(config)
        width = config.latent_size * (config.window_size if config.original_parity else 1)
        self.projection = nn.Sequential(
            nn.Linear(width, config.projection_size, bias=False),
            nn.LayerNorm(config.projection_size),
            nn.ReLU(),
            nn.Linear(config.projection_size, config.projection_size, bias=False),
            nn.LayerNorm(config.projection_size),
            nn.ReLU(),
        )
        layers = config.max_positions[1]
        self.statistics_head = (
            LayerPath(layers, 2 * config.latent_size, config.statistics_size, False)
            if config.statistics_size
            else None
        )
        self.behavior_head = (
            nn.Linear(layers * config.latent_size, config.behavior_size) if config.behavior_size else None
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        second_tokens: torch.Tensor | None = None,
        second_positions: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
        behavior: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SaneForPreTrainingOutput:
        """Reconstruct windows, and compute the losses for which targets are given.

        Args:
            tokens: (B, T, D) float, the (first) view.
            mask: (B, T, D) bool, true where a weight is; shared by both views.
            positions: (B, T, 2 or 3) long.
            attention_mask: (B, T) bool, false on padded tokens.
            labels: (B, T, D) or, with a second view, (2B, T, D) float: what to reconstruct; the views if absent.
            second_tokens: (B, T, D) float, a second view of the same networks, for the contrastive loss.
            second_positions: (B, T, 2 or 3) long; those of the first view if absent.
            statistics: (B, L, S) float, per-layer targets of the statistics head; NaN where a layer has none.
            behavior: (B, K) float, per-network targets of the statistics head.
            return_loss: compute losses.

        Raises:
            ValueError: the config asks for contrast alone (gamma = 1) and no second view is given; or, with
                `original_parity`, windows that are not of its `window_size`.
        """
        if self.config.original_parity and tokens.shape[1] != self.config.window_size:
            raise ValueError(
                f"windows have {tokens.shape[1]} tokens, but the projection head of an original checkpoint reads "
                f"window_size={self.config.window_size} of them: cut them so, or load the checkpoint as SaneModel"
            )
        if positions is None:
            positions = default_positions(tokens, self.sane.positions.sizes)
        mask = real_weights(tokens, mask, attention_mask)
        views = 1 if second_tokens is None else 2
        if views == 2:
            tokens = torch.cat([tokens, second_tokens])
            positions = torch.cat([positions, positions if second_positions is None else second_positions])
            mask = torch.cat([mask, mask])
            attention_mask = None if attention_mask is None else torch.cat([attention_mask, attention_mask])
        encoded = self.sane(tokens, mask, positions, attention_mask, return_dict=True, **kwargs)
        reconstruction = self.sane.decode(self._nested(encoded.latents, mask), positions, attention_mask)
        pooled = encoded.latents.flatten(1) if self.config.original_parity else encoded.pooler_output
        output = SaneForPreTrainingOutput(
            reconstruction=reconstruction,
            latents=encoded.latents,
            projection=self.projection(pooled),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        if return_loss:
            self._add_losses(output, tokens if labels is None else labels, mask, views)
            if statistics is not None or behavior is not None:
                self._add_statistics_loss(output, positions, attention_mask, statistics, behavior)
        return output

    def _nested(self, latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """In training, cut the latents of a random quarter of the batch to one of the nested budgets."""
        fractions = self.config.nested_latents
        if not (self.training and fractions):
            return latents
        choices = torch.tensor([1.0] * 3 * len(fractions) + list(fractions), device=latents.device)
        budget = choices[torch.randint(len(choices), latents.shape[:1], device=latents.device)]
        return self.sane.keep_latents(latents, mask, budget * self.config.latents_per_weight)

    def _add_losses(self, output: SaneForPreTrainingOutput, labels: torch.Tensor, mask: torch.Tensor, views: int):
        gamma = self.config.gamma
        if self.config.original_parity:
            # the original's mean runs over padding too
            output.loss_reconstruction = (output.reconstruction * mask - labels).square().mean()
        else:
            output.loss_reconstruction = masked_mse(output.reconstruction, labels, mask)
        output.r2 = explained_variance(output.reconstruction.detach(), labels, mask)
        if views == 2 and gamma > 0:
            first, second = output.projection.chunk(2)
            output.loss_contrast = nt_xent(first, second, self.config.temperature)
            output.loss = gamma * output.loss_contrast + (1 - gamma) * output.loss_reconstruction
        elif gamma == 1:
            raise ValueError("gamma=1 trains on contrast alone, which needs a second view: pass second_tokens")
        else:
            output.loss = output.loss_reconstruction

    def _add_statistics_loss(self, output, positions, attention_mask, statistics, behavior):
        """Add the statistics head's mean squared error on per-layer and per-network targets to the loss."""
        latents, weight = output.latents, token_weight(output.latents, attention_mask)
        means, count = layer_means(latents, positions[..., 1], weight, self.config.max_positions[1])  # (B, L, Z)
        views = latents.shape[0] // (statistics if statistics is not None else behavior).shape[0]
        parts = []
        if statistics is not None and self.statistics_head is not None:
            statistics = statistics.repeat(views, 1, 1)
            layers = torch.arange(statistics.shape[1], device=latents.device).expand(latents.shape[0], -1)
            pooled = torch.cat([means, means.mean(dim=1, keepdim=True).expand_as(means)], dim=-1)
            predicted = self.statistics_head(pooled[:, : statistics.shape[1]], layers)
            known = statistics.isfinite() & (count[:, : statistics.shape[1], None] > 0)
            parts.append(masked_mse(predicted, torch.where(known, statistics, 0.0), known))
        if behavior is not None and self.behavior_head is not None:
            predicted = self.behavior_head(means.flatten(1))
            parts.append(nn.functional.mse_loss(predicted, behavior.repeat(views, 1)))
        if parts:
            output.loss_statistics = torch.stack(parts).mean()
            output.loss = output.loss + self.config.statistics_weight * output.loss_statistics


__all__ = ["SaneForPreTraining", "SaneForPreTrainingOutput", "SaneModel", "SaneModelOutput", "SanePreTrainedModel"]
