"""Text for language modelling: documents, their split, and blocks of tokens in which no token and no byte is lost."""

from memzoo.training.data.documents import load_documents, read_folder
from memzoo.training.data.packing import PackedBlocks, collate_blocks, tokenize

__all__ = ["PackedBlocks", "collate_blocks", "load_documents", "read_folder", "tokenize"]
