"""Making a recorded model again: what to run, what differs beforehand, and whether it is the same.

`plan` turns a recorded lineage into stages to run, `inputs` compares what is here with what was
used, `verdict` compares what came out. The stages themselves are run by `grace_core.cli.remake`.
"""
