"""Runs scripts in several processes, as torchrun does, but torch is imported once: python several.py JOB…

A job is a list in JSON: how many processes, what to patch (see `PATCHES`), script, flags. The output has a line for
each job with the exit status of each of its processes.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
import torch.utils.flop_counter  # here, since they take seconds that each process would spend again
import torchvision.utils  # noqa: F401
from conftest import end_of

import cifar
import utils
from harness import processes


def float64():
    """Everything in float64, so that a run of several processes differs from that of one by 1e-12 at most."""
    torch.set_default_dtype(torch.float64)
    utils.DTYPES["off"] = torch.float64
    normalise = cifar.Images.normalise
    cifar.Images.normalise = lambda self, padded: normalise(self, padded).double()


def one_graph():
    """Compiles to one graph as `--compile` does, but quickly."""

    def compiled(function, wanted, device):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager") if wanted else function

    utils.compiled = compiled


def last_dies():
    """The last process ends in its sixth step."""
    step, left = utils.SGD.step, iter(range(5))

    def deadly(self, loss):
        if next(left, None) is None and processes.RANK == processes.COUNT - 1:
            os._exit(9)
        step(self, loss)

    utils.SGD.step = deadly


PATCHES = {"float64": float64, "one_graph": one_graph, "last_dies": last_dies}


def start(rank, count, port, patches, script, flags):
    child = os.fork()
    if child:
        return child
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    processes.RANK, processes.COUNT = rank, count
    for name in patches:
        PATCHES[name]()
    status = end_of(importlib.import_module(script.removesuffix(".py")).main, flags)
    sys.stdout.flush()
    os._exit(status)  # the store belongs to the parent


if __name__ == "__main__":
    for job in sys.argv[1:]:
        count, *work = json.loads(job)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun has one, too
        children = [start(rank, count, store.port, *work) for rank in range(count)]
        print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
