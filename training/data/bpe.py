"""Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; on bytes as in GPT-2), trained on the user's text.

The `tokenizers` library does the work. The special tokens, their ids and the chat template are those of MARU's bytes:

    ids 0-7   <pad> <bos> <eos> <sep> <|system|> <|user|> <|assistant|> <|tool|>
    then      the 256 bytes, then the merges

so nothing is ever unknown, and every string of valid Unicode comes back exactly.
"""

import logging
import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memzoo.modeling.maru.tokenization_maru import CHAT_TEMPLATE, ROLES, SPECIAL_TOKENS
from memzoo.training.config import ConfigError, check_bpe_size
from memzoo.training.data.packing import encode

logger = logging.getLogger(__name__)

# Training costs the square of a word's length, so what has no end for so long is cut: DNA, base64, a line of blanks.
_ENDLESS = re.compile(r"\S{2048}(?=\S)|\s{2048}(?=\s)")


def train_bpe(documents: Iterable[bytes], vocab_size: int, min_frequency: int = 2) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens, the same for the same text; AutoTokenizer loads its saved folder.

    Args:
        documents: UTF-8 texts, each read once.
        min_frequency: a pair seen less often is not merged.

    Raises:
        ConfigError: the vocabulary has no room for the bytes, or a text is not UTF-8.
    """
    check_bpe_size("tokenizer.vocab_size", vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(documents), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        logger.warning(
            "the text has only %d tokens of the %d asked for (tokenizer.min_frequency: %d)",
            tokenizer.get_vocab_size(),
            vocab_size,
            min_frequency,
        )
    pad, bos, eos, sep = SPECIAL_TOKENS[:4]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        sep_token=sep,
        extra_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, documents: Iterable[bytes], limit: int = 1 << 20) -> float:
    """Measured on the first `limit` bytes of the documents, or somewhat more."""
    num_bytes = num_tokens = 0
    for content in documents:
        num_bytes += len(content)
        num_tokens += len(encode([content], tokenizer)[0])
        if num_bytes >= limit:
            break
    return num_bytes / num_tokens


def _texts(documents: Iterable[bytes]) -> Iterator[str]:
    for content in documents:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"tokenizer.type: a BPE reads UTF-8 and some text is not ({error}); re-encode it, or use bytes"
            ) from error
        start = 0
        for word in _ENDLESS.finditer(text):
            yield text[start : word.end()]
            start = word.end()
        yield text[start:]
