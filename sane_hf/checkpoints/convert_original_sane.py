"""Turn a checkpoint of the original SANE code (https://github.com/HSG-AIML/SANE) into ours.

    python -m sane_hf.checkpoints.convert_original_sane FOLDER OUT

The original keeps its settings in `params.json`, keyed `ae:...` and `training::...`, and in `state.pt` a dict whose
entry `model` is the state dict of the autoencoder, beside those of optimiser and schedule.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from sane_hf.modeling.configuration_sane import SaneConfig
from sane_hf.modeling.modeling_sane import SaneForPreTraining

from .atomic import atomic_directory
from .errors import CheckpointError, quote, quote_all
from .reading import load_checkpoint

logger = logging.getLogger(__name__)

# Defaults of the original's AE.
_AE_DEFAULTS = {
    "ae:transformer_type": "pytorch",
    "ae:i_dim": 201,
    "ae:d_model": 512,
    "ae:nhead": 8,
    "ae:num_layers": 6,
    "ae:lat_dim": 16,
    "ae:dropout": 0.0,
    "ae:max_positions": None,
    "training::windowsize": 16,
    "training::gamma": 0.5,
    "training::temperature": 0.1,
}
# Settings whose losses are not ours. They have no part in what the weights compute.
_LEFT_OUT = {
    "training::contrast": ("simclr", "'positive' pushes views apart, and any other name switches contrast off"),
    "training::z_var_penalty": (0.0, "a penalty on the spread of projections"),
    "training::z_norm_penalty": (0.0, "a penalty on the norm of projections"),
    "training::reduction": ("mean", "a sum instead of a mean over the batch"),
}
_PROJECTION_SIZE = 30  # fixed in the original

# Modules of the original and ours, those of one transformer layer apart.
_MODULES = {
    "tokenizer": "sane.token_embed",
    "encoder_comp": "sane.latent_proj",
    "decoder_comp": "sane.latent_embed",
    "detokenizer": "sane.token_proj",
    **{f"pe.pe{part + 1}": f"sane.positions.tables.{part}" for part in range(3)},
    **{f"projection_head.head.{index}": f"projection.{index}" for index in (0, 1, 3, 4)},
}
_LAYER_MODULES = {
    "ln_1": "norm1",
    "attn.c_attn": "attention.qkv_proj",
    "attn.c_proj": "attention.o_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_original_sane(
    folder: str | os.PathLike[str], output_dir: str | os.PathLike[str] | None = None
) -> SaneForPreTraining:
    """Read a checkpoint of the original SANE code as a model of ours.

    The result has `original_parity=True`: its reconstruction loss is the mean over all entries, padding included, and
    its projection head reads windows of exactly `window_size` tokens. Latents, reconstructions, projections and losses
    are the original's to 1e-5. The reported R² is not: it leaves padding out, which the original scores as explained.

    Tokens have to be made as the original made them, `WeightTokenizer(token_size=config.token_size,
    normalization="standardize")` fitted on the networks that it was trained on; the checkpoint does not hold their
    statistics.

    Args:
        folder: Folder with `state.pt`, and with `params.json` in it or in the folder above, where ray puts it. The
            pickle is read with `weights_only=True`.
        output_dir: Where to save the model as well; a new or empty folder.

    Returns:
        The model, in evaluation mode, float32.

    Raises:
        CheckpointError: E_MISSING (no such file), E_JSON, E_PARAMETER (a setting that is missing, unknown, or that no
            model can have), E_DEFECTIVE (`ae:transformer_type` "pytorch"), E_NAME (a tensor that is missing or
            unknown), E_SHAPE (tensors of other sizes than the settings say), E_EXISTS (`output_dir` is not empty), and
            those of `load_checkpoint`.
    """
    folder = Path(folder)
    output_dir = None if output_dir is None else Path(output_dir)
    if output_dir is not None and output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        fix = "name another one, or move away what is there"
        raise CheckpointError("E_EXISTS", output_dir, None, "something is there already", "a new or empty folder", fix)
    parameters_file = _find(folder, "params.json", "params.json")
    state_file = _find(folder, "state.pt")
    config = _config(_read_parameters(parameters_file), parameters_file)
    found = load_checkpoint(state_file, allow_pickle=True, entry="model")
    model = SaneForPreTraining(config).eval()
    names = _original_names(model)
    _check(found, {names[ours]: tensor for ours, tensor in model.state_dict().items()}, state_file)
    model.load_state_dict({ours: found[original] for ours, original in names.items()})
    if output_dir is not None:
        with atomic_directory(output_dir) as temporary:
            model.save_pretrained(temporary)
    return model


def _find(folder: Path, name: str, above: str | None = None) -> Path:
    places = [folder / name] + ([folder.resolve().parent / above] if above else [])
    for place in places:
        if place.is_file():
            return place
    fix = "name the folder that the original's save_model wrote, such as checkpoint_000050"
    found = f"no {name} in it" + (" or in the folder above" if above else "")
    raise CheckpointError("E_MISSING", folder, None, found, "params.json and state.pt", fix)


def _read_parameters(path: Path) -> dict[str, Any]:
    try:
        parameters = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError("E_JSON", path, None, str(error), "JSON", "copy the file again") from error
    if not isinstance(parameters, dict):
        raise CheckpointError("E_JSON", path, None, f"a {type(parameters).__name__}", "an object of settings", "")
    return parameters


def _config(parameters: Mapping[str, Any], path: Path) -> SaneConfig:
    unknown = [name for name in parameters if name.startswith("ae:") and name not in _AE_DEFAULTS]
    if unknown:
        fix = "this is a later variant of the code; only the architecture of the ICML 2024 release is known here"
        raise CheckpointError("E_PARAMETER", path, None, quote_all(unknown), quote_all(_AE_DEFAULTS), fix)
    settings = {name: parameters.get(name, default) for name, default in _AE_DEFAULTS.items()}
    if settings["ae:transformer_type"] != "gpt2":
        said = "" if "ae:transformer_type" in parameters else " (the default where it is not set)"
        raise CheckpointError(
            *(
                "E_DEFECTIVE",
                path,
                None,
                f"ae:transformer_type {quote(settings['ae:transformer_type'])}{said}",
                "'gpt2'",
            ),
            "in the type 'pytorch' attention mixes the networks of a batch instead of the tokens of a network, so its "
            "latents depend on what else is in the batch: train anew with 'gpt2', or with sane-hf",
        )
    for name, (kept, meaning) in _LEFT_OUT.items():
        if parameters.get(name, kept) != kept:
            logger.warning("%s: %s=%r is not carried over: %s", path, name, parameters[name], meaning)
    positions = settings["ae:max_positions"] or [48, settings["ae:d_model"]]
    try:
        return SaneConfig(
            token_size=settings["ae:i_dim"],
            latent_size=settings["ae:lat_dim"],
            hidden_size=settings["ae:d_model"],
            num_hidden_layers=settings["ae:num_layers"],
            num_decoder_layers=settings["ae:num_layers"],
            num_attention_heads=settings["ae:nhead"],
            intermediate_size=4 * settings["ae:d_model"],
            dropout=settings["ae:dropout"],
            max_positions=positions,
            projection_size=_PROJECTION_SIZE,
            gamma=settings["training::gamma"],
            temperature=settings["training::temperature"],
            original_parity=True,
            window_size=settings["training::windowsize"],
        )
    except (StrictDataclassError, TypeError) as error:
        found = " ".join(str(error).split())
        raise CheckpointError("E_PARAMETER", path, None, found, "settings that a model can have", "") from error


def _original_names(model: SaneForPreTraining) -> dict[str, str]:
    """The original's name of every tensor of a model."""
    modules = dict(_MODULES)
    for part in ("encoder", "decoder"):
        for layer in range(model.config.num_hidden_layers):
            for original, ours in _LAYER_MODULES.items():
                modules[f"transformer_{part}.transformer.{layer}.{original}"] = f"sane.{part}.{layer}.{ours}"
    originals = {ours: original for original, ours in modules.items()}
    return {name: f"{originals[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in model.state_dict()}


def _check(found: Mapping[str, torch.Tensor], needed: Mapping[str, torch.Tensor], path: Path) -> None:
    fix = "give the params.json with which this state.pt was trained; only the ICML 2024 release is known here"
    if unknown := [name for name in found if name not in needed]:
        what = f"one of {len(unknown)} tensors that the settings have no place for"
        raise CheckpointError("E_NAME", path, unknown[0], what, "", fix)
    if missing := [name for name in needed if name not in found]:
        what = f"one of {len(missing)} tensors that are missing"
        raise CheckpointError("E_NAME", path, missing[0], what, "", fix)
    for name, tensor in needed.items():
        if found[name].shape != tensor.shape:
            shapes = (f"shape {list(found[name].shape)}", f"{list(tensor.shape)} by the settings")
            raise CheckpointError("E_SHAPE", path, name, *shapes, fix)


def main(arguments: list[str] | None = None) -> None:
    """Command line: convert a folder, or say in one line why that cannot be.

    Args:
        arguments: Those of the command line if not given.
    """
    parser = argparse.ArgumentParser(prog="convert_original_sane", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder with state.pt, and params.json there or in the folder above")
    parser.add_argument("out", help="new folder for the converted model")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        model = convert_original_sane(options.folder, options.out)
    except CheckpointError as error:
        raise SystemExit(str(error)) from None
    logger.info("%s: %s weights converted to %s", options.folder, f"{model.num_parameters():,}", options.out)


if __name__ == "__main__":
    main()
