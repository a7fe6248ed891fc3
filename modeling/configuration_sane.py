"""Configuration of SANE (Schürholt, Mahoney, Borth: Towards Scalable and Versatile Weight Space Learning, 2024)."""

from copy import deepcopy
from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

if TYPE_CHECKING:
    # Never run, but read: `save_pretrained` copies the files that imports of this form lead to, so that all of the
    # code travels whichever class is saved, and again when what was loaded from there is saved.
    from .modeling_sane import SaneModel  # noqa: F401
    from .pipeline_sane import WeightFeatureExtractionPipeline  # noqa: F401
    from .tokenization_sane import WeightTokenizer  # noqa: F401

# Remote users load every class from the same files, whichever class was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_sane.SaneConfig",
    "AutoModel": "modeling_sane.SaneModel",
    "AutoModelForPreTraining": "modeling_sane.SaneForPreTraining",
}
CUSTOM_PIPELINES = {
    "weight-feature-extraction": {
        "impl": "pipeline_sane.WeightFeatureExtractionPipeline",
        "pt": ["AutoModel"],
    }
}


@strict
class SaneConfig(PreTrainedConfig):
    r"""Sizes and losses of a SANE model. The defaults are a small model that trains on a laptop.

    Args:
        token_size (`int`): weights per token, D. Rows shorter than that are zero-padded by the tokenizer.
        latent_size (`int`): numbers per token in the latent sequence, Z.
        latents_per_weight (`float`, *optional*): the latent budget. A token with n real weights keeps its first
            `ceil(latents_per_weight * n)` latent dimensions (at most Z), the rest are zero, so that padding costs no
            latent. `None` keeps all Z dimensions of every token (the paper).
        nested_latents (`list[float]`): fractions of the budget to which a part of every training batch is cut, so that
            the first dimensions carry the most and one model serves several compressions. Empty: off (the paper).
        hidden_size (`int`): width of both transformers.
        num_hidden_layers (`int`): layers of the encoder.
        num_decoder_layers (`int`): layers of the decoder.
        num_attention_heads (`int`): attention heads in every layer.
        intermediate_size (`int`): width inside the feed-forward blocks.
        hidden_act (`str`): activation inside the feed-forward blocks.
        dropout (`float`): dropout after embeddings, attention and feed-forward blocks.
        layer_norm_eps (`float`): epsilon of the layer norms (which have no bias, as in the original).
        initializer_range (`float`): standard deviation of the initial weights.
        max_positions (`list[int]`): rows of the two or three learned position tables: index in the sequence, layer,
            token in the layer (paper, section 3.1).
        projection_size (`int`): width of the projection head under the contrastive loss.
        layer_path (`bool`): a linear map of its own for every layer from token to latent, and from latent to token,
            beside the transformers.
        token_statistics (`bool`): give the encoder as further inputs the magnitude of every weight and five statistics
            of every token and of its layer (mean, log standard deviation, mean magnitude, extremes).
        statistics_size (`int`): numbers per layer that the statistics head predicts from pooled latents; 0: no head.
        behavior_size (`int`): label-free numbers per network that the statistics head predicts; 0: none.
        gamma (`float`): share of the contrastive loss, `gamma * contrast + (1 - gamma) * reconstruction` (eq. 4).
        temperature (`float`): temperature of NT-Xent.
        statistics_weight (`float`): weight of the statistics head's loss.
        original_parity (`bool`): compute what the original code computes, for checkpoints converted from it: the
            reconstruction loss is the mean over *all* entries, padding included, against the input views, and the
            projection head reads the flattened window of exactly `window_size` tokens. Nothing else is covered.
        window_size (`int`, *optional*): tokens per window; only bound to the model when `original_parity` is set.

    Example:
        >>> config = SaneConfig(token_size=64, latent_size=32, hidden_size=64, num_attention_heads=2)
        >>> config.latents_per_weight is None
        True
    """

    model_type = "sane"

    token_size: int = 64
    latent_size: int = 64
    latents_per_weight: float | int | None = None
    nested_latents: list | tuple = ()
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_decoder_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    dropout: float | int = 0.0
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    max_positions: list | tuple = (256, 32, 64)
    projection_size: int = 30
    layer_path: bool = False
    token_statistics: bool = False
    statistics_size: int = 0
    behavior_size: int = 0
    gamma: float | int = 0.05
    temperature: float | int = 0.1
    statistics_weight: float | int = 0.0
    original_parity: bool = False
    window_size: int | None = None

    _auto_class = "AutoConfig"  # saves the code beside every configuration

    def __post_init__(self, **kwargs):
        # An installed package has registered the pipeline; transformers would still ask for trust_remote_code if the
        # configuration named one, so only configurations that came with their code do.
        remote = type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)
        kwargs["custom_pipelines"] = deepcopy(CUSTOM_PIPELINES) if remote else {}
        kwargs["auto_map"] = {**kwargs.get("auto_map", {}), **AUTO_MAP}
        super().__post_init__(**kwargs)

    def to_dict(self):
        """All fields as plain data, with the names under which the code beside them is loaded."""
        # transformers replaces the class names in custom_pipelines by classes, which JSON does not know
        return {**super().to_dict(), "custom_pipelines": deepcopy(CUSTOM_PIPELINES)}

    def validate_sizes(self):
        """Refuse sizes that no model can have, naming the field."""
        least = {
            **dict.fromkeys(("token_size", "latent_size", "hidden_size", "intermediate_size", "projection_size"), 1),
            **dict.fromkeys(("num_hidden_layers", "num_decoder_layers", "num_attention_heads"), 1),
            **dict.fromkeys(("statistics_size", "behavior_size"), 0),
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {smallest}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if len(self.max_positions) not in (2, 3) or min(self.max_positions) < 1:
            raise ValueError(f"max_positions={self.max_positions}: two or three positive table sizes are needed")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} must be even: the position tables fill half of it each")
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"window_size={self.window_size} must be at least 1, or None")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is no activation of transformers, such as 'gelu'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    def validate_losses(self):
        """Refuse loss settings that contradict each other, naming the field."""
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma} must lie between 0 (reconstruction only) and 1 (contrast only)")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if self.latents_per_weight is not None and self.latents_per_weight <= 0:
            raise ValueError(f"latents_per_weight={self.latents_per_weight} must be positive, or None for no budget")
        if any(not 0 < fraction <= 1 for fraction in self.nested_latents):
            raise ValueError(f"nested_latents={self.nested_latents}: fractions of the budget lie in (0, 1]")
        if self.nested_latents and self.latents_per_weight is None:
            raise ValueError(
                "nested_latents cuts the budget latents_per_weight, which is None: set it, for example to 1.0"
            )
        if self.statistics_weight and not (self.statistics_size or self.behavior_size):
            raise ValueError(
                f"statistics_weight={self.statistics_weight} needs a head: set statistics_size or behavior_size"
            )
        if self.original_parity and self.window_size is None:
            raise ValueError("original_parity=True needs window_size: the original's projection head is bound to it")


__all__ = ["SaneConfig"]
