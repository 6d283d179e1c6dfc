"""The training of a stage, as a group of processes.

`job` is what a process is told, `worker` its entry point, `loop` the only training loop, `zero`
derives DeepSpeed's settings, `optimizer` the parameter groups and the schedule, `checkpoint` saves
and resumes. `teacher_pass` records a teacher's outputs, `teacher_outputs` is how they lie on disk.
"""
