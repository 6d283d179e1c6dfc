"""`python -m grace_core.cli`: the commands of the core, where no `grace` is installed."""

from grace_core.cli import main

main()
