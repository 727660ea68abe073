"""All cells of a benchmark into one folder. A finished cell is not run again.

results.json    settings and cells, rewritten after every cell
results.md      the tables
*.png           curves of training, accuracy against length or depth
"""

import importlib.util
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from memzoo.training.bench.cell import Protocol, eval_tasks, run_cell
from memzoo.training.bench.mamba import fast_mamba
from memzoo.training.bench.models import build_config, count_parameters
from memzoo.training.bench.report import best, plot_results, write_tables
from memzoo.training.bench.specs import Spec
from memzoo.training.config import ConfigError
from memzoo.training.tasks import build_task
from memzoo.training.tasks.common import DepthTask

FORMAT = 1
RESULTS = "results.json"


def run_bench(
    tasks: list[Spec], models: list[Spec], seeds: list[int], protocol: Protocol, out: Path, write=tqdm.write
) -> dict[str, Any]:
    """Runs what `out` does not hold yet, then writes tables and pictures; returns what results.json holds.

    A folder can be given more tasks, models and seeds, never another protocol.

    Raises:
        ConfigError, ValueError: a task or a model cannot be built, or `out` holds results of another protocol. Nothing
            has been computed by then.
    """
    check_protocol(protocol)
    results = load_results(out, protocol)
    built = [(spec, build_task(spec.name, spec.overrides)) for spec in tasks]
    if protocol.eval_depths and not any(isinstance(task, DepthTask) for _, task in built):
        raise ConfigError(f"--eval-depths: {', '.join(map(str, tasks))} has no depth; add needle or leave it out")
    for spec, task in built:
        variants = eval_tasks(task, protocol)
        for model in models:
            config = build_config(model, task, protocol.parameters, max(variant.length for _, variant in variants))
            write(f"{spec}, {task.length} tokens: {model} has {count_parameters(config):,} parameters")
    rates = protocol.learning_rates
    num_cells = len(tasks) * len(models) * (len(seeds) + len(rates) - 1)
    steps_done = protocol.steps * sum(
        (cell["task"], cell["model"]) in {(str(t), str(m)) for t in tasks for m in models} and cell["seed"] in seeds
        for cell in results["cells"]
    )
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        fast_mamba(),
        tqdm(total=protocol.steps * num_cells, initial=steps_done) as bar,
    ):
        for spec, task in built:
            for model in models:
                for seed, rate in _plan(results, spec, model, seeds, rates, write):
                    cell = run_cell(task, model, seed, rate, protocol, scratch, bar)
                    identity = {"task": str(spec), "model": str(model), "seed": seed, "learning_rate": rate}
                    results["cells"].append(identity | {"sizes": asdict(task)} | cell)
                    save_results(out, results)
                    write_tables(results, out)
    plot_results(results, out)
    return results


def check_protocol(protocol: Protocol) -> None:
    """Raises ConfigError when a number cannot be used, or the pictures could not be drawn at the end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the pictures need matplotlib; pip install 'memzoo[bench]'")
    for name, least in (("steps", 0), ("batch_size", 1), ("eval_size", 1)):
        if getattr(protocol, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(protocol, name)} must be at least {least}")
    if not protocol.learning_rates or min(protocol.learning_rates) <= 0:
        raise ConfigError(f"--lr: {protocol.learning_rates} must be positive numbers")
    if protocol.steps == 0 and len(protocol.learning_rates) > 1:
        raise ConfigError("--steps: 0 trains nothing, so there is no learning rate to choose; give one --lr")


def load_results(out: Path, protocol: Protocol) -> dict[str, Any]:
    """What `out` holds, or the beginning of it. Raises ConfigError when it is of another protocol or damaged."""
    settings = json.loads(json.dumps(asdict(protocol)))
    path = out / RESULTS
    if not path.exists():
        return {"format": FORMAT, "settings": settings, "machine": _machine(), "cells": []}
    try:
        results = json.loads(path.read_text())
        before = results["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--out: {path} is not a file of results; choose another folder or delete it") from error
    for key in sorted({*before, *settings}):
        if before.get(key) != settings.get(key):
            raise ConfigError(
                f"--out: {out} holds results with {key}={before.get(key)}, not {settings.get(key)}; "
                "put it back, choose another folder, or delete this one"
            )
    return results


def save_results(out: Path, results: dict[str, Any]) -> None:
    """All or nothing: a run that is killed while writing leaves the file before."""
    draft = out / f"{RESULTS}.draft"
    draft.write_text(json.dumps(results, indent=1))
    os.replace(draft, out / RESULTS)


def _plan(
    results: dict[str, Any], task: Spec, model: Spec, seeds: list[int], rates: list[float], write
) -> Iterator[tuple[int, float]]:
    """Seeds and learning rates yet to be run; the rate is chosen on the first seed, once those cells are there."""

    def cells() -> dict[tuple[int, float], dict[str, Any]]:
        return {
            (cell["seed"], cell["learning_rate"]): cell
            for cell in results["cells"]
            if (cell["task"], cell["model"]) == (str(task), str(model))
        }

    first = next(iter(cells()), (seeds[0], 0.0))[0]
    for rate in rates:
        if (first, rate) not in cells():
            yield first, rate
    done = cells()
    rate = best(done[first, rate] for rate in rates)["learning_rate"]
    if len(rates) > 1:
        losses = ", ".join(f"{each:g}: {done[first, each]['train_loss']:.4f}" for each in rates)
        write(f"{task}, {model}: learning rate {rate:g} has the lowest training loss of seed {first} ({losses})")
    for seed in seeds:
        if (seed, rate) not in cells():
            yield seed, rate


def _machine() -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
