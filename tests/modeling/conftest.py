"""A tiny trained-looking checkpoint, and what somebody sees who has transformers but not this package."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sane_hf.modeling.configuration_sane import SaneConfig
from sane_hf.modeling.modeling_sane import SaneForPreTraining
from sane_hf.modeling.tokenization_sane import WeightTokenizer

# Run with -I: no checkout, no current directory, no PYTHONPATH; an installed package is hidden as well.
REMOTE = """
import importlib.abc, json, logging, os, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("sane_hf", "modeling"):
            raise ModuleNotFoundError(f"{name} is hidden: what travels must not need it")

sys.meta_path.insert(0, Hidden())
folder, networks, out = sys.argv[1:]

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor, AutoTokenizer, pipeline

class Heard(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())

heard, seen, tensors = [], {}, {}
logging.getLogger().addHandler(Heard())
torch.set_num_threads(1)
names = sorted(os.listdir(networks))
state_dicts = [load_file(f"{networks}/{name}") for name in names]

def look(folder, label):
    seen[label] = {}
    for auto_class in (AutoConfig, AutoTokenizer, AutoProcessor, AutoModel, AutoModelForPreTraining):
        loaded = auto_class.from_pretrained(folder, trust_remote_code=True)
        seen[label][auto_class.__name__] = f"{type(loaded).__module__}.{type(loaded).__name__}"
        if auto_class is AutoTokenizer:
            tokenizer, batch = loaded, loaded(state_dicts)
        if auto_class in (AutoModel, AutoModelForPreTraining):
            with torch.no_grad():
                tensors[f"{label}.{auto_class.__name__}"] = loaded(**batch).latents
    return tokenizer, loaded

tokenizer, model = look(folder, "first")
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
for label, saved in (("again", model), ("base", base), ("config", model.config), ("tokenizer", tokenizer)):
    saved.save_pretrained(f"{out}/{label}")
tokenizer.save_pretrained(f"{out}/again")
look(f"{out}/again", "again")

embed = pipeline("weight-feature-extraction", model=folder, trust_remote_code=True, device="cpu")
seen["pipeline"] = f"{type(embed).__module__}.{type(embed).__name__}"
heard.clear()
tensors["mean"] = torch.stack(embed(state_dicts, batch_size=2))
tensors["paths"] = torch.stack(embed([f"{networks}/{name}" for name in names]))
tensors["layer_mean"] = torch.stack(embed(state_dicts, readout="layer_mean", window=4, halo=2, batch_size=3))
seen["warnings"] = list(heard)
embed.save_pretrained(f"{out}/pipeline")
again = pipeline(model=f"{out}/pipeline", trust_remote_code=True, device="cpu")  # the task is in the configuration
tensors["again"] = torch.stack(again(state_dicts))
save_file(tensors, f"{out}/tensors.safetensors")
json.dump(seen, open(f"{out}/seen.json", "w"))
"""


@dataclass
class Checkpoint:
    """A folder that `save_pretrained` filled, and what it was filled from."""

    folder: Path
    model: SaneForPreTraining
    tokenizer: WeightTokenizer
    networks: list[dict[str, torch.Tensor]]
    files: list[Path]


@dataclass
class Remote:
    """What the process without the package saw, computed and saved."""

    seen: dict
    tensors: dict[str, torch.Tensor]
    folder: Path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Checkpoint:
    """Saved as a user would: model and tokenizer, nothing else called before."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        networks = [
            torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).state_dict()
            for _ in range(5)
        ]
        config = SaneConfig(
            **{"token_size": 4, "latent_size": 3, "hidden_size": 16, "num_attention_heads": 2, "layer_path": True},
            **{"num_hidden_layers": 1, "num_decoder_layers": 1, "intermediate_size": 16, "max_positions": [32, 4, 8]},
        )
        model = SaneForPreTraining(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    tokenizer = WeightTokenizer(token_size=4, normalization="standardize").fit(networks)
    folder = tmp_path_factory.mktemp("hub") / "sane-tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = tmp_path_factory.mktemp("networks")
    files = [stored / f"network-{number}.safetensors" for number in range(len(networks))]
    for network, file in zip(networks, files, strict=True):
        save_file(network, file)
    return Checkpoint(folder, model, tokenizer, networks, files)


@pytest.fixture(scope="session")
def remote(checkpoint, tmp_path_factory) -> Remote:
    """One process for all checks of remote code, for it takes seconds to import transformers."""
    out = tmp_path_factory.mktemp("remote")
    cache = str(tmp_path_factory.mktemp("cache"))
    environment = {**os.environ, "HF_HOME": cache, "HF_MODULES_CACHE": f"{cache}/modules", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", REMOTE, str(checkpoint.folder), str(checkpoint.files[0].parent), str(out)]
    run = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    return Remote(json.loads((out / "seen.json").read_text()), load_file(out / "tensors.safetensors"), out)
