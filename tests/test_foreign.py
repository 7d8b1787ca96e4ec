"""Networks of timm, of torchvision and of one's own, as teacher and as student; weights of libraries and addresses."""

import http.server
import shutil
import sys
import threading
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from conftest import SHORT, SHORT_STUDENT, contents, end_of, run_script, stop_at
from oracle import fill, images
from PIL import Image

import student
import teacher
from experiments import sweep
from harness import fetch, sources
from harness.checkpoint import read, teacher_name
from harness.flags import UserError
from methods import METHODS, Outputs
from models import build, load
from wrapper import check_network

TIMM, VIT, TORCHVISION = "timm.mobilenetv3_small_050", "timm.vit_tiny_patch16_224", "torchvision.mobilenet_v3_small"
SMALLEST = "timm.test_efficientnet"
VARIED = [TIMM, VIT, "timm.deit_tiny_patch16_224", "timm.convnext_atto", "timm.efficientnet_b0", "timm.regnetx_002"]
VARIED += ["timm.resnet18", "timm.densenet121", "timm.swin_tiny_patch4_window7_224", "timm.mixer_s32_224"]
VARIED += ["timm.repvgg_a0", "timm.ghostnet_050"]
VARIED += ["torchvision.resnet18", "torchvision.swin_t", "torchvision.densenet121"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in VARIED]

