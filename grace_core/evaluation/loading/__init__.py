"""Benchmark rows from the Hugging Face Hub or from files on this machine, checked column by column.

`place` finds the files, `tables` reads their rows, `cells` checks and converts values, `rows` puts
these together, and `prepared` keeps the result for all models of a run.
"""
