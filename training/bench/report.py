"""Tables and pictures of what results.json holds."""

import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def write_tables(results: dict[str, Any], out: Path) -> None:
    """results.md: a table for each task."""
    settings, machine = results["settings"], results["machine"]
    rates = " or ".join(f"{rate:g}" for rate in settings["learning_rates"])
    size = f"{settings['parameters']:,} parameters" if settings["parameters"] else "sizes as configured"
    lines = [
        "# Benchmark",
        "",
        f"{size}; {settings['steps']} steps of {settings['batch_size']} sequences, cosine schedule, learning rate "
        + rates
        + (" (the lower training loss on the first seed)" if len(settings["learning_rates"]) > 1 else "")
        + f"; {settings['eval_size']} held-out sequences. Accuracy on the answers in %: median (lowest-highest) of "
        f"the seeds. {machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}.",
    ]
    for task, models in groups(results).items():
        cell = next(iter(models.values()))[0]
        sizes = ", ".join(f"{key}={value}" for key, value in cell["sizes"].items())
        lines += ["", f"## {task}", "", f"{sizes}; chance {100 * cell['chance']:.1f} %.", ""]
        lines += _depth_table(models) if "depth" in cell["evaluations"][0] else _length_table(models)
    (out / "results.md").write_text("\n".join(lines) + "\n")


def plot_results(results: dict[str, Any], out: Path) -> None:
    """For each task the curves of training, and accuracy against length, or depth, where several were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for task, models in groups(results).items():
        cells = next(iter(models.values()))
        name = re.sub(r"[^\w.=-]+", "_", task)
        if cells[0]["losses"]:
            figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
            for color, (model, cells_of_model) in enumerate(models.items()):
                _band(loss, f"C{color}", model, [cell["losses"] for cell in cells_of_model])
                _band(accuracy, f"C{color}", model, [cell["accuracies"] for cell in cells_of_model])
            accuracy.axhline(cells[0]["chance"], color="grey", lw=1, ls=":", label="chance")
            loss.set(xlabel="step", ylabel="training loss", title=task, yscale="log")
            accuracy.set(xlabel="step", ylabel="accuracy", ylim=(-0.02, 1.02))
            _save(figure, accuracy, out / f"{name}_training.png")
        for key, label in (("length", "tokens"), ("depth", "depth of the needle")):
            if len({evaluation.get(key) for evaluation in cells[0]["evaluations"]}) == 1:
                continue
            figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
            for color, (model, cells_of_model) in enumerate(models.items()):
                _band(axes, f"C{color}", model, [_against(cell, key) for cell in cells_of_model], marker="o")
            axes.axhline(cells[0]["chance"], color="grey", lw=1, ls=":", label="chance")
            if key == "length":
                axes.axvline(cells[0]["train_length"], color="grey", lw=1, label="trained at")
                axes.set_xscale("log", base=2)
                lengths = [length for length, _ in _against(cells[0], key)]
                axes.set_xticks(lengths, [str(length) for length in lengths])
            axes.set(title=task, xlabel=label, ylabel="accuracy", ylim=(-0.02, 1.02))
            _save(figure, axes, out / f"{name}_{key}.png")


def groups(results: dict[str, Any]) -> dict[str, dict[str, list[Cell]]]:
    """task -> model -> one cell a seed, all at the learning rate that was chosen on the first seed."""
    tables: dict[str, dict[str, list[Cell]]] = {}
    for cell in results["cells"]:
        tables.setdefault(cell["task"], {}).setdefault(cell["model"], []).append(cell)
    for models in tables.values():
        for name, cells in models.items():
            rate = best(cell for cell in cells if cell["seed"] == cells[0]["seed"])["learning_rate"]
            models[name] = [cell for cell in cells if cell["learning_rate"] == rate]
    return tables


def best(cells: Iterable[Cell]) -> Cell:
    """The cell with the lowest training loss; one that diverged, or has none, comes last."""
    return min(cells, key=lambda cell: cell["train_loss"] if math.isfinite(cell["train_loss"] or 0) else math.inf)


def spread(values: list[float]) -> str:
    """`98.2 (91.0-99.9)` of shares, in %."""
    low, middle, high = (100 * value for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.1f} ({low:.1f}-{high:.1f})" if len(values) > 1 else f"{middle:.1f}"


def _length_table(models: dict[str, list[Cell]]) -> list[str]:
    places = next(iter(models.values()))[0]["evaluations"]
    trained = next(iter(models.values()))[0]["train_length"]
    header = ["model", "parameters", "seeds", "lr", *(f"{place['length']} tokens" for place in places)]
    header += [f"whole sequences of {places[0]['length']}", "tokens/s", "MB on the GPU"]
    header += [f"state after {trained}", f"after {4 * trained}"]
    rows = []
    for model, cells in models.items():
        row = [model, f"{cells[0]['parameters']:,}", str(len(cells)), f"{cells[0]['learning_rate']:g}"]
        for i in range(len(places)):
            row.append(spread([cell["evaluations"][i]["accuracy"] for cell in cells]))
        row.append(spread([cell["evaluations"][0]["exact"] for cell in cells]))
        for key in ("tokens_per_second", "peak_memory_mb"):
            known = [cell[key] for cell in cells if cell[key] is not None]
            row.append(f"{statistics.median(known):,.0f}" if known else "-")
        row += [f"{size / 1024:,.1f} kB" for size in cells[0]["state_bytes"].values()]
        rows.append(row)
    return _table(header, rows)


def _depth_table(models: dict[str, list[Cell]]) -> list[str]:
    places = next(iter(models.values()))[0]["evaluations"]
    depths = list(dict.fromkeys(place["depth"] for place in places))
    rows = []
    for model, cells in models.items():
        for length in dict.fromkeys(place["length"] for place in places):
            row = [model, f"{cells[0]['parameters']:,}", str(len(cells)), str(length)]
            for i, place in enumerate(places):
                if place["length"] == length:
                    row.append(spread([cell["evaluations"][i]["accuracy"] for cell in cells]))
            rows.append(row)
    return _table(["model", "parameters", "seeds", "tokens", *(f"depth {depth:g}" for depth in depths)], rows)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def _against(cell: Cell, key: str) -> list[tuple[float, float]]:
    """(length or depth, accuracy), a mean where several evaluations share a place."""
    places: dict[float, list[float]] = {}
    for evaluation in cell["evaluations"]:
        places.setdefault(evaluation[key], []).append(evaluation["accuracy"])
    return sorted((place, statistics.mean(values)) for place, values in places.items())


def _band(axes, color: str, label: str, curves: list[list[tuple[float, float]]], marker: str = "") -> None:
    """The median of the seeds as a line, lowest to highest as a band."""
    x = [point for point, _ in curves[0]]
    columns = list(zip(*([value for _, value in curve] for curve in curves)))
    axes.plot(x, [statistics.median(column) for column in columns], color=color, label=label, marker=marker, ms=4)
    axes.fill_between(
        x, [min(column) for column in columns], [max(column) for column in columns], color=color, alpha=0.2
    )


def _save(figure, axes, path: Path) -> None:
    from matplotlib import pyplot as plt

    axes.legend(fontsize="small")
    for each in figure.axes:
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
