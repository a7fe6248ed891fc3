"""What travels with a checkpoint is enough: it loads, computes and is saved again where this package is not."""

import json

import pytest
import torch

from sane_hf.modeling.modeling_sane import SaneForPreTraining, SaneModel

CLASSES = {
    "AutoConfig": "configuration_sane.SaneConfig",
    "AutoModel": "modeling_sane.SaneModel",
    "AutoModelForPreTraining": "modeling_sane.SaneForPreTraining",
}
TOKENIZER = "tokenization_sane.WeightTokenizer"


def code(folder):
    return {file.name: file.read_text() for file in folder.glob("*.py")}


@pytest.fixture(scope="session")
def travelling(root):
    """Exactly `modeling/`, flat."""
    files = code(root / "modeling")
    del files["__init__.py"]
    return files


@pytest.mark.parametrize("model_class", [SaneModel, SaneForPreTraining])
def test_all_code_is_saved_whichever_class_is(model_class, checkpoint, travelling, tmp_path):
    model = model_class(checkpoint.model.config)
    model.save_pretrained(tmp_path)
    assert code(tmp_path) == travelling
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == CLASSES
    assert config["custom_pipelines"]["weight-feature-extraction"]["impl"].partition(".")[0] + ".py" in travelling


def test_the_remote_classes_are_those_of_the_folder(remote):
    for label in ("first", "again"):
        assert len(remote.seen[label]) == 5
        for auto_class, found in remote.seen[label].items():
            assert found.startswith("transformers_modules.")
            assert found.endswith(CLASSES.get(auto_class, TOKENIZER))


@torch.no_grad()
def test_the_remote_latents_are_ours(checkpoint, remote):
    expected = checkpoint.model(**checkpoint.tokenizer(checkpoint.networks)).latents
    for label in ("first", "again"):
        for auto_class in ("AutoModel", "AutoModelForPreTraining"):
            assert torch.equal(remote.tensors[f"{label}.{auto_class}"], expected)


def test_saving_again_from_there_keeps_everything(checkpoint, remote, travelling):
    def config(folder):
        return json.loads((folder / "config.json").read_text())

    def tokenizer(folder):
        return json.loads((folder / "tokenizer_config.json").read_text())

    first = checkpoint.folder
    for label in ("again", "base", "config", "pipeline"):
        folder = remote.folder / label
        assert code(folder) == travelling, label
        assert config(folder)["auto_map"] == CLASSES
        assert config(folder)["custom_pipelines"] == config(first)["custom_pipelines"]
    assert config(remote.folder / "again") == config(first)
    for label in ("again", "tokenizer", "pipeline"):
        assert tokenizer(remote.folder / label) == tokenizer(first)
    assert set(code(remote.folder / "tokenizer")) < set(travelling), "of itself, only what it needs"
    weights = (first / "model.safetensors").read_bytes()
    assert (remote.folder / "again" / "model.safetensors").read_bytes() == weights
