"""harness.export: the network that torch.export.load reads back."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from oracle import fill, hashed
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf

from harness.checkpoint import Checkpoint
from harness.export import export, exported
from harness.flags import Fault
from models import model_dict

PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3, "side": 32}  # no normalisation


def read_back(program: bytes) -> nn.Module:
    return torch.export.load(io.BytesIO(program)).module()


def small() -> nn.Module:
    """(N, 3, any, any) → (N, 2), another answer in train mode."""
    return fill(nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))


def test_the_exported_network_answers_like_the_network_in_eval_mode_for_any_batch():
    model = small()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    answer = read_back(exported(model, PLAIN | {"mean": mean.tolist(), "std": std.tolist()}))
    model.eval()
    with torch.no_grad():
        for count in (1, 5):
            pixels = hashed(count, (count, 3, 32, 32)).float() / 2 + 0.5
            images = tvf.normalize(pixels, mean, std)
            torch.testing.assert_close(answer(pixels), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("complete", [True, False])
def test_a_checkpoint_is_exported_by_what_it_says_itself_and_else_by_the_data_set(complete, tmp_path, monkeypatch):
    about, of_data_set = {"classes": 2, "side": 8}, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    if complete:
        about |= of_data_set
    read_for = None if complete else lambda *_: SimpleNamespace(about=of_data_set | {"side": 16})
    monkeypatch.setattr("harness.export.read_for", read_for)  # a complete checkpoint needs no image
    monkeypatch.setitem(model_dict, "small", lambda num_classes: small())
    network, pixels, file = small().eval(), hashed(1, (4, 3, 8, 8)).float(), tmp_path / "network.pt2"
    export(Checkpoint(Path("best.pth"), "small", about, None, network.state_dict()), SimpleNamespace(export=str(file)))
    expected = network(tvf.normalize(pixels, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    torch.testing.assert_close(read_back(file.read_bytes())(pixels), expected, rtol=1e-4, atol=1e-4)
    torch.export.load(file, extra_files=(said := {"about": ""}))
    assert json.loads(said["about"]) == about | of_data_set | {"arch": "small"}


def test_exporting_leaves_the_network_and_the_random_numbers_as_they_are():
    network = small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    draws = torch.get_rng_state()
    exported(network, PLAIN)
    assert all(module.training for module in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_network_that_is_read_back_wrong_is_not_returned(monkeypatch):
    network = small().eval()

    def off(images: Tensor) -> Tensor:
        return network(images) + torch.tensor([0.0, 0.01])

    monkeypatch.setattr(torch.export, "load", lambda _: SimpleNamespace(module=lambda: off))
    with pytest.raises(Fault, match="does not answer like the original"):
        exported(network, PLAIN)


def test_onnx_answers_like_the_network_for_any_batch():
    network, images = small(), hashed(1, (5, 3, 8, 8)).float()
    about = {"mean": [0.5] * 3, "std": [0.25] * 3, "side": 8, "names": ["cat", "dög"], "arch": "small"}
    content = exported(network, about, onnx=True)
    model = onnx.load_from_string(content)
    said = {entry.key: entry.value for entry in model.metadata_props if entry.key in about}
    assert (said.pop("arch"), {key: json.loads(value) for key, value in said.items()} | {"arch": "small"}) == (
        "small",
        about,
    )
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    (answer,) = ReferenceEvaluator(content).run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), network.eval()((images - 0.5) / 0.25).detach())
