"""Representations of neural network weights: embed networks, predict their properties, make new ones.

Importing the package registers SANE with transformers, so that `AutoConfig`, `AutoModel`, `AutoModelForPreTraining`
and `AutoTokenizer` load its checkpoints without `trust_remote_code`. `sane_hf.embed` is loaded when first used.
Everything else is imported from the room where it lives, such as `sane_hf.checkpoints`.

Example:
    >>> import sane_hf
    >>> from transformers import AutoConfig
    >>> AutoConfig.for_model("sane").__class__.__name__
    'SaneConfig'
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from sane_hf.modeling import SaneConfig, SaneForPreTraining, SaneModel, WeightTokenizer

__version__ = "0.1.0"

__all__ = ["SaneConfig", "SaneForPreTraining", "SaneModel", "WeightTokenizer", "__version__", "embed"]

# exist_ok: reloading the package, as notebooks do, must not fail.
AutoConfig.register("sane", SaneConfig, exist_ok=True)
AutoModel.register(SaneConfig, SaneModel, exist_ok=True)
AutoModelForPreTraining.register(SaneConfig, SaneForPreTraining, exist_ok=True)
AutoTokenizer.register(SaneConfig, WeightTokenizer, exist_ok=True)
# By name, as transformers keeps its own: the class, and with it alignment, is imported when a pipeline is made.
PIPELINE_REGISTRY.supported_tasks["weight-feature-extraction"] = {
    "impl": "sane_hf.pipelines.WeightFeatureExtractionPipeline",
    "pt": (AutoModel,),
    "type": "multimodal",
}


def __getattr__(name: str) -> Any:
    if name == "embed":
        from sane_hf.analysis.embed import embed

        return embed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
