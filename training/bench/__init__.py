"""Every task with every model at equal size: `memzoo bench`.

specs.py     words of the command line -> tasks and models
models.py    a model's configuration, scaled to a number of parameters
mamba.py     the Mamba baseline on memzoo's scan
cell.py      one task, one model, one seed: trained by Trainer, measured at every length
runner.py    all of them into a folder, going on where an earlier run stopped
report.py    results.md and the pictures from results.json
command.py   the options
suites.py    what --full and --sanity run
"""
