"""The machine on which a script computes: its device, which is chosen and set up here, and its memory."""

import argparse
import contextlib
import ctypes
import os
import platform
import random
from pathlib import Path

import numpy as np
import torch

from harness import processes
from harness.flags import UserError, warn


def pick_device(gpu_id: int) -> torch.device:
    """CUDA `gpu_id`, else Apple's MPS, else the CPU; prints a line. Each process of torchrun has a device of its own.

    Raises:
        UserError: CUDA has no such device.
    """
    several = processes.COUNT > 1
    if several:
        gpu_id = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if gpu_id >= torch.cuda.device_count():
            wanted = f"torchrun's process {gpu_id} on this machine" if several else f"--gpu-id {gpu_id}"
            raise UserError(f"{wanted}: this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}")
        device = torch.device("cuda", gpu_id)
        torch.cuda.set_device(device)
        _check_kernels(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() and not several else "cpu")
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # the user wants no GPU
        if not hidden and Path("/proc/driver/nvidia/version").exists():
            made = f"was made for CUDA {torch.version.cuda}" if torch.version.cuda else "was made without CUDA"
            advice = "install one that fits the driver (nvidia-smi shows its CUDA), or a newer driver"
            warn(f"a GPU driver is here, but PyTorch {made} and can't use it, so this runs on the CPU: {advice}")
        elif gpu_id and not several:
            warn(f"--gpu-id {gpu_id}: PyTorch finds no CUDA device here, so this runs on the {device}")
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"device: {device} ({device_name(device)}{threads})", flush=True)
    return device


def _check_kernels(device: torch.device) -> None:
    """Raises UserError if the GPU is older than all kernels of this PyTorch."""
    own = "{}{}".format(*torch.cuda.get_device_capability(device))
    made_for = [int(arch.partition("_")[2].rstrip("af")) for arch in torch.cuda.get_arch_list()]
    if made_for and int(own) < min(made_for):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} (sm_{own}) is older than the kernels of this PyTorch (from "
            f"sm_{min(made_for)}): install an older PyTorch, or one for an older CUDA"
        )


def set_up(args: argparse.Namespace, device: torch.device) -> None:
    """Seeds all random generators and chooses fast or repeatable algorithms (`--deterministic`, `--tf32`)."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = not args.deterministic  # shapes are static: searching for the fastest kernel pays
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results only with this
    torch.use_deterministic_algorithms(args.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it did not write
    if args.tf32 == "off":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cuda" and args.amp == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        warn(f"--amp bf16: {torch.cuda.get_device_name(device)} emulates it; --amp fp16 is faster there")
    if device.type == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Lets glibc keep up to 1 GB of freed memory.

    By default it returns large blocks to the system and fetches them again, page by page, in every step. That costs
    8 % of a step of wrn_40_2 → wrn_16_2 and 1 % of resnet20 → resnet8 (2 cores). Without glibc nothing changes.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 1 << 30)


def device_name(device: torch.device) -> str:
    """The product name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
