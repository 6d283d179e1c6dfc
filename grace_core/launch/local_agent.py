"""torchrun on this machine, which leaves when the process that started it is gone.

    python -m grace_core.launch.local_agent TORCHRUN_ARGUMENTS...

The kernel sends SIGTERM then (`process_group`), which torchrun turns into an exception. That may be
lost in whatever it interrupts, and the agent would live on without its flow.
"""

from __future__ import annotations

import sys

from grace_core.orphans import be_parent, end_after_parent


def main(arguments: list[str]) -> None:
    end_after_parent()
    be_parent()
    from torch.distributed.run import main as torchrun

    torchrun(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
