"""Exports a network for use without this repository, by torch.export or as ONNX."""

import argparse
import copy
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoint import Checkpoint
from harness.files import write_atomically
from harness.flags import Fault
from harness.sources import read_for


class _FromPixels(nn.Module):
    """A network that normalises its own images."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def exported(backbone: nn.Module, about: Mapping[str, Any], onnx: bool = False) -> bytes:
    """The network in eval mode on the CPU: RGB images (N, 3, side, side) in [0, 1] → logits (N, classes), any N ≥ 1.

    It normalises the images itself. The bytes are for `torch.export.load` or, with `onnx` (which needs the packages
    onnx and onnxscript), for any ONNX runtime. `backbone` does not change.

    Args:
        about: mean, std and side, and whatever else the file should say of the network, such as the names of its
            classes: in a .pt2 file as JSON in the extra file "about", in an ONNX file in its metadata.

    Raises:
        Fault: read back, the exported network answers differently.
    """
    network, side = _FromPixels(copy.deepcopy(backbone).cpu(), about["mean"], about["std"]).eval(), about["side"]
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(network, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    words = json.dumps(dict(about))
    content, answer = (_as_onnx if onnx else _as_pt2)(program, words, images)  # three images, because tracing saw two
    if not torch.allclose(answer, network(images), rtol=1e-4, atol=1e-4):
        raise Fault("the exported network, read back, does not answer like the original; nothing was written")
    return content


def _as_pt2(program: torch.export.ExportedProgram, about: str, images: Tensor) -> tuple[bytes, Tensor]:
    """The bytes of the file, and what the network in them answers."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"about": about})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()(images)


def _as_onnx(program: torch.export.ExportedProgram, about: str, images: Tensor) -> tuple[bytes, Tensor]:
    import onnx.reference  # an optional package

    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    model = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    for name, value in json.loads(about).items():
        model.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value))
    content = model.SerializeToString()
    (answer,) = onnx.reference.ReferenceEvaluator(content).run(None, {"images": images.numpy()})
    return content, torch.from_numpy(answer)


def export(found: Checkpoint, args: argparse.Namespace) -> None:
    """Writes a checkpoint's network to the file `args.export`, whose suffix decides the format: .pt2 or .onnx.

    If the checkpoint does not say how its images were normalised, the data set of the flags does.
    """
    about, file = found.about, Path(args.export)
    if not {"classes", "mean", "std", "side"} <= about.keys():
        about = read_for(args, about, found.file).about | about
    network = found.network(about["classes"], about["side"])
    write_atomically(file, exported(network, {"arch": found.arch} | about, file.suffix == ".onnx"))
    print(f"exported: {file}, read back and checked; it takes RGB pixels in [0, 1] and normalises them", flush=True)
