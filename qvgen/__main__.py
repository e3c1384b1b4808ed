"""`python -m qvgen`: the `qvgen` command."""

from qvgen.command import main

main()
