"""Runs a script in several processes, all but the last of which it kills: python killer.py MOMENTS SCRIPT FLAGS…

MOMENTS has one number for each process to kill, with commas between them. A whole number N sends SIGKILL at the N-th
touch of the disk (fsync, replace or pwrite); a number with a decimal point ends the process after so many seconds,
wherever it is. The last line of the output lists the exit status of each process.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import torch
import torch.utils.flop_counter  # here, since they take seconds that each process would spend again
import torchvision.utils  # noqa: F401


def die_at(moment: str) -> None:
    if "." in moment:
        signal.setitimer(signal.ITIMER_REAL, float(moment))  # nobody handles SIGALRM, so it is as deadly as SIGKILL
        return
    left = int(moment)

    def deadly(function):
        def touch(*args):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return touch

    os.fsync, os.replace, os.pwrite = map(deadly, (os.fsync, os.replace, os.pwrite))


if __name__ == "__main__":
    _, moments, script, *flags = sys.argv
    sys.path.insert(0, str(Path(__file__).parent.parent))
    entry = importlib.import_module(script.removesuffix(".py"))  # once: forked processes start at once
    statuses = []
    for moment in [*moments.split(","), None]:
        child = os.fork()
        if child == 0:
            for path in Path().rglob("*.pth"):
                torch.load(path, weights_only=True)  # whatever the killed process left can be read
            if moment is not None:
                die_at(moment)
            entry.main(flags)
            sys.exit()
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(*statuses)
