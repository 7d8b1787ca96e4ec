"""harness.checkpoint: which checkpoint, which network, whose weights."""

import argparse
import datetime
import io
import math
import random
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import NAMES, fill
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.checkpoint import find_checkpoint, read, run_folder_of, teacher_name
from harness.flags import UserError
from models import load, model_dict

STUDENT_RUN = "sskd_student_{}_weight0.1+0.9+2.7+10.0_T4.0+4.0+0.5_ratio1.0+0.75_seed0_{}"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return fill(model_dict["resnet8"]()).state_dict()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def with_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).state_dict()
    return prefixed(state, "backbone.") | prefixed(head, "proj_head.")


def save(content: object, file: Path, zipped: bool = True) -> Path:
    """Saves in the format of PyTorch 1.6 and later, or (not `zipped`) in the older one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = model.state_dict()
    assert list(loaded) == list(state)
    for name, value in loaded.items():
        assert torch.equal(value, state[name]), name


def complaint(path: Path, **kwargs) -> str:
    """The message of the UserError in which loading ends."""
    with pytest.raises(UserError) as caught:
        load(path, **kwargs)
    message = str(caught.value)
    assert str(path) in message and len(message.splitlines()) == 1
    return message


# --- layouts ---

LAYOUTS = {
    "published SSKD teacher": lambda s: {"epoch": 240, "state_dict": s, "acc": 0.7},
    "RepDistiller": lambda s: {"opt": argparse.Namespace(lr=0.05), "model": s, "best_acc": np.float32(70)},
    "mdistiller": lambda s: {"epoch": 240, "model": prefixed(s, "module."), "best_acc": 70.0},
    "mdistiller student": lambda s: {
        "model": prefixed(s, "module.student.") | prefixed(s, "module.teacher.") | {"module.reg.bias": torch.ones(2)}
    },
    "plain state dict": lambda s: s,
    "older than batch counters": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    "student": lambda s: {"state_dict": prefixed(s, "student.")},
    "Wrapper": with_head,
    "our student": lambda s: {"state_dict": with_head(s), "best_acc": 70.0},
    "DataParallel Wrapper": lambda s: {"state_dict": prefixed(with_head(s), "module.")},
    "compiled Wrapper": lambda s: prefixed(with_head(s), "_orig_mod."),
    "compiled backbone in a Wrapper": lambda s: prefixed(s, "module.backbone._orig_mod."),
    "HSAKD": lambda s: {"net": s, "acc": 0.7, "epoch": 239},
    "HSAKD teacher": lambda s: {"net": prefixed(s, "backbone.") | {"auxiliary_classifier.fc1.bias": torch.ones(400)}},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(100)}},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {}, "loss": 0.1},
    "net in a module": lambda s: prefixed(s, "module.net."),
    "nested": lambda s: {"state_dict": {"model": prefixed(s, "_orig_mod.module.")}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_known_layout_loads_without_drawing_a_random_number(layout, state, tmp_path):
    for zipped in (False, True):
        save(LAYOUTS[layout](state), tmp_path / "teacher_resnet8_seed0" / "ckpt" / "best.pth", zipped)
        draws = torch.get_rng_state()
        assert_holds(load(tmp_path / "teacher_resnet8_seed0"), state)
        assert torch.equal(torch.get_rng_state(), draws)


class WithBody(nn.Module):
    """A network whose own names look like a wrapper's, and like RepDistiller's classifier."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.backbone = nn.ModuleDict({"stem": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(4)})
        self.classifier = nn.Sequential(nn.Linear(4, num_classes))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.student."])
def test_a_network_whose_own_names_look_like_wrappers_loads(prefix, tmp_path, monkeypatch):
    monkeypatch.setitem(model_dict, "mine", WithBody)
    state = fill(WithBody(100)).state_dict()
    content = prefixed(state, prefix) | ({"proj_head.0.weight": torch.ones(4, 4)} if prefix == "backbone." else {})
    assert_holds(load(save(content, tmp_path / "best.pth"), arch="mine"), state)


def test_repdistillers_mobilenet_loads_despite_its_other_classifier_name(tmp_path):
    state = fill(model_dict["MobileNetV2"]()).state_dict()
    renamed = {name.replace("classifier.", "classifier.0."): value for name, value in state.items()}
    assert_holds(load(save({"model": renamed}, tmp_path / "MobileNetV2_vanilla" / "ckpt_epoch_240.pth")), state)


def test_half_precision_and_channels_last_weights_load_as_contiguous_float32(state, tmp_path):
    convolutions = {name: value for name, value in state.items() if value.dim() == 4}
    half = {name: v.half().contiguous(memory_format=torch.channels_last) for name, v in convolutions.items()}
    model = load(save(state | half, tmp_path / "best.pth"), arch="resnet8")
    assert all(p.dtype == torch.float32 and p.requires_grad and p.is_contiguous() for p in model.parameters())
    assert torch.equal(model.conv1.weight, state["conv1.weight"].half().float())


