"""Documents into memory: a bank is trained until the model with it answers as the model that has just read them.

`settings.py` numbers of a run, `study.py` what the teacher writes, `distill.py` the training and the measure,
`seeding.py` a first guess from the document's own passages, `command.py` the command.
"""
