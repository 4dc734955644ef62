"""Start the command line: as `python -m stockade`, or by path from the installed `stockade`, without `site`."""

import sys

if not __package__:
    sys.path.append(__file__.rpartition("/")[0].rpartition("/")[0])

from stockade.cli import main

sys.exit(main(sys.argv[1:]))
