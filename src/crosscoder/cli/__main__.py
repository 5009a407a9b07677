"""`python -m crosscoder.cli`: the same as the command `crosscoder`."""

from crosscoder.cli.app import main

main()
