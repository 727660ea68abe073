"""PEFT method MEMZOO: memory banks on a frozen language model. Not written yet."""
