"""The failure matrix: the pipeline through Prefect, while things are killed at random moments.

    make chaos                        60 faults, a seed of its own
    python -m tests.chaos --seed 7    the same moments again, as far as processes allow

A *round* runs the tiny configuration `chaos.yaml` from nothing to its released models. It takes
several *attempts* (flow runs), since faults end most of them; the next attempt goes on where the
one before was stopped. After each attempt and each round `checks` looks for what must hold.

`servers` starts Prefect, MLflow and a worker so that they can be killed; `view` finds processes
and the stage at work; `faults` has one entry a fault; `attempt` runs one flow run with its faults;
`rounds` makes the plan; `report` shows what happened.
"""
