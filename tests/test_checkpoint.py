"""models.load: which checkpoint, which network, whose weights."""

import argparse
import errno
import math
import os
import re
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import NAMES, fill, images
from torch import Tensor, nn

from models import CheckpointError, find_arch, find_checkpoint, load, model_dict, read

STUDENT_RUN = "sskd_student_{}_weight0.1+0.9+2.7+10.0_T4.0+4.0+0.5_ratio1.0+0.75_seed0_{}"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return fill(model_dict["resnet8"]()).state_dict()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def with_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).state_dict()
    return prefixed(state, "backbone.") | prefixed(head, "proj_head.")


def save(content: object, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return file


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = model.state_dict()
    assert list(loaded) == list(state)
    for name, value in loaded.items():
        assert torch.equal(value, state[name]), name


LAYOUTS = {
    "published SSKD teacher": lambda s: {"epoch": 240, "state_dict": s, "acc": 0.7},
    "RepDistiller": lambda s: {"opt": argparse.Namespace(lr=0.05), "model": s, "optimizer": {"state": {}}},
    "mdistiller": lambda s: {"epoch": 240, "model": prefixed(s, "module."), "best_acc": 70.0},
    "mdistiller student with its teacher": lambda s: {
        "model": prefixed(s, "module.student.") | prefixed(s, "module.teacher.")
    },
    "bare": lambda s: s,
    "student": lambda s: {"state_dict": prefixed(s, "student.")},
    "Wrapper": with_head,
    "Wrapper in a checkpoint": lambda s: {"state_dict": with_head(s), "best_acc": 70.0},
    "DataParallel Wrapper": lambda s: {"state_dict": prefixed(with_head(s), "module.")},
    "compiled Wrapper": lambda s: prefixed(with_head(s), "_orig_mod."),
    "compiled backbone in a Wrapper": lambda s: prefixed(s, "module.backbone._orig_mod."),
    "HSAKD": lambda s: {"net": s, "acc": 0.7, "epoch": 239},
    "HSAKD teacher": lambda s: {"net": prefixed(s, "backbone.") | {"auxiliary_classifier.fc1.bias": torch.ones(400)}},
    "mdistiller student with an adapter": lambda s: {
        "model": prefixed(s, "module.student.") | {"module.conv_reg.weight": torch.ones(2, 2)}
    },
    "Lightning": lambda s: {
        "state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(100)},
        "hyper_parameters": {"lr": 0.05},
    },
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {}, "loss": 0.1},
    "net in a module": lambda s: prefixed(s, "module.net."),
    "nested": lambda s: {"state_dict": {"model": prefixed(s, "_orig_mod.module.")}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_known_layout_loads(layout, state, tmp_path):
    file = save(LAYOUTS[layout](state), tmp_path / "teacher_resnet8_seed0" / "ckpt" / "best.pth")
    loaded = load(file)
    assert_holds(loaded, state)
    saved = fill(model_dict["resnet8"]()).eval()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images()), saved(images()))


class WithBody(nn.Module):
    """A network that keeps its body in `backbone`."""

    def __init__(self, num_classes):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.classifier = nn.Sequential(nn.Linear(4, num_classes))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "module.student."])
def test_a_network_whose_own_names_look_like_wrappers_reads_its_checkpoint(prefix, tmp_path, monkeypatch):
    monkeypatch.setitem(model_dict, "mine", WithBody)
    state = fill(WithBody(100)).state_dict()
    content = prefixed(state, prefix) | ({"proj_head.0.weight": torch.ones(4, 4)} if prefix == "backbone." else {})
    assert_holds(load(save(content, tmp_path / "best.pth"), arch="mine"), state)


def test_repdistillers_mobilenet_loads_despite_its_other_classifier_name(tmp_path):
    state = fill(model_dict["MobileNetV2"]()).state_dict()
    renamed = {name.replace("classifier.", "classifier.0."): value for name, value in state.items()}
    file = save({"model": renamed}, tmp_path / "MobileNetV2_vanilla" / "ckpt_epoch_240.pth")
    assert_holds(load(file), state)


