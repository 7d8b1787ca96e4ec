"""models.load: which checkpoint, which network, whose weights."""

import argparse
import math
import re
from pathlib import Path

import pytest
import torch
from oracle import fill
from test_models import NAMES, images
from torch import Tensor, nn

from models import find_arch, find_checkpoint, load, model_dict

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
    "student's last.pth": lambda s: {"phase": "student", "student": with_head(s), "optimisation": {}},
    "nested": lambda s: {"state_dict": {"model": prefixed(s, "_orig_mod.module.")}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_known_layout_loads(layout, state, tmp_path):
    file = save(LAYOUTS[layout](state), tmp_path / "teacher_resnet8_seed0" / "ckpt" / "best.pth")
    assert_holds(load(file), state)


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
    ],
)
def test_the_folders_name_tells_the_architecture(file, arch, tmp_path):
    content = save({"state_dict": {}}, tmp_path / file)
    assert find_arch(content) == arch
    assert find_arch(content, arch="vgg8") == arch, "the folder's name comes before the argument"


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


def test_the_checkpoints_own_architecture_comes_first(state, tmp_path):
    file = save({"arch": "resnet8", "state_dict": state}, tmp_path / "teacher_vgg13_seed0" / "best.pth")
    assert find_arch(file, arch="vgg8") == "resnet8"
    assert_holds(load(file, arch="vgg8"), state)


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


# --- what cannot be read is told in one line ---


def complaint(error: type[Exception], path: Path, **kwargs) -> str:
    with pytest.raises(error) as caught:
        load(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def test_a_missing_path_is_told(tmp_path):
    assert "no such file" in complaint(FileNotFoundError, tmp_path / "nothing.pth")


def test_a_folder_without_a_best_checkpoint_is_told_with_what_was_looked_for(state, tmp_path):
    save(state, tmp_path / "ckpt" / "last.pth")
    message = complaint(FileNotFoundError, tmp_path)
    assert "'best'" in message and "ckpt/" in message


def test_without_any_architecture_the_message_names_all_three_ways(state, tmp_path):
    message = complaint(ValueError, save(state, tmp_path / "downloads" / "best.pth"))
    assert "checkpoint has no key 'arch'" in message
    assert "folder's name 'downloads'" in message
    assert "--t-arch" in message
    assert all(name in message for name in NAMES)


@pytest.mark.parametrize("content", [{}, {"arch": "resnet9"}])
def test_an_unknown_architecture_is_told_with_the_known_ones(content, state, tmp_path):
    file = save(content | {"state_dict": state}, tmp_path / "downloads" / "best.pth")
    with pytest.raises(ValueError, match="'resnet9', which is unknown.*resnet8, .*ShuffleV2"):
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
    message = complaint(ValueError, file, arch=arch, num_classes=classes)
    assert f"does not fit {arch} with {classes} classes" in message
    assert re.search(misfit, message), message


def test_a_tensor_too_many_is_told(state, tmp_path):
    deeper = fill(model_dict["resnet14"]()).state_dict()
    file = save(deeper, tmp_path / "best.pth")
    assert "'layer1.1.conv1.weight' has no place there" in complaint(ValueError, file, arch="resnet8")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_of_a_training_that_diverged_is_told(value, state, tmp_path):
    spoilt = state | {"fc.bias": torch.full((100,), value)}
    file = save(spoilt, tmp_path / "best.pth")
    assert "'fc.bias' holds values that are not finite" in complaint(ValueError, file, arch="resnet8")


def test_two_networks_in_one_file_are_told(state, tmp_path):
    file = save(prefixed(state, "student.") | prefixed(state, "module."), tmp_path / "best.pth")
    assert "'conv1.weight' twice" in complaint(ValueError, file, arch="resnet8")


@pytest.mark.parametrize(
    "content",
    [{}, [], None, 3, {"state_dict": {}}, {"state_dict": [1, 2]}, {"model": "resnet8"}, {"conv1.weight": 1.0}, {0: 1}],
    ids=str,
)
def test_a_file_without_a_state_dict_is_told(content, tmp_path):
    assert "state dict" in complaint(ValueError, save(content, tmp_path / "best.pth"), arch="resnet8")


def test_a_tensor_without_values_is_told(state, tmp_path):
    file = save(state | {"fc.bias": torch.ones(100, device="meta")}, tmp_path / "best.pth")
    assert "'fc.bias' (Tensor) is no plain tensor" in complaint(ValueError, file, arch="resnet8")


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"PK\x03\x04 cut", b"\x80\x02}q\x00.", bytes(range(256))], ids=str
)
def test_a_file_that_is_no_checkpoint_is_told(content, tmp_path):
    file = tmp_path / "best.pth"
    file.write_bytes(content)
    assert "is not a PyTorch checkpoint" in complaint(ValueError, file, arch="resnet8")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint_is_told(kept, zipped, state, tmp_path):
    file = tmp_path / "best.pth"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    assert "truncated" in complaint(ValueError, file, arch="resnet8")


class Surprise:
    """A pickle that would run code if it were trusted."""

    def __reduce__(self):
        return (pytest.fail, ("the checkpoint ran code",))


@pytest.mark.parametrize("content", [Surprise(), nn.Linear(1, 1)], ids=["code", "module"])
def test_a_pickle_with_objects_is_refused_and_not_run(content, state, tmp_path):
    file = save({"state_dict": state, "extra": content}, tmp_path / "best.pth")
    message = complaint(ValueError, file, arch="resnet8")
    assert "holds a Python object (" in message and "state dict alone" in message