# --- which file ---


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["ckpt/best.pth", "ckpt/last.pth", "ckpt/240.pth"], "ckpt/best.pth"),
        (["ckpt/student_best.pth", "ckpt/teacher.pth", "ckpt/last.pth"], "ckpt/student_best.pth"),
        (["model_BEST.pth.tar"], "model_BEST.pth.tar"),
        (["ckpt/student_best.pth", "ckpt/best.pth", "ckpt/b_best.pth"], "ckpt/best.pth"),
        (["best.json", "best.pth.tmp", "ckpt/best.pth"], "ckpt/best.pth"),
        (["ckpt_epoch_240.pth"], "ckpt_epoch_240.pth"),
        (["ckpt/240.pt", "ckpt/last.pth", "ckpt/ss_head_01.pth", "log.txt", "README"], "ckpt/240.pt"),
    ],
)
def test_a_folder_stands_for_its_best_or_only_checkpoint(files, found, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert find_checkpoint(tmp_path) == tmp_path / found
    assert find_checkpoint(str(tmp_path / files[-1])) == tmp_path / files[-1]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["ckpt/last.pth"], "no checkpoint with 'best' in its name, here or in ckpt/; give the file"),
        (["ckpt/040.pth", "ckpt/080.pth"], "but 2 others; give the file"),
    ],
)
def test_a_folder_without_a_single_best_checkpoint_is_refused(files, words, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert words in complaint(tmp_path)
    assert "no such file" in complaint(tmp_path / "nothing.pth")


def test_the_run_of_a_checkpoint_is_found_from_inside_its_folder(state, tmp_path, monkeypatch):
    folder = tmp_path / "teacher_resnet8_seed0"
    save(state, folder / "ckpt" / "best.pth")
    monkeypatch.chdir(folder)
    assert_holds(load("."), state)
    monkeypatch.chdir("ckpt")
    assert_holds(load("best.pth"), state)
    assert run_folder_of(Path("best.pth")) == folder


# --- which network ---


@pytest.mark.parametrize(
    ("file", "arch"),
    [
        ("teacher_wrn_40_2_seed0/ckpt/best.pth", "wrn_40_2"),
        ("teacher_vgg13/best.pth", "vgg13"),
        ("teacher_vgg13/resnet8.pth", "resnet8"),
        ("teacher_resnet8_mine_seed0/ckpt/best.pth", "resnet8_mine"),
        (STUDENT_RUN.format("wrn_16_2", "teacher_wrn_40_2_seed0") + "/ckpt/student_best.pth", "wrn_16_2"),
        (STUDENT_RUN.format("wrn_16_2", "teacher_wrn_40_2_seed0") + "/ckpt/teacher.pth", "wrn_40_2"),
        ("crd_student_wrn_16_2_weight0.1+0.9+0.8_T4.0_seed0_teacher_wrn_40_2_seed0/ckpt/student_best.pth", "wrn_16_2"),
        ("resnet32x4_vanilla/ckpt_epoch_240.pth", "resnet32x4"),
        ("hub/checkpoints/cifar100_resnet56-f2eff4c8.pt", "resnet56"),
        ("cifar100_baselines/dkd,res32x4,res8x4/student_best", "resnet8x4"),
        ("kd,res50,mv2/student_latest", "MobileNetV2"),
        ("train_baseline_cifar_arch_wrn_40_2_dataset_cifar100_seed0/wrn_40_2_best.pth.tar", "wrn_40_2"),
    ],
)
def test_the_name_of_the_file_or_folder_gives_the_network(file, arch, tmp_path, monkeypatch):
    monkeypatch.setitem(model_dict, "resnet8_mine", model_dict["resnet8"])
    assert read(save({"model": {"weight": torch.ones(1)}}, tmp_path / file)).arch == arch


@pytest.mark.parametrize(
    ("told", "flag", "name", "chosen"),
    [
        ({}, "resnet8", "teacher_vgg13", "resnet8"),
        ({}, "resnet8", "densenet", "resnet8"),
        ({"arch": "resnet8"}, None, "run", "resnet8"),
        ({"about": {"arch": "resnet8"}}, "vgg8", "run", "resnet8"),
        ({"arch": "resnet8_cifar"}, "resnet8", "run", "resnet8"),
    ],
)
def test_the_checkpoints_word_comes_before_the_flag_and_the_name(told, flag, name, chosen, state, tmp_path, capsys):
    file = save(told | {"state_dict": state}, tmp_path / name / "best.pth")
    assert read(file, flag).arch == chosen
    printed = capsys.readouterr().out
    differ = "vgg" in f"{flag} {name}"
    assert len(printed.splitlines()) == differ
    if differ:
        assert str(file) in printed and f"using {chosen}" in printed and "vgg" in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "it has no key 'arch', neither the file nor the folder 'downloads' is named after one"),
        ({"arch": "resnet9"}, "its key 'arch' says 'resnet9', which is unknown here"),
    ],
)
def test_without_a_known_network_the_message_lists_the_known_ones(content, words, state, tmp_path):
    message = complaint(save(content | {"state_dict": state}, tmp_path / "downloads" / "best.pth"))
    assert words in message and "--t-arch" in message and all(name in message for name in NAMES)


