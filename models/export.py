"""Write a network for use without this repository, by torch.export."""

import copy
import io

import torch
from torch import nn


class ExportError(RuntimeError):
    """The exported network does not answer as the network does."""


def exported(backbone: nn.Module, side: int = 32) -> bytes:
    """The network in eval mode on the CPU: normalised images (N, 3, side, side) → logits (N, classes), any N ≥ 1.

    `torch.export.load` reads these bytes; here they are read back and must answer as `backbone`, which stays as it is.
    """
    network = copy.deepcopy(backbone).cpu().eval()
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(network, (images[:2],), dynamic_shapes=({0: torch.export.Dim("N")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    answer = torch.export.load(buffer).module()(images)  # three images, for the trace has seen two
    try:
        torch.testing.assert_close(answer, network(images), rtol=1e-4, atol=1e-4)
    except AssertionError as error:
        raise ExportError(f"the exported network answers otherwise: {' '.join(str(error).split())}") from None
    return buffer.getvalue()
