"""What all tests share: no internet, one thread, fixed seeds, caches of their own, and the shared data if present."""

import os
import random
import shutil
import tempfile
from pathlib import Path

# Read by the Hugging Face libraries when they are imported, so set before anything imports them.
_CACHE = tempfile.mkdtemp(prefix="sane-hf-tests-")
os.environ.update(HF_HOME=_CACHE, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data too large for the repository: `shared/` beside the checkout, or wherever `SANE_HF_SHARED` points."""
    folder = Path(os.environ.get("SANE_HF_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set SANE_HF_SHARED to its folder")
    return folder
