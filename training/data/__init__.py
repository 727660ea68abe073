"""Text for language modelling: documents, their split, and blocks of tokens in which no token and no byte is lost."""

from memzoo.training.data.documents import load_documents, load_parts, read_folder
from memzoo.training.data.packing import PackedBlocks, collate_blocks, tokenize
from memzoo.training.data.streaming import BlockStream

__all__ = [
    "BlockStream",
    "PackedBlocks",
    "collate_blocks",
    "load_documents",
    "load_parts",
    "read_folder",
    "tokenize",
]
