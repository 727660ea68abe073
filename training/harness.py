"""`memzoo eval --tasks`: a model or an adapter through lm-evaluation-harness, on task files of one's own, offline.

The harness loads what it is given by AutoModelForCausalLM and PeftModel, which know memzoo's families and adapter.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `memzoo eval` that go to the harness."""
    group = parser.add_argument_group("multiple choice, questions and more, through lm-evaluation-harness")
    group.add_argument("--tasks", metavar="A,B", help="names of tasks, of the harness or of --task-dir")
    group.add_argument(
        "--task-dir", metavar="DIR", help="folder with task files (YAML) of your own; nothing else is read"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")
    group.add_argument("--shots", type=int, metavar="N", help="examples before each question")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="(default: %(default)s)")


def run_tasks(args: argparse.Namespace) -> None:
    """Prints the harness's table."""
    if args.tasks is None:
        raise ValueError(f"--task-dir: say which tasks of {args.task_dir} to run, with --tasks")
    names = args.tasks.split(",")
    found = evaluate_tasks(args.model, names, args.task_dir, args.limit, args.shots, args.batch_size)
    from lm_eval.utils import make_table

    print(make_table(found))


def evaluate_tasks(
    model: str,
    tasks: list[str],
    task_dir: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """The harness's results for a folder, or hub id, of a model or an adapter.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: a task is not known; the message lists those of `task_dir`.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("--tasks: needs lm-evaluation-harness; pip install 'memzoo[lm-eval]'") from error
    if task_dir is not None and not Path(task_dir).is_dir():
        raise ValueError(f"--task-dir: {task_dir} is not a folder; give one that holds task files (YAML)")
    manager = TaskManager(include_path=task_dir, include_defaults=task_dir is None)
    for name in tasks:
        if name not in manager.all_tasks:
            known = (
                f"; {task_dir} has {', '.join(sorted(manager.all_tasks)) or 'none'}" if task_dir is not None else ""
            )
            raise ValueError(f"--tasks: there is no task {name!r}{known}")
    return simple_evaluate(
        model="hf",
        model_args=model_arguments(model),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        batch_size=batch_size,
        bootstrap_iters=0,
    )


def model_arguments(model: str) -> dict[str, Any]:
    """What the harness is to load: for an adapter, its base and itself."""
    import torch

    from memzoo.training.checkpoints import check_files

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not Path(model).is_dir():
        return {"pretrained": model, "device": device}
    check_files(model, "copy or train it again")
    adapter = Path(model) / "adapter_config.json"
    if not adapter.is_file():
        return {"pretrained": model, "device": device}
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    tokenizer = model if (Path(model) / "tokenizer_config.json").is_file() else base
    return {"pretrained": base, "peft": model, "tokenizer": tokenizer, "device": device}
