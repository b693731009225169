"""The typed schema of the resolved configuration, one file for each group of options.

    train.py, eval.py       the options of the two programs, and what must fit together
    model.py                model.*, size.* and extension.*
    data.py optim.py        data.*, optim.*
    trainer.py              trainer.*, logger.*
    values.py sections.py   the kinds of values and of sections that these are made of

Nothing heavy is imported.
"""
