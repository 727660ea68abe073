"""A model card from what is in a model's folder: config, weights, the run's settings, its metrics and its picture."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

HERE = Path(__file__).parent
REPOSITORY_TAG = "memzoo"
# what Trainer calls it -> what a reader calls it, and the Hub's name of the metric
METRICS = {
    "eval_bits_per_byte": ("bits per byte, held out", "bits_per_byte"),
    "eval_loss": ("loss in nats per token, held out", "loss"),
    "eval_exact": ("answered right, held out", "exact_match"),
    "eval_accuracy": ("accuracy on answers, held out", "accuracy"),
}


def render_card(folder: str | Path, name: str | None = None, license: str | None = None) -> ModelCard:
    """The card of the model or adapter in `folder`, its metadata valid for the Hub.

    Args:
        folder: what `memzoo train` or `save_pretrained` wrote.
        name: the model's name; the folder's without it.
        license: an identifier of the Hub such as "apache-2.0"; without it the card says that none was given.

    Raises:
        FileNotFoundError: the folder holds neither a `config.json` nor an `adapter_config.json`.
        ValueError: it holds a model of another library.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    adapter = _json(folder / "adapter_config.json")
    config = adapter or _json(folder / "config.json")
    if not config:
        raise FileNotFoundError(
            f"{folder} holds neither config.json nor adapter_config.json; save a model there first"
        )
    kind = "adapter" if adapter else config.get("model_type", "")
    sections = _family_text(kind)
    run = _yaml(folder / "train.yaml")
    log = _json(folder / "trainer_state.json").get("log_history", [])
    metrics = {key: entry[key] for entry in log for key in METRICS if key in entry}  # the last of each
    base = _hub_id(adapter.get("base_model_name_or_path"))
    data = _data_name(run)
    results = [
        EvalResult("text-generation", data, data, METRICS[key][1], round(float(value), 4), task_name="Text generation")
        for key, value in metrics.items()
    ]
    card_data = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=[REPOSITORY_TAG, "memory", kind],
        model_name=name,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(HERE / "template.md"),
        title=name,
        summary=_summary(kind, base),
        about=sections["About"],
        usage=_usage(kind, name, base),
        code_included=bool(config.get("auto_map")),
        sizes=_sizes(folder, config, kind),
        metrics=[(METRICS[key][0], f"{value:.4g}") for key, value in metrics.items()],
        picture="loss.png" if (folder / "loss.png").is_file() else None,
        settings=yaml.safe_dump({"model": run["model"], "training": run["training"]}, sort_keys=False) if run else "",
        data=data,
        limits=sections["Limits"],
        license_text=f"Licence: {license}." if license else "No licence was given; ask the author before you use it.",
        citation=sections["Citation"],
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def _family_text(kind: str) -> dict[str, str]:
    """The hand-written parts: {"About": ..., "Limits": ..., "Citation": ...}."""
    path = HERE / "families" / f"{kind}.md"
    if not path.is_file():
        known = sorted(file.stem for file in (HERE / "families").glob("*.md"))
        raise ValueError(f"no card for {kind!r}: this is not a model of memzoo (known: {', '.join(known)})")
    parts = path.read_text().split("## ")[1:]
    return {title: text.strip() for title, text in (part.split("\n", 1) for part in parts)}


def _hub_id(name: str | None) -> str | None:
    """A base's name if others can load it: the Hub refuses cards whose base_model is a path."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return None if name is None or Path(name).exists() else name


def is_blank_form(path: Path) -> bool:
    """A README.md that says next to nothing, as PEFT's save_pretrained leaves one beside every adapter."""
    return path.is_file() and path.read_text().count("[More Information Needed]") > 5


def _summary(kind: str, base: str | None) -> str:
    what = f"A `{kind}` model"
    if kind == "adapter":
        what = f"A memory adapter for `{base}`" if base else "A memory adapter for a model that is not on the Hub"
    return f"{what}, made with memzoo: language models that remember."


def _usage(kind: str, name: str, base: str | None) -> str:
    if kind == "adapter" and base is None:
        return (
            "import memzoo  # registers the adapter with PEFT\n"
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM\n\n"
            'base = AutoModelForCausalLM.from_pretrained("THE-BASE")  # that this adapter was trained on\n'
            f'model = PeftModel.from_pretrained(base, "{name}")'
        )
    if kind == "adapter":
        return (
            "import memzoo  # registers the adapter with PEFT\n"
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{base}")'
        )
    return (
        "import memzoo  # registers the family with transformers\n"
        "from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model="{name}")\n'
        'print(generate("The state of the Union is ", max_new_tokens=50)[0]["generated_text"])'
    )


def _sizes(folder: Path, config: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    parameters = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118 (not a dict)
                size = 1
                for length in file.get_slice(tensor).get_shape():
                    size *= length
                parameters += size
    rows = [("weights, buffers included", f"{parameters:,}")] if parameters else []
    wanted = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    wanted += sorted(key for key in config if key.startswith("memory_")) if kind != "adapter" else []
    wanted += ["memory_type", "num_memory_tokens", "bank_type", "placement", "num_chapters"]
    return rows + [(f"`{key}`", f"`{config[key]}`") for key in wanted if config.get(key) is not None]


def _data_name(run: dict[str, Any]) -> str:
    data = run.get("data", {})
    known = {"sotu": "State of the Union addresses"}
    source = data.get("corpus") or data.get("dataset") or data.get("task")
    if source:
        return known.get(source, source)
    return Path(data["path"]).name if data.get("path") else "not recorded"
