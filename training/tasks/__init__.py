"""Synthetic tasks that show what a memory is good for. Each module is imported when its task is first asked for."""

import importlib
from dataclasses import fields
from typing import Any, get_type_hints

from memzoo.training.config import check_keys, check_type

# name -> module and class
TASKS = {
    "copy_memory": "copy_memory.CopyMemoryTask",
    "associative_recall": "associative_recall.AssociativeRecallTask",
    "multi_query_recall": "associative_recall.RecallTask",
    "selective_copy": "selective_copy.SelectiveCopyTask",
    "induction_head": "induction_head.InductionHeadTask",
    "needle": "needle.NeedleTask",
    "arithmetic": "arithmetic.ArithmeticTask",
}


def task_class(name: str) -> type:
    """The class of a task. Raises ConfigError, with the nearest name, if there is none of that name."""
    check_keys({name: None}, TASKS, "task ")
    module, _, attribute = TASKS[name].partition(".")
    return getattr(importlib.import_module(f"memzoo.training.tasks.{module}"), attribute)


def build_task(name: str, sizes: dict[str, Any]) -> Any:
    """A task with some of its sizes set; unknown ones and values of the wrong type are refused."""
    cls = task_class(name)
    check_keys(sizes, [field.name for field in fields(cls)], f"{name}.")
    hints = get_type_hints(cls)
    return cls(**{key: check_type(f"{name}.{key}", value, hints[key]) for key, value in sizes.items()})
