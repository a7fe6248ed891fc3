"""Metadata, dependencies and the housed folders.

`modeling/`, `model_cards/` and `recipes/` lie beside `sane_hf/` in the checkout, where readers look for them, and are
installed inside it; relative links of the same names stand there for editors, type checkers and runs straight from the
checkout. All packages are named explicitly: a bare `find_packages()` would ship `modeling` and `tests` at top level.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Folder of the checkout -> package that it becomes.
HOUSED = {"modeling": "sane_hf.modeling", "model_cards": "sane_hf.model_cards", "recipes": "sane_hf.recipes"}

# Lower bounds, the app's apart, are the oldest releases that the tests ran with; upper bounds stand where a next major
# release is known to rename what we call.
BASE = [
    "torch>=2.13",
    "transformers>=5.23,<6",
    "datasets>=5.2,<6",
    "accelerate>=1.15,<2",
    "safetensors>=0.8",
    "huggingface-hub>=2.4,<3",
    "numpy>=2.0",
    "scipy>=1.13",  # linear assignment, the inner step of alignment
    "pyarrow>=24.0",  # zoos are Parquet
    "pyyaml>=6.0",  # recipes
    "jinja2>=3.1",  # a card is written beside every trained model
    "typer>=0.20",
    "rich>=13.8",
    "tqdm>=4.66.3",
]
ANALYSIS = ["scikit-learn>=1.7", "matplotlib>=3.9", "threadpoolctl>=3.5"]
APP = ["gradio>=6.16"]
DEV = [
    *ANALYSIS,
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pytest>=8.3",
    "ruff>=0.13",
    "setuptools>=77",
]


def version() -> str:
    """Read `__version__` from the package without importing it (and with it torch)."""
    text = (ROOT / "sane_hf" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


setup(
    name="sane-hf",
    version=version(),
    description="Representations of neural network weights: embed, predict, and generate networks with SANE",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords="weight space learning, model zoo, hyper-representations, SANE, transformers",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["sane_hf", "sane_hf.*"], exclude=[f"{name}*" for name in HOUSED.values()]),
        *HOUSED.values(),
    ],
    package_dir={"sane_hf": "sane_hf", **{package: folder for folder, package in HOUSED.items()}},
    package_data={
        "sane_hf": ["py.typed"],
        "sane_hf.model_cards": ["*.jinja", "*.md"],
        "sane_hf.recipes": ["*.yaml"],
    },
    py_modules=["sane_hf_cli"],
    install_requires=BASE,
    extras_require={"analysis": ANALYSIS, "app": APP, "dev": DEV},
    entry_points={"console_scripts": ["sane-hf = sane_hf_cli:main"]},
)
