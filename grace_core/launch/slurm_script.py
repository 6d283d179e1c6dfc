"""The two scripts of a SLURM job: what the batch shell runs, and what every node runs below it.

The batch shell starts one agent a node and waits. Three things may stop the ranks, which then save
and end with 143, and the shell must tell them apart:

- the time limit comes near: SLURM warns the batch shell alone (USR1), which tells the agents;
- preemption: SLURM tells every process of the job (TERM), first or at once with the requeue;
- a cancellation: SLURM tells every process too, but the job is no longer RUNNING by then.

So the job is requeued when it is still RUNNING after a stop, and left to SLURM otherwise, as it is
when a node was lost.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from grace_core.config.launch import Launch, SlurmLaunch
from grace_core.launch.backend import Program
from grace_core.launch.slurm_files import SlurmFiles
from grace_core.training.stopping import STOPPED

_LEFT_BEHIND_SECONDS = 30
"""After the first agent ended; ranks that lost their peers notice sooner, or never."""


def batch_script(launch: Launch, files: SlurmFiles, first_attempt: int) -> str:
    """The script that is submitted; see the module's text.

    first_attempt: number of the folder that keeps the ranks' output of the job's first start.
    """
    assert isinstance(launch.backend, SlurmLaunch)
    options = "\n".join(f"#SBATCH {option}" for option in _options(launch, files))
    cpus = launch.processes * launch.threads_per_process
    out, err = (shlex.quote(_format(files.node_log("%n", name))) for name in ("stdout", "stderr"))
    return f"""#!/bin/bash
{options}

set -u
restarts=${{SLURM_RESTART_COUNT:-0}}
end={shlex.quote(str(files.ends))}/end-$SLURM_JOB_ID.json
cancelled={shlex.quote(str(files.ends))}/cancelled-$SLURM_JOB_ID
rm -f "$end"

say() {{ echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((restarts + 1)): $*"; }}

finish() {{  # certain even when slurmctld has forgotten the job
    printf '{{"exit_code": %d, "restarts": %d}}\\n' "$1" "$restarts" > "$end.new"
    mv "$end.new" "$end"
    exit "$1"
}}

state() {{
    scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\\([A-Z_]*\\).*/\\1/p'
}}

warned=
trap 'warned=1; say "the time limit is near, or someone asks for a stop"' USR1
trap 'say "told to end"' TERM  # so are the agents; wait for them
say "on $SLURM_JOB_NODELIST"
srun --kill-on-bad-exit=0 --wait={_LEFT_BEHIND_SECONDS} --cpus-per-task={cpus} \\
    --open-mode=append --output={out} --error={err} \\
    bash {shlex.quote(str(files.node_script))} "$(({first_attempt} + restarts))" &
step=$!
while kill -0 "$step" 2> /dev/null; do
    if [ -n "$warned" ]; then scancel --quiet --signal=USR1 "$SLURM_JOB_ID.0"; fi
    sleep 1 &
    wait "$!"
done
wait "$step"
code=$?
say "agents ended with $code"
if [ "$code" -eq 0 ]; then finish 0; fi

until found=$(state) && [ -n "$found" ]; do sleep 2; done
if [ "$found" != RUNNING ] || [ -e "$cancelled" ]; then
    say "left to SLURM ($found)"
    exit "$code"
fi
if [ "$code" -ne {STOPPED} ]; then finish "$code"; fi
if [ "$restarts" -ge {launch.backend.max_restarts} ]; then
    say "stopped, and not requeued: {launch.backend.max_restarts} restarts are allowed"
    finish {STOPPED}
fi
say "stopped; requeued to continue"
for try in $(seq 30); do
    scontrol requeue "$SLURM_JOB_ID" && exit {STOPPED}
    sleep 2
done
say "could not be requeued"
finish {STOPPED}
"""


def node_script(launch: Launch, program: Program) -> str:
    """What srun starts on each node, with the number of the attempt as its argument."""
    assert isinstance(launch.backend, SlurmLaunch)
    command = [
        sys.executable,
        "-m",
        "grace_core.launch.node_agent",
        f"--processes={launch.processes}",
        f"--logs={program.logs.absolute()}",
    ]
    program_and_arguments = shlex.join([program.module, *program.arguments])
    setup = "".join(f"{line}\n" for line in launch.backend.setup)
    return f"""#!/bin/bash
trap '' USR1  # the agent listens to it, once it is there; sent again until then
set -e
{setup}exec {shlex.join(command)} --attempt="$1" -- {program_and_arguments}
"""


def _options(launch: Launch, files: SlurmFiles) -> Iterator[str]:
    slurm = launch.backend
    assert isinstance(slurm, SlurmLaunch)
    gpus = slurm.gpus_per_node
    if gpus is None:
        gpus = 0 if launch.device == "cpu" else launch.processes
    yield f"--job-name={files.job_name}"
    yield f"--nodes={launch.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={launch.processes * launch.threads_per_process}"
    if gpus:
        yield f"--gpus-per-node={gpus}"
    if slurm.memory_gb is not None:
        yield f"--mem={slurm.memory_gb}G"
    for name in ("partition", "account", "qos", "constraint"):
        if (value := getattr(slurm, name)) is not None:
            yield f"--{name}={shlex.quote(value)}"
    if slurm.time_limit_minutes is not None:
        yield f"--time={slurm.time_limit_minutes}"
    yield f"--signal=B:USR1@{slurm.warning_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={shlex.quote(_format(files.job_log))}"
    yield f"--chdir={shlex.quote(os.getcwd())}"
    yield from slurm.options


def _format(path: Path) -> str:
    """A path as SLURM's file name patterns write it; `%n` stands for the node's number."""
    folder = str(path.parent).replace("%", "%%")
    return f"{folder}/{path.name}"
