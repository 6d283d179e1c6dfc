"""`python -m operations COMMAND`: the command `grace`, where its script is not on the path."""

from operations.cli import main

main()