# --- what a checkpoint says about itself ---

ABOUT = {"arch": "resnet8", "dataset": "cifar10", "classes": 10, "side": 32, "tested": 10_000}
ABOUT |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


def test_a_checkpoint_that_says_what_it_is_needs_no_name_and_no_flag(tmp_path):
    state = fill(model_dict["resnet8"](num_classes=10)).state_dict()
    file = save({"epoch": 3, "state_dict": state, "acc": 71.5, "about": ABOUT}, tmp_path / "renamed" / "it.pth")
    checkpoint = read(tmp_path / "renamed")
    assert (checkpoint.file, checkpoint.arch, checkpoint.about, checkpoint.acc) == (file, "resnet8", ABOUT, 71.5)
    assert_holds(load(file), state)
    assert "does not fit resnet8 with 100 classes" in complaint(file, num_classes=100)


@pytest.mark.parametrize(
    ("content", "acc"),
    [
        ({"acc": 71.5}, 71.5),
        ({"accuracy": torch.tensor([71.5])}, 71.5),
        ({"acc": np.float64(71.5)}, 71.5),
        ({"acc": "high", "best_acc": 70}, 70),
        ({"acc": math.nan}, None),
        ({}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("numpy", ["numpy.core", "numpy._core"])  # as NumPy 1 and NumPy 2 save it
def test_the_reported_accuracy_is_read_whatever_kind_of_number_it_is(numpy, content, acc, state, tmp_path):
    file = save(content | {"model": state, "lr": np.float64(0.1)}, tmp_path / "resnet8.pth", zipped=False)
    own = np.float64(0).__reduce__()[0].__module__.encode()
    assert own in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(own, f"{numpy}.multiarray".encode()))
    assert read(file).acc == acc


# --- what is refused ---


WRONG_WEIGHTS = {
    "does not fit resnet14 with 100 classes: Missing key(s) in state_dict": lambda s: prefixed(s, "module."),
    "does not fit resnet8 with 10 classes: size mismatch for fc.weight": lambda s: prefixed(s, "module."),
    'Unexpected key(s) in state_dict: "layer1.1.bias"': lambda s: s | {"layer1.1.bias": torch.ones(3)},
    "holds several networks, under student. and model.": lambda s: prefixed(s, "student.") | prefixed(s, "model."),
    "'fc.bias' is not finite: the training diverged": lambda s: s | {"fc.bias": torch.full((100,), math.nan)},
    "holds no state dict": lambda s: {"state_dict": {}, "acc": 70.0},
}


@pytest.mark.parametrize("words", WRONG_WEIGHTS)
def test_wrong_weights_are_refused(words, state, tmp_path):
    asked = {"arch": "resnet14" if "resnet14" in words else "resnet8", "num_classes": 10 if " 10 " in words else 100}
    message = complaint(save(WRONG_WEIGHTS[words](state), tmp_path / "best.pth"), **asked)
    assert words in message and len(message) < 600


def test_the_file_that_a_run_resumes_from_is_refused(state, tmp_path):
    last = {"epoch": 3, "done": ["ss_head"], "best": {"acc": 1.0}, "parts": {"student": state}}
    assert "give the run's folder" in complaint(save(last, tmp_path / "ckpt" / "last.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_no_checkpoint_or_is_truncated_is_refused(zipped, state, tmp_path):
    file = save(state, tmp_path / "best.pth", zipped)
    for content in (file.read_bytes()[:-1000], b"\x80\x02hello\n"):
        file.write_bytes(content)
        assert "is not a PyTorch checkpoint, or is damaged or truncated" in complaint(file, arch="resnet8")


def test_a_flipped_bit_in_the_weights_is_refused(state, tmp_path):
    file = save(state, tmp_path / "best.pth")
    whole = file.read_bytes()
    first = whole.index(state["layer1.0.conv1.weight"].numpy().tobytes())
    for bit in range(0, 32, 5):
        flipped = bytearray(whole)
        flipped[first + bit // 8] ^= 1 << bit % 8
        torch.load(io.BytesIO(flipped), weights_only=True)  # PyTorch notices nothing
        file.write_bytes(flipped)
        assert "is damaged" in complaint(file, arch="resnet8")


class Surprise:
    """A pickle that would run code if it were trusted."""

    def __reduce__(self):
        return (pytest.fail, ("the checkpoint ran code",))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Surprise(), "_pytest.outcomes."),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (defaultdict(list, a=[1]), "collections.defaultdict"),
    ],
)
def test_a_pickle_with_objects_is_refused_and_not_run(content, named, state, tmp_path):
    message = complaint(save({"state_dict": state, "extra": content}, tmp_path / "best.pth"), arch="resnet8")
    assert f"holds a Python object ({named}" in message and "save the state dict alone" in message


# --- what people give by accident ---


def exported_program(file):
    program = torch.export.export(nn.Linear(1, 1), (torch.ones(1, 1),))
    torch.export.save(program, file)


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("a.pt2", exported_program, "is an exported network (.pt2)"),
        ("a.pth", lambda file: file.write_bytes(b"\x08\x0a\x12\x07pytorch"), "is an ONNX file"),
        ("a.pth", lambda file: file.write_bytes(b"404: Not Found"), "is a text file"),
        ("a.pth", lambda file: torch.save({"a": None}, file, pickle_protocol=5), "another pickle protocol"),
        ("a.npz", lambda file: np.savez(file, a=np.ones(3)), "is an archive of NumPy arrays"),
        ("a.h5", lambda file: file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "is an HDF5 file"),
        ("best.pth", lambda file: file.write_bytes(b"<!DOCTYPE html>\n<html>"), "is an HTML page"),
        ("best.pth", lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "a Git LFS pointer"),
        ("best.pth", lambda file: file.write_bytes(b""), "is an empty file"),
    ],
)
def test_a_file_of_another_kind_is_told_what_it_is(name, write, says, tmp_path):
    write(tmp_path / name)
    message = complaint(tmp_path / name, arch="resnet8")
    assert says in message and "damaged" not in message


