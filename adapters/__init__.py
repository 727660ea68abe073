"""PEFT method MEMZOO: memories for frozen language models.

`config.py` what to add, `sites.py` where, `blocks.py` what is computed there, `layer.py` how it hangs on the base,
`model.py` PEFT's interface to it, `states.py` what a sequence leaves in the generation cache, `optim.py` learning
rates, `register.py` how PEFT learns of it.
"""

import peft  # noqa: F401 (before the modules here, so that memzoo.peft_hook finds none of them half imported)
