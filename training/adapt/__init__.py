"""`memzoo adapt`: a memory, a LoRA or both, trained on a pretrained model.

`settings.py` the YAML file, `chat.py` conversations with a loss on the assistant's words, `data.py` what a run learns
from, `run.py` the run, `command.py` the command.
"""