@pytest.mark.parametrize("name", ["wrn_16_2", "vgg8", "ShuffleV1", "ShuffleV2"])
def test_a_loaded_model_computes_what_the_saved_one_did(name, tmp_path):
    saved = fill(model_dict[name](num_classes=10)).eval()
    file = save({"state_dict": saved.state_dict()}, tmp_path / f"teacher_{name}_seed3" / "best.pth")
    with torch.no_grad():
        assert torch.equal(load(file, num_classes=10).eval()(images()), saved(images()))


def test_half_precision_and_channels_last_weights_load_as_float32(state, tmp_path):
    half = {
        name: v.half().contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for name, v in state.items()
    }
    model = load(save(half, tmp_path / "best.pth"), arch="resnet8")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    torch.testing.assert_close(model.conv1.weight.data, state["conv1.weight"], rtol=1e-3, atol=1e-3)


def test_a_checkpoint_older_than_batch_counters_loads_with_counters_at_zero(state, tmp_path):
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    model = load(save(old, tmp_path / "best.pth"), arch="resnet8")
    assert model.bn1.num_batches_tracked == 0
    assert_holds(model, state)


def test_loading_draws_no_random_number(state, tmp_path):
    file = save(state, tmp_path / "best.pth")
    before = torch.get_rng_state()
    load(file, arch="resnet8")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_network_keeps_outside_its_state_dict_is_as_its_class_makes_it(state, tmp_path, monkeypatch):
    plain = model_dict["resnet8"]

    def scaled(num_classes: int) -> nn.Module:
        network = plain(num_classes=num_classes)
        network.register_buffer("scale", torch.full((999,), 0.5), persistent=False)
        return network

    monkeypatch.setitem(model_dict, "resnet8", scaled)
    assert load(save(state, tmp_path / "best.pth"), arch="resnet8").scale.eq(0.5).all()


