"""A finished training run on a zoo small enough for a test, real in everything else."""

from __future__ import annotations

import pytest
import yaml

from sane_hf.reporting.subject import load_subject
from sane_hf.training import train
from sane_hf.zoos.population import Population, train_population


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Folder of a run of four steps on 30 networks at epochs 0, 1, 2, 5 and 6."""
    folder = tmp_path_factory.mktemp("reporting")
    train_population(folder / "zoo", Population("tiny", networks=30, epochs=6), workers=1, progress=False)
    recipe = {
        "zoo": str(folder / "zoo"),
        "output_dir": str(folder / "run"),
        "tokenizer": {"token_size": 37, "rows": "equal", "normalization": "standardize"},
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_decoder_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "latents_per_weight": 1.0,
            "layer_path": True,
        },
        "trainer": {"max_steps": 4, "logging_steps": 2, "report_to": "none", "disable_tqdm": True},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return train(folder / "recipe.yaml")


@pytest.fixture(scope="session")
def subject(finished_run):
    return load_subject(finished_run)
