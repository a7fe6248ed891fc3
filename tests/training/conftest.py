"""A zoo small enough to train in a second, real in everything else."""

import pytest
import yaml

from sane_hf.zoos.population import Population, train_population


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory):
    """Folder of a zoo of 12 networks at epochs 0 and 1."""
    folder = tmp_path_factory.mktemp("zoos") / "tiny"
    population = Population(name="tiny", architecture="cnn_small", images="digits", networks=12, epochs=1)
    train_population(folder, population, workers=1, progress=False)
    return folder


@pytest.fixture
def recipe(tiny_zoo, tmp_path):
    """Path of a recipe of six steps on the tiny zoo, with every loss switched on."""
    content = {
        "zoo": str(tiny_zoo),
        "output_dir": str(tmp_path / "run"),
        "tokenizer": {"token_size": 37, "rows": "equal", "normalization": "standardize"},
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_decoder_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "latents_per_weight": 1.0,
            "nested_latents": [0.5],
            "layer_path": True,
            "token_statistics": True,
            "statistics_weight": 0.3,
        },
        "views": {"permuted": 0.5, "noise": 0.1},
        "behavior": {
            "images": "digits",
            "components": 3,
            "weight": 0.3,
            "start": 0.5,
            "queries": 8,
            "latent_noise": 1.0,
        },
        "trainer": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "save_steps": 3,
            "logging_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