def test_safetensors_are_read_and_a_damaged_file_is_refused(state, tmp_path):
    file = tmp_path / "resnet8.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    assert_holds(load(tmp_path), state)
    file.write_bytes(file.read_bytes()[:-8])
    assert "is damaged or truncated" in complaint(file)


def test_without_the_library_a_safetensors_file_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "resnet8.safetensors").write_bytes(b'\x02\0\0\0\0\0\0\0{"}')
    assert "pip install safetensors" in complaint(tmp_path)


BESIDE = {
    "NumPy scalars": [np.float32(1), np.bool_(True), np.str_("a"), np.complex64(1)],
    "arrays": {"confusion": np.ones((2, 2)), "names": np.array(["cat", "dog"]), "when": np.array(["2020"], "M8[s]")},
    "dates": [datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc), datetime.timedelta(1)],  # noqa: UP017
    "random states": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
    "paths": [Path("a/b"), PureWindowsPath("a")],
    "flags": [Namespace(lr=0.1), SimpleNamespace(lr=0.1), {1, 2}],
}


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_healthy_checkpoints_hold_beside_the_weights_is_no_reason_to_refuse_them(what, zipped, state, tmp_path):
    file = save({"state_dict": state, "acc": 70.0, "more": BESIDE[what]}, tmp_path / "resnet8.pth", zipped)
    assert_holds(load(file), state)


def test_counters_and_a_losss_own_tensors_are_listed_and_left_out(state, tmp_path, capsys):
    more = {
        "total_ops": torch.ones(1),
        "layer1.0.conv1.total_params": torch.ones(1),
        "criterion.centres": torch.ones(3),
    }
    assert_holds(load(save(prefixed(state | more, "module."), tmp_path / "resnet8.pth")), state)
    assert f"left out what is no part of resnet8: {', '.join(more)}" in capsys.readouterr().out
    deeper = fill(model_dict["resnet14"]()).state_dict()  # resnet8's names are among its own
    assert "Unexpected key(s)" in complaint(save(deeper, tmp_path / "deeper.pth"), arch="resnet8")


def test_what_macos_leaves_beside_a_checkpoint_is_none(state, tmp_path):
    save(state, tmp_path / "resnet8.pth")
    (tmp_path / "._resnet8.pth").write_bytes(b"Mac OS X")
    (tmp_path / "._best.pth").write_bytes(b"Mac OS X")
    assert find_checkpoint(tmp_path) == tmp_path / "resnet8.pth"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("teacher_vgg13_seed0/ckpt/best.pth", "teacher_vgg13_seed0"),
        ("resnet32x4_vanilla/ckpt_epoch_240.pth", "resnet32x4_vanilla"),
        ("mine/ckpt/best.pth", "mine"),
        ("downloads/a_vgg13.pth", "downloads_a_vgg13"),
        ("downloads/wrn_40_2.pth", "downloads_wrn_40_2"),
    ],
)
def test_a_teachers_name_tells_it_from_its_neighbours(file, name, tmp_path):
    assert teacher_name(tmp_path / file) == name
