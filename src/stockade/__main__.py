"""Start the command line: as `python -m stockade`, or by path from the installed `stockade`, without `site`."""

import sys

if not __package__:
    sys.path.append(__file__.rpartition("/")[0].rpartition("/")[0])

try:
    from stockade.cli import main

    status = main(sys.argv[1:])
except KeyboardInterrupt:
    # It came before there was anything to interrupt, while modules were imported.
    sys.stderr.write("interrupted\n")
    status = 130
sys.exit(status)
