"""`grace bench`: how fast the training is on this machine, beside a plain implementation.

`shapes` says what is computed, `floors` how fast it could be at best, `plain` is the implementation
to compare with, `random_models` and `samples` make models and packed rows from nothing, `cases` are
the rows of the table, `measure` times them, `table` and `report` show them.
"""
