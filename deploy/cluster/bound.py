"""`python -m deploy.cluster.bound PARENT SIGNAL FOLDER PROGRAM ARGUMENT...`: becomes the program, in that folder.

The program gets the signal when PARENT ends.

Ray ends an actor's process with its node's raylet, but not what that process has started.
"""

from __future__ import annotations

import os
import signal
import sys

from stoker_proto.host.process import end_with_parent


def main(arguments: list[str]) -> None:
    """Does not return, unless the parent has ended already."""
    parent, number, folder, *command = arguments
    os.chdir(folder)
    if end_with_parent(int(parent), signal.Signals(int(number))):
        os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
