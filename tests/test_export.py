"""harness.export: the network that torch.export.load reads back."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import fill, hashed
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf

from harness.checkpoint import Checkpoint
from harness.export import exported, exported_checkpoint
from harness.flags import Fault
from models import model_dict

PLAIN = [0.0] * 3, [1.0] * 3  # no normalisation


def read_back(program: bytes) -> nn.Module:
    return torch.export.load(io.BytesIO(program)).module()


def small() -> nn.Module:
    """(N, 3, any, any) → (N, 2), another answer in train mode."""
    return fill(nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))


def test_the_exported_network_answers_like_the_network_in_eval_mode_for_any_batch():
    model = fill(model_dict["resnet8"](num_classes=10))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    answer = read_back(exported(model, mean.tolist(), std.tolist()))
    model.eval()
    with torch.no_grad():
        for count in (1, 5):
            pixels = hashed(count, (count, 3, 32, 32)).float() / 2 + 0.5
            images = tvf.normalize(pixels, mean, std)
            torch.testing.assert_close(answer(pixels), model(images), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_is_exported_by_what_it_says_itself_and_else_by_the_data_set(monkeypatch):
    monkeypatch.setitem(model_dict, "small", lambda num_classes: small())
    network, pixels = small().eval(), hashed(1, (4, 3, 8, 8)).float()
    own = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    checkpoint = Checkpoint(Path("best.pth"), "small", own, None, network.state_dict())
    of_data_set = {"classes": 2, "side": 8, "mean": [0.0] * 3, "std": [1.0] * 3}
    answer = read_back(exported_checkpoint(checkpoint, of_data_set, "network.pt2"))(pixels)
    torch.testing.assert_close(answer, network(tvf.normalize(pixels, **own)), rtol=1e-4, atol=1e-4)


def test_exporting_leaves_the_network_and_the_random_numbers_as_they_are():
    network = small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    draws = torch.get_rng_state()
    exported(network, *PLAIN)
    assert all(module.training for module in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_network_that_is_read_back_wrong_is_not_returned(monkeypatch):
    network = small().eval()

    def off(images: Tensor) -> Tensor:
        return network(images) + torch.tensor([0.0, 0.01])

    monkeypatch.setattr(torch.export, "load", lambda _: SimpleNamespace(module=lambda: off))
    with pytest.raises(Fault, match="(?s)answers differently.*Mismatched elements: 3 / 6"):
        exported(network, *PLAIN)


def test_onnx_answers_like_the_network_for_any_batch():
    reference = pytest.importorskip("onnx.reference", reason="ONNX is no requirement")
    pytest.importorskip("onnxscript", reason="ONNX is no requirement")
    network, images = small(), hashed(1, (5, 3, 8, 8)).float()
    content = exported(network, [0.5] * 3, [0.25] * 3, side=8, onnx=True)
    (answer,) = reference.ReferenceEvaluator(content).run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), network.eval()((images - 0.5) / 0.25).detach())
