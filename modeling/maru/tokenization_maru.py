"""MaruTokenizer: text as bytes, so that nothing is ever unknown and every `str` comes back exactly.

    ids 0-7    <pad> <bos> <eos> <sep> <|system|> <|user|> <|assistant|> <|tool|>
    ids 8-263  the bytes of the text's UTF-8 form (id = byte + 8)

Lone surrogates, which UTF-8 has no form for, take three bytes as in WTF-8 (Python's "surrogatepass"). Bytes that are
not text at all, such as half a character at the end of a generation, decode to U+FFFD; `decode_bytes` returns them as
they are. The fast tokenizers of the `tokenizers` library refuse lone surrogates, which is why this one is Python.

As in every Hugging Face tokenizer, "<bos>" typed in a text is read as the special token (it still round-trips as
text); `split_special_tokens=True` reads it as five characters.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer
from transformers.utils import to_py_obj

ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<sep>", *ROLES]
BYTE_TOKENS = [chr(byte) if 0x20 <= byte < 0x7F else f"<0x{byte:02X}>" for byte in range(256)]
OFFSET = len(SPECIAL_TOKENS)  # the id of byte 0
CHARACTER_ROWS = 256

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{ raise_exception('the roles are system, user, assistant and tool, not ' + message['role']) }}"
    "{%- endif -%}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)

_SURROGATE = re.compile(rb"(\xed[\xa0-\xbf][\x80-\xbf])")


def _bytes_to_text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pieces = _SURROGATE.split(data)  # odd pieces are surrogates; ED A0..BF never occurs in valid UTF-8
        return "".join(
            piece.decode("utf-8", "surrogatepass" if i % 2 else "replace") for i, piece in enumerate(pieces)
        )


class MaruTokenizer(PreTrainedTokenizer):
    """Byte-level tokenizer; with `characters`, the 256-row character vocabulary of the first MARU.

    Nothing is added around a text by default, so `decode(encode(text)) == text`. Pads go to the left, where `generate`
    wants them; the models give the same result on either side.

    Args:
        characters: `None` for bytes. A string or list of characters puts `characters[i]` in row i and the special
            tokens in the last rows; a mapping `{token: row}` is taken as it is, its longer keys being special tokens
            (name them with `pad_token=` and so on). A character outside the vocabulary is refused, never dropped.
        special_tokens_pattern: what is put around a text: `"none"`, `"bos"`, `"eos"` or `"bos_eos"`. The two texts of
            a pair are always separated by `<sep>`.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        characters: str | Sequence[str] | Mapping[str, int] | None = None,
        special_tokens_pattern: str = "none",
        pad_token: str | AddedToken = "<pad>",
        bos_token: str | AddedToken = "<bos>",
        eos_token: str | AddedToken = "<eos>",
        sep_token: str | AddedToken = "<sep>",
        extra_special_tokens: Sequence[str | AddedToken] | Mapping[str, str | AddedToken] | None = None,
        **kwargs: Any,
    ) -> None:
        if special_tokens_pattern not in ("none", "bos", "eos", "bos_eos"):
            raise ValueError(
                f"special_tokens_pattern is 'none', 'bos', 'eos' or 'bos_eos', not {special_tokens_pattern!r}"
            )
        named = [str(token) for token in (pad_token, bos_token, eos_token, sep_token)]
        if characters is None:
            self._rows = {token: row for row, token in enumerate(SPECIAL_TOKENS + BYTE_TOKENS)}
            special = SPECIAL_TOKENS
            roles = ROLES
            kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        else:
            characters = dict(characters) if isinstance(characters, Mapping) else list(characters)
            self._rows = _character_rows(characters, named)
            special = [token for token in self._rows if len(token) > 1 and not token.startswith("<unused_")]
            roles = [token for token in special if token not in named]
        self._tokens = {row: token for token, row in self._rows.items()}
        self._added_tokens_decoder = {
            self._rows[token]: AddedToken(token, special=True, normalized=False) for token in special
        }
        if isinstance(extra_special_tokens, Mapping):
            kwargs["model_specific_special_tokens"] = dict(extra_special_tokens)
            extra_special_tokens = None
        extra = [token for token in extra_special_tokens or [] if str(token) not in roles]
        super().__init__(
            characters=characters,
            pad_token=pad_token,
            bos_token=bos_token,
            eos_token=eos_token,
            sep_token=sep_token,
            extra_special_tokens=[*roles, *extra],
            special_tokens_pattern=special_tokens_pattern,
            **kwargs,
        )
        self.characters = characters
        self.init_kwargs["special_tokens_pattern"] = special_tokens_pattern  # the base class forgets to save it

    @classmethod
    def from_characters(cls, characters: str | Sequence[str] | Mapping[str, int], **kwargs: Any) -> "MaruTokenizer":
        """The 256-row character vocabulary; see `characters` above."""
        return cls(characters=characters, **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._rows)

    def get_vocab(self) -> dict[str, int]:
        return {**self._rows, **self._added_tokens_encoder}

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of raw bytes, which need not be text."""
        self._require_bytes()
        return [byte + OFFSET for byte in data]

    def decode_bytes(self, token_ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        """The exact bytes behind the ids, also where they are not text."""
        self._require_bytes()
        ids = self._checked(token_ids, skip_special_tokens)
        try:
            return bytes([row - OFFSET for row in ids])
        except ValueError:  # not only bytes
            pieces = {row: token.content.encode("utf-8", "surrogatepass") for row, token in self._added()}
            pieces.update((byte + OFFSET, bytes([byte])) for byte in range(256))
            return b"".join([pieces.get(row, b"\xef\xbf\xbd") for row in ids])

    def _require_bytes(self) -> None:
        if self.characters is not None:
            raise ValueError("a character vocabulary has no bytes; use MaruTokenizer() without `characters`")

    def _added(self) -> Iterable[tuple[int, AddedToken]]:
        return self._added_tokens_decoder.items()

    def _checked(self, token_ids: Iterable[int], skip_special_tokens: bool) -> list[int]:
        ids = token_ids if isinstance(token_ids, list) else list(to_py_obj(token_ids))
        if ids and min(ids) < 0:
            raise ValueError(f"{min(ids)} is not a token id; in labels, replace -100 by pad_token_id before decoding")
        if skip_special_tokens:
            skipped = set(self.all_special_ids)
            ids = [row for row in ids if row not in skipped]
        return ids

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._tokens[row] for row in self._plain_ids(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._rows.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens.get(index, f"<unused_{index}>")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of a text that holds no special tokens."""
        if self.characters is None:
            return self.encode_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            return [self._rows[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"{character!r} (U+{ord(character):04X}, position {text.index(character)}) is not in the character "
                "vocabulary: add it to `characters`, or use bytes (MaruTokenizer()), which encode everything"
            ) from None

    def _text_ids(self, text: str, split_special_tokens: bool) -> list[int]:
        """What `convert_tokens_to_ids(tokenize(text))` gives, without going through a list of a million strings."""
        tokens = [] if split_special_tokens else [token for _, token in self._added() if token.content in text]
        if not tokens:
            return self._plain_ids(text)
        if any(token.lstrip or token.rstrip or token.single_word for token in tokens):
            return [self._convert_token_to_id_with_added_voc(token) for token in self.tokenize(text)]
        longest_first = sorted((re.escape(token.content) for token in tokens), key=len, reverse=True)
        ids: list[int] = []
        for i, piece in enumerate(re.split(f"({'|'.join(longest_first)})", text)):
            ids += [self._added_tokens_encoder[piece]] if i % 2 else self._plain_ids(piece)
        return ids

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        split = kwargs.get("split_special_tokens", self.split_special_tokens)

        def to_ids(value: Any) -> Any:
            if isinstance(value, str):
                return self._text_ids(value, split) or ""  # the base class takes an empty text but no empty id list
            if isinstance(value, (list, tuple)) and value and not isinstance(value[0], int):
                return type(value)([to_ids(item) for item in value])
            return value

        if not kwargs.get("is_split_into_words") and not kwargs.get("sanitize_control_tokens"):
            text, text_pair = to_ids(text), to_ids(text_pair)
        return super()._encode_plus(text, text_pair=text_pair, **kwargs)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if self.characters is None:
            text = _bytes_to_text(self.decode_bytes(ids, skip_special_tokens))
        else:
            pieces = {row: token for row, token in self._tokens.items() if not token.startswith("<unused_")}
            pieces.update((row, token.content) for row, token in self._added())
            text = "".join([pieces.get(row, "\ufffd") for row in self._checked(ids, skip_special_tokens)])
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        if token_ids_1 is not None:
            token_ids_0 = [*token_ids_0, self.sep_token_id, *token_ids_1]
        return super().build_inputs_with_special_tokens(token_ids_0)

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        pair = None if token_ids_1 is None else [-1] * len(token_ids_1)
        return [int(row != -1) for row in self.build_inputs_with_special_tokens([-1] * len(token_ids_0), pair)]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()  # everything is in tokenizer_config.json


def _character_rows(characters: Mapping[str, int] | Sequence[str], named: list[str]) -> dict[str, int]:
    """Rows of a character vocabulary; the special tokens that it lacks take the last free rows."""
    rows = dict(characters) if isinstance(characters, Mapping) else {c: row for row, c in enumerate(characters)}
    missing = [token for token in dict.fromkeys(named) if token not in rows]
    if len(rows) < len(characters) or len(set(rows.values())) < len(rows):
        raise ValueError("`characters` names a character or a row twice")
    if not all(rows) or any("\ud800" <= c <= "\udfff" for token in rows for c in token):
        raise ValueError("`characters` holds an empty string or a lone surrogate, which no file can store")
    if any(not 0 <= row < CHARACTER_ROWS for row in rows.values()):
        raise ValueError(f"a character vocabulary has the rows 0 to {CHARACTER_ROWS - 1}")
    free = sorted(set(range(CHARACTER_ROWS)) - set(rows.values()))
    if len(free) < len(missing):
        raise ValueError(
            f"{len(rows)} of {CHARACTER_ROWS} rows are taken and {missing} need one each: leave characters out, or "
            "name entries of yours with pad_token=, bos_token=, eos_token= and sep_token="
        )
    rows.update(zip(missing, free[len(free) - len(missing) :]))
    rows.update((f"<unused_{row}>", row) for row in free[: len(free) - len(missing)])
    return dict(sorted(rows.items(), key=lambda item: item[1]))


__all__ = ["MaruTokenizer"]
