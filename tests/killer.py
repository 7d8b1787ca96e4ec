"""Runs a script that is killed with SIGKILL at its N-th touch of the disk: python killer.py N SCRIPT FLAGS…"""

import os
import runpy
import signal
import sys


def deadly(function, lives):
    def touch(*args, **kwargs):
        lives[0] -= 1
        if lives[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return touch


if __name__ == "__main__":
    _, number, script, *flags = sys.argv
    lives = [int(number)]
    os.fsync, os.replace, os.pwrite = (deadly(touch, lives) for touch in (os.fsync, os.replace, os.pwrite))
    sys.argv = [script, *flags]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