OWN = """
import torch
from beside import width
from models.resnet import ResNet

class Net(ResNet):
    def __init__(self, num_classes):
        super().__init__(8, (width,) * 4, num_classes)

class Flat(Net):
    def forward(self, x, is_feat=False, preact=False):
        feature = self.conv1(x)[:, :2, :4, :2].contiguous(memory_format=torch.channels_last).view(len(x), -1)
        return ([feature], self.fc(feature)) if is_feat else self.fc(feature)

class Lacking(Net):
    def forward(self, x):
        return super().forward(x)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A class in a file of the current directory, which imports another file beside it."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "mine.py").write_text(OWN)
    (tmp_path / "nets" / "bad.py").write_text("import nonexistent")
    (tmp_path / "nets" / "beside.py").write_text("width = 8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return "nets/mine.py:Net"


def trained(arch, cwd, *more):
    teacher.main(["--arch", arch, *SHORT, "--experiments", str(cwd), *more])
    (folder,) = cwd.glob("teacher_*")
    return folder


@pytest.mark.parametrize("arch", [SMALLEST, TORCHVISION, *SLOW])
def test_a_librarys_network_is_teacher_and_student_and_its_checkpoint_loads(arch, tmp_path, runs):
    for classes, side in ((7, 32), (3, 64)):
        check_network(build(arch, classes, side), arch, classes, side)
    folder = trained(arch, tmp_path / "a")
    found = read(folder)
    assert (folder.name, found.arch) == (f"teacher_{arch}_seed0", arch)
    assert all(torch.equal(value, found.state[name]) for name, value in load(folder).state_dict().items())
    student.main(["--t-path", str(folder), *SHORT_STUDENT, "--experiments", str(tmp_path / "b")])
    zoo = shutil.copytree(runs.teacher, tmp_path / runs.teacher.name)
    student.main(["--t-path", str(zoo), *SHORT_STUDENT, "--s-arch", arch, "--experiments", str(tmp_path)])
    (run,) = tmp_path.glob(f"sskd_student_{arch}_weight*")
    assert read(run).arch == arch


@pytest.mark.parametrize("arch", [SMALLEST, *SLOW])
def test_a_librarys_network_is_exported(arch, tmp_path):
    folder, file = trained(arch, tmp_path), tmp_path / "s.pt2"
    student.main(["--s-path", str(folder), "--export", str(file)])
    exported, pixels = torch.export.load(file).module(), torch.rand(3, 3, 32, 32)
    mean, std = (torch.tensor(read(folder).about[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(exported(pixels), load(folder).eval()((pixels - mean) / std), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", [SMALLEST, *SLOW])
def test_a_stopped_run_of_a_librarys_network_continues_bit_for_bit(arch, tmp_path, monkeypatch):
    whole = trained(arch, tmp_path / "whole", "--epoch", "2")
    with monkeypatch.context() as patched:
        stop_at(2, patched)
        stopped = ["--arch", arch, *SHORT, "--experiments", str(tmp_path / "stopped"), "--epoch", "2"]
        assert end_of(teacher.main, stopped) == 1
    assert contents(trained(arch, tmp_path / "stopped", "--epoch", "2")) == contents(whole)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm.resnt18", "the network 'timm.resnt18' is unknown; did you mean timm.resnet18"),
        ("torchvision.resnet19", "did you mean torchvision.resnet18"),
        ("timm.deit_tiny_distilled_patch16_224", "its classifier is not one linear layer"),
        ("torchvision.squeezenet1_1", "its classifier is not one linear layer"),
        ("nowhere.py:Net", "No such file"),
        ("nets/mine.py:Nothing", "has no attribute 'Nothing'"),
        ("nets/mine.py:Net:resnet8", "a network of your own is FILE.py:CLASS"),
        ("nets/mine.py:Flat", "view size is not compatible"),
        ("nets/mine.py:Lacking", "unexpected keyword argument 'is_feat'"),
        ("nets/bad.py:Net", "No module named 'nonexistent'"),
    ],
)
def test_a_network_that_is_unknown_or_does_not_fit_ends_in_one_line(name, words, own, tmp_path, runs, fails):
    for message in (
        fails(teacher.main, "--arch", name, *SHORT),
        fails(student.main, "--t-path", runs.teacher, *SHORT_STUDENT, "--s-arch", name),
    ):
        assert words in message and name in message
    assert not (tmp_path / "experiments").exists()


def test_without_timm_one_line_says_what_to_install(tmp_path, monkeypatch, fails):
    torch.save({"weight": torch.ones(1), "about": {"arch": TIMM}}, tmp_path / "best.pth")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in fails(teacher.main, "--arch", TIMM, *SHORT)
    assert "pip install timm" in fails(teacher.main, "--evaluate", tmp_path / "best.pth", *SHORT)


@pytest.mark.slow
def test_the_scripts_start_without_importing_timm_or_torchvision(tmp_path):
    """They take longer to import than everything else."""
    for name in ("timm", "torchvision"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    run = run_script("student.py", "--help", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert (run.returncode, run.stderr) == (0, "")


def test_a_checkpoint_runs_a_file_of_ones_own_only_if_a_flag_names_it(own, tmp_path, fails):
    folder = trained(own, tmp_path / "runs")
    (tmp_path / "nets" / "evil.py").write_text("open('ran', 'w')")
    saved = torch.load(folder / "ckpt" / "best.pth")
    torch.save(saved | {"about": saved["about"] | {"arch": "nets/evil.py:Net"}}, tmp_path / "best.pth")
    fails(student.main, "--t-path", tmp_path / "best.pth", "--t-arch", "resnet8", *SHORT_STUDENT)
    for path in (folder, tmp_path / "best.pth"):
        assert "runs only if you name it" in fails(student.main, "--t-path", path, *SHORT_STUDENT)
    assert not (tmp_path / "ran").exists()
    to = [*SHORT_STUDENT, "--s-arch", own, "--experiments", str(tmp_path), "--export", "s.pt2"]
    student.main(["--t-path", str(folder), "--t-arch", "./nets/mine.py:Net", *to])
    (run,) = tmp_path.glob("sskd_student_mine.Net_weight*_teacher_mine.Net_seed0")
    teacher.main(["--evaluate", str(run), "--arch", own, *SHORT])


def test_a_sweep_takes_networks_from_elsewhere(own, capsys):
    pairs = [f"{own}:{TIMM}", f"resnet8:{own}"]
    sweep.main(["--list", "--pairs", *pairs, "--methods", "kd"])
    lines = capsys.readouterr().out.splitlines()
    assert f"--t-arch {own} --t-path experiments/teacher_mine.Net_seed0 --s-arch {TIMM}" in lines[2]
    assert f"--t-path experiments/teacher_resnet8_seed0 --s-arch {own}" in lines[3]
    assert all({":", "/"}.isdisjoint(name) for name in sweep.make_jobs(sweep.parse_args(["--pairs", *pairs])))


@pytest.mark.parametrize(
    ("s_arch", "t_arch", "works"),
    [
        (TIMM, TORCHVISION, "kd sp rkd pkt ft crd dkd ls"),
        ("resnet8", VIT, "kd rkd pkt crd dkd ls"),
    ],
)
def test_methods_use_the_maps_that_exist_or_say_in_one_line_what_they_lack(s_arch, t_arch, works):
    outputs = [Outputs(*build(arch, 10)(images(), is_feat=True)) for arch in (s_arch, t_arch)]
    labels, found = torch.arange(4), []
    for name, method in METHODS.items():
        try:
            assert method(*outputs, labels)(*outputs, labels, labels).isfinite(), name
            found.append(name)
        except UserError as error:
            assert "compares feature maps" in str(error)
    assert found == works.split()


def test_a_strided_1x1_convolution_of_few_channels_has_its_gradient_in_channels_last():
    """Without `_Strided` the process ends in the backward pass, or the gradient is wrong."""
    network, found = build("timm.repvgg_a0", 10), []
    for layout in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=layout)
        network(images().contiguous(memory_format=layout)).square().sum().backward()
        found.append(network.body.stem.conv_1x1.conv.weight.grad.clone())
        network.zero_grad()
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm()  # rounding grows in a deep network


# ----------------------------------------------------------------------------------------------- the libraries' weights

FILES = {TORCHVISION: "mobilenet_v3_small-047dcff4.pth", TIMM: "mobilenetv3_small_050_lambc-4b7bbe87.pth"}
LAST = {TORCHVISION: "classifier.3.", TIMM: "classifier."}


def offline(*_, **__):
    raise URLError("offline")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Random weights in the libraries' caches, by network; nothing else can be downloaded."""
    monkeypatch.setattr("timm.models._builder.has_hf_hub", lambda necessary=False: False)  # so timm uses torch.hub
    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache" / "hub" / "checkpoints").mkdir(parents=True)
    networks = {TORCHVISION: torchvision.models.mobilenet_v3_small(), TIMM: timm.create_model(TIMM[5:])}
    states = {name: fill(network).state_dict() for name, network in networks.items()}
    for name, state in states.items():
        torch.save(state, tmp_path / "cache" / "hub" / "checkpoints" / FILES[name])
    return states


