"""Every command line of README, CONTRIBUTING and docs, and how far a test can go with it.

A command stands in a block of shell, in an indented block, or in a `code span` with arguments. Each is checked: the
program, subcommand, options, files and YAML keys that it names exist. What RUN and SLOW name is also run, in a folder
that has what the pages speak of, with the words added that stand there and make it small.
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("memzoo", "python", "make", "torchrun", "accelerate", "pip", "hf", "transformers")
LANGUAGES = ("python", "sh", "yaml", "json", "")  # without a name: drawings

# what a reader puts in, and what the tests do
PLACEHOLDERS = {
    "USER/NAME": "tester/name",
    "CONFIG.yaml": "training/configs/maru_demo.yaml",
    "FOLDER": "out-folder",
    "DIR": "out-folder",
    "MODEL": "runs/my_bank_transformer",
    "TYPES=<family>": "TYPES=maru",
    "...": "training/configs/maru_demo.yaml",
}

STEPS = (
    "training.max_steps=2 training.save_steps=1 training.eval_steps=1 training.use_cpu=true training.disable_tqdm=true"
)
BATCH = "training.per_device_train_batch_size=2 training.per_device_eval_batch_size=2"
TRAIN = f"{STEPS} {BATCH} model.hidden_size=16 training.load_best_model_at_end=false training.warmup_steps=0"
TEXT = f"{TRAIN} data.block_size=32 data.max_eval_bytes=64 sample.max_new_tokens=2"
OWN = "data.corpus=null data.path=my-texts"
ADAPT = f"{STEPS} {BATCH} base.name=tiny-base memory.num_memory_tokens=8 memory.num_heads=2 memory.bank_rank=4"
DOCUMENT = "--continuations 4 --held-out 2 --length 3 --steps 2"
DISTILL = f"{DOCUMENT} --opening 2"
BENCH = "--steps 1 --params 0 --eval-size 4 --batch-size 4 --seeds 1"

# the first words of a command (the longest that fit) -> what makes it small; run with every test
RUN = {
    "memzoo train": TEXT,
    "memzoo train training/configs/neural_memory_transformer.yaml": f"{TEXT} {OWN} tokenizer.vocab_size=280",
    "memzoo train training/configs/titan_mac_math.yaml": f"{TRAIN} data.task_eval_size=4",
    "memzoo adapt": f"{ADAPT} training.bf16=false data.max_length=64",
    "memzoo adapt training/configs/adapter_smollm2.yaml": f"{ADAPT} data.path=chats.jsonl data.eval_path=chats.jsonl",
    "memzoo tokenizer": "",
    "memzoo generate": "--max-new-tokens 2",
    "memzoo eval": "--max-bytes 100 --window 64",
    "memzoo chat": "--max-new-tokens 2",
    "memzoo config": "",
    "memzoo lr-find": f"{TEXT} --steps 10",
    "memzoo distill": DISTILL,
    "memzoo distill --document notes.txt --model smollm2": f"{DISTILL} --model tiny-base",
    "memzoo show-bank": "",
    "memzoo push": "",
    "memzoo pull": "",
    "memzoo quantize": "",
    "memzoo merge-lora": "",
    "memzoo extract-bank": "",
    "python benchmarks/scaling.py": "",
    "python benchmarks/facts.py --write": "",
    "make": "--dry-run",
}
# the same, with `make test-slow`: seconds to minutes each
SLOW = {
    "memzoo bench": BENCH,
    "memzoo bench --sanity": "",
    "memzoo export": "",
    "memzoo eval runs/a --tasks": "--limit 2",
    "python -c": "--limit 2",
    "python benchmarks/adapters.py": "train --rounds 1",
    "python benchmarks/associative_recall.py": "--pairs 2 --seeds 1 --steps 1",
    "python benchmarks/bank_language.py": "--steps 2 --batch-size 2 --eval-bytes 2000 --arms bank --out out",
    "python benchmarks/bank_attention.py": "--rounds 1 --tokens 256",
    "python benchmarks/distillation.py": f"--years 1801 --tokens 40 {DOCUMENT} --out out",
    "python benchmarks/facts.py --output": "--methods base --facts 2 --bytes 200",
    "python benchmarks/gated_slots.py": "--shapes 1x16 --rounds 1",
    "python benchmarks/maru.py train": "--repeats 1",
    "python benchmarks/maru.py decode": "--repeats 1 --tokens 2",
    "python benchmarks/memory_gru.py": "--shapes 1x16 --rounds 1",
    "python benchmarks/needle.py": "--models mag --lengths 512 --steps 1 --batch-size 1",
    "python benchmarks/neural_memory.py": "--rounds 1",
    "python benchmarks/optimizers.py": "--hidden-size 8 --steps 20 --rates 1e-2 --seeds 1 --eval-bytes 256",
    "python benchmarks/selective_scan.py": "--shape 1,32,16,4 --rounds 1",
    "python benchmarks/slot_memory.py": "--rounds 1",
    "python benchmarks/small_kernels.py": "--rounds 1",
    "python benchmarks/titan_mac.py --growth": "--rounds 1 --dim 64 --layers 1 --vocab 100",
    "python examples/agent.py": "--steps 1024 --seeds 1 --length 3 --out agent.png",
}
# only checked, and why
CHECKED = {
    "memzoo bench --full": "up to an hour",
    "python tests/adapters/run_peft_suite.py": "an hour, and needs PEFT's own tests",
    "torchrun": "several processes: tests/training/test_distributed.py runs two",
    "accelerate launch": "the same",
    "memzoo eval runs/a --tasks": "needs lm-evaluation-harness: tests/training/test_lm_eval.py runs such tasks",
    "pip install": "needs the network",
    "hf auth login": "needs an account",
    "transformers serve": "the page says that it does not work",
}


class Command(NamedTuple):
    page: Path
    line: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def commands_of(page: Path) -> list[Command]:
    """The commands of a page in their order, continued lines joined and comments cut off."""
    found, language, waiting = [], None, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            language = None if language is not None else line[3:]
            continue
        if language is None:
            spans = re.findall(r"`([^`]+)`", line)
            found += [Command(page, number, span) for span in spans if _is_command(span) and " " in span.strip()]
        if waiting or language == "sh" or (language is None and line.startswith("    ") and _is_command(line)):
            waiting += re.sub(r"(^|\s)#.*", "", line).strip()
            if waiting.endswith("\\"):
                waiting = waiting[:-1]
            elif waiting:
                found.append(Command(page, number, waiting))
                waiting = ""
    return found


def _is_command(text: str) -> bool:
    words = _without_environment(text.split())
    return bool(words) and words[0] in PROGRAMS


def _without_environment(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return words


def rule(text: str, *tables: dict[str, str]) -> str | None:
    """The longest entry of the tables that the command begins with."""
    text = " ".join(_without_environment(text.split())) + " "
    fitting = [key for table in tables for key in table if text.startswith(key + " ")]
    return max(fitting, key=len, default=None)


def filled_in(text: str) -> str:
    """The command with the reader's part filled in."""
    for placeholder, value in PLACEHOLDERS.items():
        text = re.sub(rf"(?<![\w/.-]){re.escape(placeholder)}(?![\w.-])", value, text)
    return text
