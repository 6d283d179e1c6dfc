"""How a training's processes are started, watched and ended.

`backend` is the one interface: a back-end runs a program in many ranks and comes back when they
have ended. `local` does it with torchrun on this machine; `process_group` starts and ends a group
of processes so that none is left behind. `slurm` submits a batch job and watches it from a machine
that does not train; `slurm_script` is what the job runs, with a `node_agent` on every node.
"""