@pytest.mark.parametrize("arch", FILES)
def test_pretrained_starts_from_the_librarys_weights_with_a_new_classifier(arch, cached, tmp_path):
    network, state, last = build(arch, 100, 32, pretrained=True), cached[arch], LAST[arch]
    own = network.body.state_dict()
    assert own.keys() == {name for name in state if not name.startswith(last)}
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    assert torch.equal(build(arch, 1000, 32, pretrained=True).classifier.bias, state[f"{last}bias"])
    words = ["--pretrained", "--lr", "1e-30", "--weight-decay", "0"]
    folder = trained(arch, tmp_path, *words)
    assert folder.name == f"teacher_{arch}_pretrained_seed0"
    found = read(folder)
    assert found.about["mean"] == pytest.approx([0.485, 0.456, 0.406]) and found.about["classes"] == 100
    weights = {f"body.{name}" for name, _ in network.body.named_parameters()}
    assert all(torch.equal(found.state[name], state[name.removeprefix("body.")]) for name in weights)


@pytest.mark.parametrize("arch", [TORCHVISION, pytest.param(TIMM, marks=pytest.mark.slow)])
def test_the_librarys_own_weights_are_a_teacher_of_its_own_classes(arch, cached, tmp_path, fails):
    found = read(arch)
    assert torch.equal(found.network().classifier.bias, cached[arch][f"{LAST[arch]}bias"])
    assert found.about.keys() == {"arch", "classes", "mean", "std"} and teacher_name(found.file).startswith(arch)
    words = "trained on other images, 1000 classes; cifar100 has 100"
    assert words in fails(student.main, "--t-path", arch, "--s-arch", "resnet8")
    for half in ("train", "test"):
        for label in range(1000):
            file = tmp_path / "data" / half / f"n{label:04}" / "a.png"
            file.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (label % 256, label // 4, 0)).save(file)
    student.main(["--t-path", arch, *SHORT_STUDENT, "--dataset", "folder"])
    assert list(tmp_path.glob(f"experiments/sskd_student_resnet8_weight*_seed0_{arch}*/result.json"))


@pytest.mark.slow
def test_weights_that_fit_one_side_only_say_which(cached, monkeypatch):
    monkeypatch.setattr(fetch, "build", lambda *about, pretrained: build(*about))
    found = read(VIT)
    assert found.network().body.patch_embed.img_size == (224, 224)
    with pytest.raises(UserError, match="224 pixels a side; synthetic has 32"):
        sources.read("synthetic", "").seen_by(found.about, found.file)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--arch resnet8 --pretrained", "--pretrained is for --arch timm.NAME or torchvision.NAME, not for resnet8"),
        ("--arch torchvision.resnet18 --pretrained", "torchvision.resnet18 can't be used here"),
        ("--arch timm.resnet18 --pretrained", "offline"),
        ("--arch timm.ghostnet_050 --pretrained", "No pretrained weights exist"),
        ("--evaluate timm.resnt18", "did you mean timm.resnet18"),
        ("--evaluate https://example.org/resnet8/best.pth", "could not be fetched: <urlopen error offline>"),
    ],
)
def test_weights_that_are_unknown_or_out_of_reach_end_in_one_line(words, says, cached, fails, tmp_path):
    assert says in fails(teacher.main, *words.split(), *SHORT)
    assert not (tmp_path / "experiments").exists()


