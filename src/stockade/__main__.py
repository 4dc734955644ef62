"""Start the command line: as `python -m stockade`, or by path from the installed `stockade`, without `site`."""

import os
import sys

if not __package__:
    # As the installed `stockade` has it, `…/bin/../lib/…`, it would be so in every message that names a file.
    sys.path.append(os.path.realpath(__file__).rpartition("/")[0].rpartition("/")[0])

try:
    from stockade.cli import main

    status = main(sys.argv[1:])
except KeyboardInterrupt:
    # It came before there was anything to interrupt, while modules were imported.
    sys.stderr.write("interrupted\n")
    status = 130
try:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
except OSError:
    sys.exit(status)
# Every file is closed and every child waited for: to free memory piece by piece would take as long as a short verb.
os._exit(status)
