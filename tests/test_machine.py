"""harness/machine.py: which device is taken, and what --tf32 sets."""

import pytest
import torch

import teacher
from harness import machine
from harness.flags import UserError


def flags(*words):
    return teacher.parse_args(["--arch", "resnet8", *words])


def test_a_gpu_that_pytorch_cannot_use_gets_a_line_unless_the_user_hides_it(monkeypatch, capsys):
    monkeypatch.setattr(machine.Path, "exists", lambda self: str(self) == "/proc/driver/nvidia/version")
    for hidden in ("", None):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "") if hidden == "" else monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert machine.pick_device(0).type == "cpu"
        assert ("warning: a GPU driver is here, but PyTorch" in capsys.readouterr().err) == (hidden is None)


@pytest.mark.parametrize(
    ("capability", "archs", "old"),
    [
        ((6, 1), ["sm_75", "sm_80", "sm_90a", "compute_120"], True),
        ((7, 5), ["sm_75", "sm_120"], False),
        ((12, 1), ["sm_90", "sm_100f"], False),
    ],
)
def test_a_gpu_older_than_pytorchs_kernels_is_refused(capability, archs, old, monkeypatch):
    gpu = {"is_available": True, "device_count": 1, "set_device": None, "get_device_name": "a GPU"}
    for name, value in (gpu | {"get_device_capability": capability, "get_arch_list": archs}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    if old:
        with pytest.raises(
            UserError, match=r"a GPU \(sm_61\) is older than the kernels of this PyTorch \(from sm_75\)"
        ):
            machine.pick_device(0)
    else:
        assert machine.pick_device(0) == torch.device("cuda", 0)


def test_tf32_can_be_switched_off():
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    try:
        machine.set_up(flags(), torch.device("cpu"))
        assert [place.allow_tf32 for place in places] == before
        machine.set_up(flags("--tf32", "off"), torch.device("cpu"))
        assert [place.allow_tf32 for place in places] == [False, False]
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value