# ----------------------------------------------------------------------------------------------------------- addresses


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a local web server with a teacher that only its folder names: whole, cut off, an HTML page."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *words):
            super().__init__(*words, directory=str(tmp_path / "web"))

        def log_message(self, *_): ...

        def copyfile(self, source, sink):
            content = source.read()
            sink.write(content[: len(content) // 2] if "cut" in self.path else content)

    for folder in ("resnet8_vanilla", "cut/resnet8_vanilla", "page/resnet8_vanilla"):
        file = tmp_path / "web" / folder / "ckpt_epoch_240.pth"
        file.parent.mkdir(parents=True)
        torch.save({"model": fill(build("resnet8")).state_dict()}, file)
    file.write_text("<!DOCTYPE html><html></html>")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_teacher_at_an_address_is_fetched_once_and_named_by_its_folder(server, tmp_path):
    address = f"{server}/resnet8_vanilla/ckpt_epoch_240.pth?download=1"
    student.main(["--t-path", address, *SHORT_STUDENT])
    assert list((tmp_path / "experiments").glob("sskd_student_*_resnet8_vanilla/result.json"))
    shutil.rmtree(tmp_path / "web")
    assert read(address).arch == "resnet8"  # from the cache


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("cut/resnet8_vanilla/ckpt_epoch_240.pth", "damaged or truncated"),
        ("page/resnet8_vanilla/ckpt_epoch_240.pth", "is an HTML page"),
        ("resnet8_vanilla/nothing.pth", "could not be fetched: HTTP Error 404"),
    ],
)
def test_what_is_no_whole_checkpoint_at_an_address_ends_in_one_line_and_is_not_kept(
    path, says, server, fails, tmp_path
):
    line = fails(student.main, "--t-path", f"{server}/{path}", *SHORT_STUDENT)
    assert says in line and f"{server}/{path}" in line
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