# --- finding the checkpoint and its architecture ---


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["ckpt/best.pth", "ckpt/last.pth", "ckpt/240.pth"], "ckpt/best.pth"),
        (["ckpt/student_best.pth", "ckpt/teacher.pth", "ckpt/last.pth"], "ckpt/student_best.pth"),
        (["resnet32x4_best.pth", "resnet32x4_last.pth"], "resnet32x4_best.pth"),
        (["model_BEST.pth.tar"], "model_BEST.pth.tar"),
        (["best"], "best"),
        (["best.pth", "ckpt/best.pth"], "best.pth"),
        (["ckpt/student_best.pth", "ckpt/best.pth", "ckpt/b_best.pth"], "ckpt/best.pth"),
        (["b_best.pth", "a_best.pth"], "a_best.pth"),
        (["best.json", "best.pth.tmp", "ckpt/best.pth"], "ckpt/best.pth"),
    ],
)
def test_a_folder_stands_for_its_best_checkpoint(files, found, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert find_checkpoint(tmp_path) == tmp_path / found
    assert find_checkpoint(str(tmp_path / files[-1])) == tmp_path / files[-1]


@pytest.mark.parametrize(
    ("file", "arch"),
    [
        ("teacher_wrn_40_2_seed0/ckpt/best.pth", "wrn_40_2"),
        ("teacher_wrn_40_1_seed12/ckpt/240.pth", "wrn_40_1"),
        ("teacher_vgg13/best.pth", "vgg13"),
        ("teacher_resnet20x0375_seed0/ckpt/best.pth", "resnet20x0375"),
        ("teacher_ResNet50_seed0/ckpt/best.pth", "ResNet50"),
        ("resnet32x4_vanilla/ckpt_epoch_240.pth", "resnet32x4"),
        ("resnet8/best.pth", "resnet8"),
        (STUDENT_RUN.format("wrn_16_2", "teacher_wrn_40_2_seed0") + "/ckpt/student_best.pth", "wrn_16_2"),
        (STUDENT_RUN.format("wrn_16_2", "teacher_wrn_40_2_seed0") + "/ckpt/040.pth", "wrn_16_2"),
        (STUDENT_RUN.format("wrn_16_2", "teacher_wrn_40_2_seed0") + "/ckpt/teacher.pth", "wrn_40_2"),
        (STUDENT_RUN.format("MobileNetV2", "resnet32x4_vanilla") + "/ckpt/teacher.pth", "resnet32x4"),
        ("crd_student_wrn_16_2_weight0.1+0.9+0.8_T4.0_seed0_teacher_wrn_40_2_seed0/ckpt/student_best.pth", "wrn_16_2"),
        (
            "at_student_ShuffleV2_weight1.0+0.0+1.0_T4.0_few0.5_seed1_teacher_vgg13/ckpt/student_best.pth",
            "ShuffleV2",
        ),
    ],
)
def test_the_folders_name_tells_the_architecture(file, arch, tmp_path):
    content = save({"state_dict": {}}, tmp_path / file)
    assert find_arch(content) == arch


@pytest.mark.parametrize(
    ("file", "arch"),
    [
        ("hub/checkpoints/cifar100_resnet56-f2eff4c8.pt", "resnet56"),
        ("cifar10_resnet20-4118986f.pt", "resnet20"),
        ("resnet56_vanilla/ckpt_epoch_240.pth", "resnet56"),
        ("cifar100_baselines/dkd,res32x4,res8x4/student_best", "resnet8x4"),
        ("dkd,wrn_40_2,shuv1/best", "ShuffleV1"),
        ("kd,res50,mv2/student_latest", "MobileNetV2"),
        ("kd,vgg13,res50/epoch_240", "ResNet50"),
        ("train_baseline_cifar_arch_wrn_40_2_dataset_cifar100_seed0/wrn_40_2_best.pth.tar", "wrn_40_2"),
        ("teacher_vgg13/resnet8.pth", "resnet8"),
    ],
)
def test_names_of_other_repositories_tell_the_architecture(file, arch, tmp_path):
    assert find_arch(save({"model": {}}, tmp_path / file)) == arch


def test_the_flag_beats_the_name_and_says_so_where_they_differ(state, tmp_path, capsys):
    file = save(state, tmp_path / "teacher_vgg13_seed0" / "best.pth")
    assert_holds(load(file, arch="resnet8"), state)
    assert f"{file} is taken for resnet8, as asked, though its name says vgg13\n" == capsys.readouterr().out
    assert find_arch(file, arch="vgg13") == "vgg13"
    assert capsys.readouterr().out == ""


def test_a_network_whose_name_begins_with_anothers_is_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(model_dict, "resnet8_mine", model_dict["resnet8"])
    assert find_arch(save({"state_dict": {}}, tmp_path / "teacher_resnet8_mine_seed0" / "best.pth")) == "resnet8_mine"


def test_a_student_run_gives_its_student_and_its_teacher(state, tmp_path):
    folder = tmp_path / STUDENT_RUN.format("resnet8", "teacher_resnet14_seed0")
    teacher = fill(model_dict["resnet14"](), base=500).state_dict()
    save({"epoch": 1, "state_dict": with_head(state), "best_acc": 1.0}, folder / "ckpt" / "student_best.pth")
    save(with_head(teacher), folder / "ckpt" / "teacher.pth")
    assert_holds(load(folder), state)
    assert_holds(load(folder / "ckpt" / "teacher.pth"), teacher)


@pytest.mark.parametrize("about", [{"arch": "resnet8"}, {"about": {"arch": "resnet8"}}], ids=str)
def test_the_checkpoints_own_architecture_comes_first(about, state, tmp_path, capsys):
    file = save(about | {"state_dict": state}, tmp_path / "teacher_vgg13_seed0" / "best.pth")
    assert find_arch(file, arch="resnet8") == find_arch(file) == "resnet8"
    assert capsys.readouterr().out == ""
    assert find_arch(file, arch="vgg8") == "resnet8"
    assert "says that it is resnet8, so it is not taken for vgg8" in capsys.readouterr().out
    assert_holds(load(file, arch="vgg8"), state)


def test_an_unknown_architecture_in_the_checkpoint_leaves_the_choice_to_the_flag(state, tmp_path):
    assert_holds(load(save({"arch": "resnet8_cifar", "state_dict": state}, tmp_path / "best.pth"), "resnet8"), state)


def test_the_name_is_found_from_inside_the_folder(state, tmp_path, monkeypatch):
    folder = tmp_path / "teacher_resnet8_seed0"
    save(state, folder / "ckpt" / "best.pth")
    monkeypatch.chdir(folder)
    assert_holds(load("."), state)
    monkeypatch.chdir("ckpt")
    assert_holds(load("best.pth"), state)


def test_a_name_that_tells_nothing_leaves_the_choice_to_the_argument(state, tmp_path):
    file = save(state, tmp_path / "teacher_densenet_seed0" / "best.pth")
    assert_holds(load(file, arch="resnet8"), state)


# --- what a checkpoint says of itself ---

ABOUT = {"arch": "resnet8", "dataset": "cifar10", "classes": 10, "side": 32, "tested": 10_000}
ABOUT |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


def test_a_checkpoint_that_tells_all_needs_no_name_and_no_flag(tmp_path):
    state = fill(model_dict["resnet8"](num_classes=10)).state_dict()
    file = save({"epoch": 3, "state_dict": state, "acc": 71.5, "about": ABOUT}, tmp_path / "renamed" / "it.pth")
    checkpoint = read(tmp_path / "renamed")
    assert (checkpoint.file, checkpoint.arch, checkpoint.about, checkpoint.acc) == (file, "resnet8", ABOUT, 71.5)
    assert_holds(load(file), state)
    with pytest.raises(CheckpointError, match="does not fit resnet8 with 100 classes"):
        load(file, num_classes=100)


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": 0},
        {"classes": True},
        {"classes": 10.0},
        {"side": -32},
        {"dataset": 3},
        {"mean": [0.5, 0.5]},
        {"mean": "0.5"},
        {"std": [0.2, 0.2, 0.0]},
        {"std": [0.2, math.nan, 0.2]},
        {"arch": ["resnet8"]},
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_as_if_it_had_not_been_said(wrong, state, tmp_path):
    file = save({"state_dict": state, "about": ABOUT | wrong}, tmp_path / "best.pth")
    (name,) = wrong
    assert read(file, arch="resnet8").about == {key: value for key, value in ABOUT.items() if key != name}


def test_what_a_run_goes_on_from_is_no_network(runs):
    with pytest.raises(CheckpointError, match="last.pth: is what its run goes on from, no network; give the"):
        read(runs.student / "ckpt" / "last.pth")


@pytest.mark.parametrize("about", [None, 3, [], "cifar10", {}, {3: 4}], ids=str)
def test_a_checkpoint_that_says_nothing_of_itself_loads(about, state, tmp_path):
    checkpoint = read(save({"state_dict": state, "about": about}, tmp_path / "resnet8.pth"))
    assert checkpoint.about == {} and checkpoint.acc is None
    assert_holds(checkpoint.network(), state)


@pytest.mark.parametrize(
    ("content", "acc"),
    [
        ({"acc": 71.5}, 71.5),
        ({"best_acc": torch.tensor(71.5)}, 71.5),
        ({"accuracy": torch.tensor([71.5])}, 71.5),
        ({"acc": np.float64(71.5)}, 71.5),
        ({"acc": np.float32(71.5)}, 71.5),
        ({"acc": np.int64(71)}, 71),
        ({"acc": "high", "best_acc": 70}, 70),
        ({"acc": math.nan}, None),
        ({"acc": torch.ones(2)}, None),
        ({}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_reported_accuracy_is_read_whatever_kind_of_number_it_is(content, acc, zipped, state, tmp_path):
    file = tmp_path / "resnet8.pth"
    torch.save(content | {"model": state, "lr": np.float64(0.1)}, file, _use_new_zipfile_serialization=zipped)
    if not zipped:  # as NumPy 1 wrote it
        file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read(file).acc == acc


class Crafted:
    """A pickled NumPy scalar whose type would have its bytes taken for a pointer."""

    def __reduce__(self):
        return np.float64(1).__reduce__()[0], (np.dtype([("pointer", "O")]), b"\x00" * 8)


def test_a_numpy_scalar_of_another_kind_is_not_made(state, tmp_path):
    file = save({"model": state, "acc": Crafted()}, tmp_path / "resnet8.pth")
    assert "is not a PyTorch checkpoint, or is damaged" in complaint(file)


# --- what cannot be read is told in one line ---


def complaint(path: Path, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **kwargs)
    message = str(caught.value)
    assert message.isprintable() and str(path) in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def test_a_missing_path_is_told(tmp_path):
    assert "no such file" in complaint(tmp_path / "nothing.pth")
    for find in (find_checkpoint, find_arch):
        with pytest.raises(CheckpointError, match="nothing.pth: no such file"):
            find(tmp_path / "nothing.pth")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_not_called_damaged(number, state, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    file = save(state, tmp_path / "best.pth")
    monkeypatch.setattr(Path, "open", refuse)
    message = complaint(file, arch="resnet8")
    assert f"cannot be read: {os.strerror(number)}" in message and "damaged" not in message
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"cannot be read: {os.strerror(number)}" in complaint(tmp_path, arch="resnet8")


def test_a_folder_in_the_checkpoints_place_is_not_called_damaged(tmp_path):
    (tmp_path / "best.pth").mkdir()
    for path in (tmp_path, tmp_path / "best.pth"):
        assert "found no checkpoint with 'best' in its name" in complaint(path, arch="resnet8")


def test_a_folder_without_a_best_checkpoint_is_told_with_what_was_looked_for(state, tmp_path):
    save(state, tmp_path / "ckpt" / "last.pth")
    message = complaint(tmp_path)
    assert "'best'" in message and "ckpt/" in message


@pytest.mark.parametrize(
    "files", [["ckpt_epoch_240.pth"], ["ckpt/240.pt", "ckpt/last.pth", "ckpt/ss_head_01.pth", "log.txt", "README"]]
)
def test_the_only_checkpoint_of_a_folder_is_taken_whatever_its_name(files, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert find_checkpoint(tmp_path) == tmp_path / files[0]
    (tmp_path / "another.pth").touch()
    with pytest.raises(CheckpointError, match="nor in its ckpt/, but 2 others; give the file"):
        find_checkpoint(tmp_path)


def test_without_any_architecture_the_message_names_all_three_ways(state, tmp_path):
    message = complaint(save(state, tmp_path / "downloads" / "best.pth"))
    assert "checkpoint has no key 'arch'" in message
    assert "folder's name 'downloads'" in message and "neither the file's nor" in message
    assert "--t-arch" in message
    assert all(name in message for name in NAMES)


@pytest.mark.parametrize("content", [{}, {"arch": "resnet9"}])
def test_an_unknown_architecture_is_told_with_the_known_ones(content, state, tmp_path):
    file = save(content | {"state_dict": state}, tmp_path / "downloads" / "best.pth")
    with pytest.raises(CheckpointError, match="best.pth: .* names 'resnet9', which is unknown.*resnet8, .*ShuffleV2"):
        load(file, arch="resnet9")


@pytest.mark.parametrize(
    ("arch", "classes", "misfit"),
    [
        ("resnet8", 10, r"'fc.weight' is \(100, 64\) in it, not \(10, 64\)"),
        ("resnet14", 100, "it lacks 'layer1.1.conv1.weight'"),
        ("resnet8x4", 100, r"'conv1.weight' is \(16, 3, 3, 3\) in it, not \(32, 3, 3, 3\)"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_told_with_the_first_misfit(arch, classes, misfit, state, tmp_path):
    file = save(state, tmp_path / "best.pth")
    message = complaint(file, arch=arch, num_classes=classes)
    assert f"does not fit {arch} with {classes} classes" in message
    assert re.search(misfit, message), message


def test_another_network_of_the_same_name_is_called_that(tmp_path):
    layers = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3))
    state = prefixed(layers.state_dict(), "features.") | {"classifier.0.weight": torch.ones(512, 512)}
    message = complaint(save(state, tmp_path / "cifar100_vgg13_bn-5ebe5778.pt"))  # as in torchvision
    assert "another network, perhaps of the same name: it has 0 of the 72 tensors of vgg13" in message


def test_a_tensor_too_many_is_told(state, tmp_path):
    deeper = fill(model_dict["resnet14"]()).state_dict()
    file = save(deeper, tmp_path / "best.pth")
    assert "'layer1.1.conv1.weight' has no place there" in complaint(file, arch="resnet8")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_precision_and_integer_counters_are_accepted(dtype, state, tmp_path):
    other = {name: v.to(dtype if v.is_floating_point() else torch.int32) for name, v in state.items()}
    loaded = load(save(other, tmp_path / "best.pth"), arch="resnet8").state_dict()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype, name
        assert torch.equal(loaded[name], other[name].to(value.dtype)), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("conv1.weight", dtype) for dtype in (torch.complex64, torch.int64, torch.uint8, torch.bool)),
        *(("fc.bias", dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16)),
        *(("bn1.num_batches_tracked", dtype) for dtype in (torch.float32, torch.bool, torch.complex64)),
    ],
    ids=str,
)
def test_an_entry_of_another_kind_of_number_is_told(name, dtype, state, tmp_path):
    file = save(state | {name: torch.zeros(state[name].shape).to(dtype)}, tmp_path / "best.pth")
    assert f"'{name}' is {dtype} where" in complaint(file, arch="resnet8")


STRANGE = {
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(100), 0.1, 0, torch.quint8),
    "float4": lambda: torch.empty(100, dtype=torch.float4_e2m1fn_x2),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    "complex half": lambda: torch.zeros(100, dtype=torch.complex32),
    "sparse": lambda: torch.zeros(100).to_sparse(),
    "sparse rows": lambda: torch.zeros(10, 10).to_sparse_csr(),
    "uninitialised": nn.UninitializedParameter,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_kind_of_tensor_is_told_without_a_warning(kind, state, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = save(state | {"fc.bias": STRANGE[kind]()}, tmp_path / "best.pth")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        message = complaint(file, arch="resnet8")
    assert not caught
    assert "'fc.bias'" in message or "UninitializedParameter" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_checkpoint_of_a_training_that_diverged_is_told(value, state, tmp_path):
    spoilt = state | {"fc.bias": torch.full((100,), value, dtype=torch.float64)}
    file = save(spoilt, tmp_path / "best.pth")
    assert "'fc.bias' holds values that are not finite" in complaint(file, arch="resnet8")


def test_two_networks_in_one_file_are_told(state, tmp_path):
    file = save(prefixed(state, "student.") | prefixed(state, "module."), tmp_path / "best.pth")
    assert "'conv1.weight' twice" in complaint(file, arch="resnet8")


@pytest.mark.parametrize(
    "content",
    [{}, [], None, 3, {"state_dict": {}}, {"state_dict": [1, 2]}, {"model": "resnet8"}, {"conv1.weight": 1.0}, {0: 1}],
    ids=str,
)
def test_a_file_without_a_state_dict_is_told(content, tmp_path):
    assert "state dict" in complaint(save(content, tmp_path / "best.pth"), arch="resnet8")


def test_a_tensor_without_values_is_told(state, tmp_path):
    file = save(state | {"fc.bias": torch.ones(100, device="meta")}, tmp_path / "best.pth")
    assert "'fc.bias' (Tensor) is no plain tensor" in complaint(file, arch="resnet8")


@pytest.mark.parametrize("path", [["state_dict"], ["model", "state_dict"], ["model"] * 50])
def test_a_checkpoint_that_contains_itself_is_told(path, tmp_path):
    checkpoint = inner = {"epoch": 240}
    for key in path[:-1]:
        inner[key] = inner = {}
    inner[path[-1]] = checkpoint
    assert "state dict" in complaint(save(checkpoint, tmp_path / "best.pth"), arch="resnet8")


def test_a_file_cannot_hide_the_methods_of_what_it_holds(state, tmp_path):
    hiding = OrderedDict(state | {"fc.bias": state["fc.bias"].clone()})
    hiding.gat = hiding.itams = hiding["fc.bias"].detoch = hiding["fc.bias"].flaat = 3
    torch.save(hiding, tmp_path / "best.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "best.pth").read_bytes()
    for name, method in ((b"gat", b"get"), (b"itams", b"items"), (b"detoch", b"detach"), (b"flaat", b"float")):
        assert content.count(name) == 1
        content = content.replace(name, method)
    (tmp_path / "best.pth").write_bytes(content)
    assert_holds(load(tmp_path / "best.pth", arch="resnet8"), state)


BAD_TEXT = "\x1b[31m\n\r\x9b\u202e\ud800" + "long" * 1000


@pytest.mark.parametrize(
    "content",
    [
        lambda s: {BAD_TEXT: 1},
        lambda s: s | {BAD_TEXT: torch.zeros(1)},
        lambda s: {"student." + BAD_TEXT: torch.zeros(1), "module." + BAD_TEXT: torch.zeros(1)},
        lambda s: {"about": {"arch": BAD_TEXT}, "state_dict": s},
    ],
    ids=["no tensor", "too many", "twice", "architecture"],
)
def test_text_of_a_checkpoint_is_shown_escaped_and_short(content, state, tmp_path):
    content = content(state)
    arch = None if "about" in content else "resnet8"
    message = complaint(save(content, tmp_path / "best.pth"), arch=arch)
    assert r"'\x1b[31m\n\r\x9b\u202e\ud800long" in message
    assert len(message) < 1000


def test_the_name_of_a_refused_object_is_shown_escaped(tmp_path):
    file = tmp_path / "best.pth"
    torch.save({"state_dict": Surprise()}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes().replace(b"_pytest.outcomes", b"_\x1b[31mt.outcomes"))
    assert r"holds a Python object (_\x1b[31mt.outcomes" in complaint(file, arch="resnet8")


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"PK\x03\x04 cut", b"\x80\x02}q\x00.", bytes(range(256))], ids=str
)
def test_a_file_that_is_no_checkpoint_is_told(content, tmp_path):
    file = tmp_path / "best.pth"
    file.write_bytes(content)
    assert "is not a PyTorch checkpoint" in complaint(file, arch="resnet8")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint_is_told(kept, zipped, state, tmp_path):
    file = tmp_path / "best.pth"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    assert "truncated" in complaint(file, arch="resnet8")


def test_a_checkpoint_of_an_old_pytorch_loads(state, tmp_path):
    torch.save({"model": state}, tmp_path / "best.pth", _use_new_zipfile_serialization=False)
    assert_holds(load(tmp_path / "best.pth", arch="resnet8"), state)


def test_no_flipped_bit_changes_what_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(model_dict, "linear", lambda num_classes: nn.Linear(2, num_classes))
    state = fill(nn.Linear(2, 3)).state_dict()
    file = save(state, tmp_path / "best.pth")
    whole = file.read_bytes()
    weights = state["weight"].numpy().tobytes()
    first = 8 * whole.index(weights)
    of_weights = range(first, first + 8 * len(weights))
    name = whole.rindex(b"/data/0")  # in the directory at the archive's end, behind 46 bytes and the folder's name
    for bit in [*of_weights, *range(8 * (name - 50), 8 * name), *range(0, 8 * len(whole), 61)]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            model = load(file, arch="linear", num_classes=3)
        except CheckpointError as error:
            assert "is not a PyTorch checkpoint, or is damaged" in str(error)
        else:
            assert bit not in of_weights
            assert_holds(model, state)


class Surprise:
    """A pickle that would run code if it were trusted."""

    def __reduce__(self):
        return (pytest.fail, ("the checkpoint ran code",))


@pytest.mark.parametrize("content", [Surprise(), nn.Linear(1, 1)], ids=["code", "module"])
def test_a_pickle_with_objects_is_refused_and_not_run(content, state, tmp_path):
    file = save({"state_dict": state, "extra": content}, tmp_path / "best.pth")
    message = complaint(file, arch="resnet8")
    assert "holds a Python object (" in message and "state dict alone" in message
