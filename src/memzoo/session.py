"""A model that goes on with one text: what it has read and written is in its cache, which can be kept on disk."""

from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from memzoo.modeling.cache import MemoryCache
from memzoo.modeling.configuration import MemoryModelConfig
from memzoo.training.checkpoints import check_files

CHUNK = 2048  # tokens read at once


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, or base with its adapter, and tokenizer from a folder (or a hub id), on the GPU if there is one.

    Raises:
        FileNotFoundError: the folder holds no model.
        DamagedCheckpoint: a file of it is cut short.
    """
    folder = Path(name)
    adapted = (folder / "adapter_config.json").is_file()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not adapted:
            checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
            hint = f"; did you mean {checkpoints[-1]}?" if checkpoints else " (no config.json)"
            raise FileNotFoundError(f"{folder} holds no model{hint}")
        check_files(folder, "copy or train it again")
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is not a folder; give one that save_pretrained or `memzoo train` wrote")
    model = (AutoPeftModelForCausalLM if adapted else AutoModelForCausalLM).from_pretrained(name).eval()
    if torch.cuda.is_available():
        model.cuda()
    return model, AutoTokenizer.from_pretrained(name)


class Session:
    """One text, read and written in turns.

    Args:
        memory: folder of a snapshot to go on from (memzoo's models only).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, memory: str | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.reset()
        if memory is not None:
            self.load(memory)

    @property
    def seen_tokens(self) -> int:
        return self.cache.get_seq_length()

    def reset(self) -> None:
        """Forgets everything."""
        has_memory = isinstance(self.model.config, MemoryModelConfig)
        self.cache = MemoryCache(self.model.config) if has_memory else DynamicCache(config=self.model.config)

    def load(self, folder: str) -> None:
        """Goes on from a snapshot. Raises ValueError if it is of another model."""
        self._require_memory()
        self.cache = MemoryCache.from_pretrained(folder, self.model.config, device=self.model.device)

    def save(self, folder: str) -> None:
        """Writes a snapshot of everything read and written so far."""
        self._require_memory()
        self.cache.save_pretrained(folder)

    def encode(self, text: str) -> torch.Tensor:
        """Ids [1, T]; a text that begins the session begins with the tokenizer's bos, as in training."""
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        bos = self.tokenizer.bos_token_id
        if self.seen_tokens == 0 and bos is not None and (ids.shape[1] == 0 or ids[0, 0] != bos):
            ids = torch.cat([ids.new_full((1, 1), bos), ids], dim=1)
        if ids.shape[1] == 0:
            raise ValueError("nothing to go on from: give a prompt")
        return ids.to(self.model.device)

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> None:
        """Takes ids [1, T] into the cache, a chunk at a time."""
        for chunk in ids.split(CHUNK, dim=1) if ids.shape[1] else ():
            self.model(chunk, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def reply(self, text: str, streamer: TextStreamer | None = None, **sampling) -> str:
        """Reads `text` and writes on; what was written is taken into the cache too. `sampling` goes to generate."""
        ids = self.encode(text)
        self.read(ids[:, :-1])
        mask = ids.new_ones(1, self.seen_tokens + 1)
        out = self.model.generate(
            ids[:, -1:],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=streamer,
            **sampling,
        )
        not_seen = mask.shape[1] - 1 + out.shape[1] - self.seen_tokens  # generate leaves out the last token
        self.read(out[:, out.shape[1] - not_seen :])
        return str(self.tokenizer.decode(out[0, 1:], skip_special_tokens=True))

    def _require_memory(self) -> None:
        if not isinstance(self.cache, MemoryCache):
            raise ValueError(f"{self.model.config.model_type} has no memory that can be kept; use a memzoo model")
