"""What both entries share: errors and signals, flags, the device and its meters, files, and the record of a run."""

from .errors import Fault, UserError, entry, user_errors
from .files import digest, fingerprint, read, restoring, save, state, write_atomically
from .flags import Parser, add_common_flags, check_arch, check_milestones, data_name, number
from .pictures import similarity_pair, views_grid
from .run import Run
from .training import (
    Meter,
    Precision,
    accuracy,
    compiled,
    evaluate,
    make_sgd,
    optimizer_state,
    pick_device,
    progress,
    restore_optimizer,
    set_up_torch,
)

__all__ = [
    "Fault",
    "Meter",
    "Parser",
    "Precision",
    "Run",
    "UserError",
    "accuracy",
    "add_common_flags",
    "check_arch",
    "check_milestones",
    "compiled",
    "data_name",
    "digest",
    "entry",
    "evaluate",
    "fingerprint",
    "make_sgd",
    "number",
    "optimizer_state",
    "pick_device",
    "progress",
    "read",
    "restore_optimizer",
    "restoring",
    "save",
    "set_up_torch",
    "similarity_pair",
    "state",
    "user_errors",
    "views_grid",
    "write_atomically",
]
