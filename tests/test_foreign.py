"""Networks of timm, of torchvision and of one's own: the contract, training as teacher and as student, names."""

import http.server
import shutil
import sys
import threading
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from conftest import SHORT, SHORT_STUDENT, contents, end_of, run_script
from oracle import fill, images
from PIL import Image

import baseline
import student
import teacher
import utils
from experiments import sweep
from harness.checkpoint import _arch_in_name, read, teacher_name
from harness.flags import Fault, UserError
from methods import METHODS, Outputs
from models import build, check_name, load
from models.contract import check_contract

MOBILENET, VIT, OF_TORCHVISION = (
    "timm.mobilenetv3_small_050",
    "timm.vit_tiny_patch16_224",
    "torchvision.mobilenet_v3_small",
)
VARIED = ["timm.resnet18", "timm.convnext_atto", "timm.efficientnet_b0", "timm.regnetx_002", "timm.densenet121"]
VARIED += ["timm.swin_tiny_patch4_window7_224", "timm.mixer_s32_224", "timm.repvgg_a0", "timm.ghostnet_050"]
VARIED += ["torchvision.resnet18", "torchvision.swin_t"]
FEW = [pytest.param(name, marks=pytest.mark.slow) for name in VARIED]

OWN = """
import torch
from beside import widths

class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, widths[0], 3)
        self.fc = torch.nn.Linear(widths[0], num_classes)

    def forward(self, x, is_feat=False, preact=False):
        last = self.conv(x)
        feature = last.mean((2, 3))
        logits = self.fc(feature)
        return ([last, feature], logits) if is_feat else logits

class Lacking(Net):
    def forward(self, x):
        return super().forward(x)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The current directory, with nets/mine.py."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "mine.py").write_text(OWN)
    (tmp_path / "nets" / "beside.py").write_text("widths = [8]")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return "nets/mine.py:Net"


def trained(arch, cwd, *more):
    teacher.main(["--arch", arch, *SHORT, "--experiments", str(cwd), *more])
    (folder,) = cwd.glob("teacher_*")
    return folder


@pytest.mark.parametrize("arch", [MOBILENET, VIT, OF_TORCHVISION, *FEW])
def test_a_library_s_network_is_teacher_and_student_and_its_checkpoint_loads(arch, tmp_path):
    for classes, side in ((7, 32), (3, 64)):
        draws = torch.get_rng_state()
        network = build(arch, classes, side)
        assert network.training
        torch.set_rng_state(draws)
        again = build(arch, classes, side)
        assert all(map(torch.equal, network.state_dict().values(), again.state_dict().values()))
        check_contract(network, arch, classes, side)
    folder = trained(arch, tmp_path / "a")
    assert folder.name == f"teacher_{arch}_seed0"
    found = read(folder)
    assert (found.arch, _arch_in_name(folder.name)) == (arch, arch)
    assert all(torch.equal(value, found.state[name]) for name, value in load(folder).state_dict().items())
    student.main(["--t-path", str(folder), *SHORT_STUDENT, "--experiments", str(tmp_path / "b")])
    own_teacher = trained("resnet8", tmp_path / "c")
    flags = [
        *SHORT_STUDENT,
        "--s-arch",
        arch,
        "--experiments",
        str(tmp_path / "d"),
        "--export",
        str(tmp_path / "s.pt2"),
    ]
    student.main(["--t-path", str(own_teacher), *flags])
    (run,) = (tmp_path / "d").glob("sskd_student_*")
    assert read(run).arch == arch and f"sskd_student_{arch}_weight" in run.name
    exported, pixels = torch.export.load(tmp_path / "s.pt2").module(), torch.rand(3, 3, 32, 32)
    mean, std = (torch.tensor(read(run).about[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(exported(pixels), load(run).eval()((pixels - mean) / std), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", [MOBILENET, *(pytest.param(x, marks=pytest.mark.slow) for x in (VIT, *VARIED))])
def test_a_stopped_run_of_a_library_s_network_continues_bit_for_bit(arch, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trained(arch, whole, "--epoch", "2")
    tests = iter([utils.evaluate])

    def once(*words):
        try:
            return next(tests)(*words)
        except StopIteration:
            raise Fault("stopped") from None

    with monkeypatch.context() as patched:
        patched.setattr(utils, "evaluate", once)
        assert end_of(teacher.main, ["--arch", arch, *SHORT, "--experiments", str(stopped), "--epoch", "2"]) == 1
    trained(arch, stopped, "--epoch", "2")
    assert contents(whole) == contents(stopped)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm.resnt18", "the network 'timm.resnt18' is unknown; did you mean timm.resnet18"),
        ("torchvision.resnet19", "did you mean torchvision.resnet"),
        ("torchvision.", "the network 'torchvision.' is unknown"),
        ("resnet9", "is unknown; did you mean resnet8 "),
        ("timm.deit_tiny_distilled_patch16_224", "its classifier is not one linear layer, behind one vector"),
        ("torchvision.squeezenet1_1", "its classifier is not one linear layer, behind one vector"),
        ("nowhere.py:Net", "nowhere.py:Net: there is no file nowhere.py"),
        ("nets/mine.py:Nothing", "nets/mine.py has no class Nothing"),
        ("nets/mine.py:Lacking", "nets/mine.py:Lacking fails on two images, with is_feat=True or without"),
        ("nets/bad.py:Net", "nets/bad.py can't be imported: No module named 'nonexistent'"),
    ],
)
def test_a_network_that_is_unknown_or_does_not_fit_ends_in_one_line(name, words, own, tmp_path, fails):
    (tmp_path / "nets" / "bad.py").write_text("import nonexistent")
    before = sorted(tmp_path.rglob("*.pth"))
    assert words in fails(teacher.main, "--arch", name, *SHORT)
    assert sorted(tmp_path.rglob("*.pth")) == before


def test_without_timm_one_line_says_what_to_install(tmp_path, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in fails(teacher.main, "--arch", MOBILENET, *SHORT)
    file = tmp_path / "teacher_timm.resnet18_seed0" / "best.pth"
    file.parent.mkdir()
    torch.save({"weight": torch.ones(1)}, file)
    assert "--t-arch" in fails(student.main, "--t-path", file, *SHORT_STUDENT)
    torch.save({"weight": torch.ones(1), "about": {"arch": MOBILENET}}, file)
    assert "pip install timm" in fails(student.main, "--t-path", file, *SHORT_STUDENT)


def test_the_zoo_alone_imports_no_other_network(tmp_path):
    (tmp_path / "timm.py").write_text("raise SystemExit('timm was imported')")
    run = run_script("teacher.py", "--arch", "resnet8", *SHORT, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert (run.returncode, run.stderr) == (0, "")


def test_a_network_of_one_s_own_trains_and_is_named_again_where_its_checkpoint_is_read(own, tmp_path, fails):
    folder = trained(own, tmp_path / "runs")
    assert folder.name == "teacher_mine.Net_seed0"
    assert "runs only if you name it, too: give --t-arch nets/mine.py:Net" in fails(
        student.main, "--t-path", folder, *SHORT_STUDENT
    )
    to = [*SHORT_STUDENT, "--s-arch", own, "--experiments", str(tmp_path), "--export", "s.pt2"]
    student.main(["--t-path", str(folder), "--t-arch", "./nets/mine.py:Net", *to])
    (run,) = tmp_path.glob("sskd_student_mine.Net_weight*_teacher_mine.Net_seed0")
    assert read(run, own).about["arch"] == own
    teacher.main(["--evaluate", str(run), "--arch", own, *SHORT])


def test_a_sweep_takes_networks_from_elsewhere_and_of_one_s_own(own, tmp_path, capsys):
    pairs = [f"{own}:{MOBILENET}", f"resnet8:{own}", f"{OF_TORCHVISION}:resnet8"]
    sweep.main(["--list", "--pairs", *pairs, "--methods", "alone", "kd"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 3 + 3
    assert f"--t-arch {own} --t-path experiments/teacher_mine.Net_seed0 --s-arch {MOBILENET}" in lines[6]
    assert f"--t-path experiments/teacher_resnet8_seed0 --s-arch {own}" in lines[7]
    jobs = sweep.make_jobs(sweep.parse_args(["--pairs", *pairs]))
    assert all(set(job.log.name) & {":", "/"} == set() for job in jobs.values())


@pytest.mark.parametrize(
    ("s_arch", "t_arch", "works"),
    [
        (MOBILENET, OF_TORCHVISION, "kd sp rkd pkt ft crd dkd ls"),
        (MOBILENET, "resnet8", "kd sp rkd pkt ft crd dkd ls"),
        (VIT, MOBILENET, "kd rkd pkt crd dkd ls"),
        ("resnet8", VIT, "kd rkd pkt crd dkd ls"),
    ],
)
def test_methods_take_what_maps_there_are_or_say_in_one_line_what_they_lack(s_arch, t_arch, works):
    outputs = [Outputs(*build(arch, 10)(images(), is_feat=True)) for arch in (s_arch, t_arch)]
    labels, found = torch.arange(4), []
    for name, method in METHODS.items():
        try:
            assert method(*outputs, labels)(*outputs, labels, labels).isfinite(), name
            found.append(name)
        except UserError as error:
            assert "compares feature maps" in str(error) and "choose another method" in str(error)
    assert found == works.split()


def test_a_strided_1x1_convolution_of_few_channels_has_its_gradient_in_channels_last():
    """Without `_Strided` the process ends in the backward pass, or the gradient is wrong."""
    network, found = build("timm.repvgg_a0", 10), []
    for layout in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=layout)
        network(images().contiguous(memory_format=layout)).square().sum().backward()
        found.append(network.body.stem.conv_1x1.conv.weight.grad.clone())
        network.zero_grad()
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm()  # deep networks round much


def test_names_are_found_at_the_start_of_a_folder_s_name():
    assert _arch_in_name("teacher_timm.resnet18_val0.1_seed0") == "timm.resnet18"
    assert (
        _arch_in_name("teacher_timm.vit_tiny_patch16_224.augreg_in21k_seed0")
        == "timm.vit_tiny_patch16_224.augreg_in21k"
    )
    assert _arch_in_name("timm.resnet18.pth") == "timm.resnet18"
    assert _arch_in_name("timm.nothing_seed0") is None
    assert check_name("timm.resnet18.a1_in1k")


def test_a_compared_method_runs_between_libraries(tmp_path):
    folder = trained(MOBILENET, tmp_path)
    flags = ["--method", "ft", "--t-path", str(folder), "--s-arch", OF_TORCHVISION, *SHORT, "--first-epoch", "1"]
    baseline.main([*flags, "--experiments", str(tmp_path / "ft")])
    assert list(tmp_path.glob(f"ft/ft_student_{OF_TORCHVISION}_weight*_teacher_{MOBILENET}_seed0/result.json"))


# ----------------------------------------------------------------------------------------------- the libraries' weights

WEIGHTS = {  # the names of the files in the libraries' caches
    OF_TORCHVISION: "mobilenet_v3_small-047dcff4.pth",
    MOBILENET: "mobilenetv3_small_050_lambc-4b7bbe87.pth",
}


def offline(*_, **__):
    raise URLError("offline")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Random weights in the libraries' cache, below tmp_path; nothing can be downloaded."""
    monkeypatch.setattr("timm.models._builder.has_hf_hub", lambda necessary=False: False)  # timm's other server
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cache" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    states = {OF_TORCHVISION: torchvision.models.mobilenet_v3_small(), MOBILENET: timm.create_model(MOBILENET[5:])}
    states = {name: fill(network).state_dict() for name, network in states.items()}
    for name, state in states.items():
        torch.save(state, folder / WEIGHTS[name])
    return states


def assert_equal_but_the_classifier(network, state):
    own = network.body.state_dict()  # torchvision's pooling has no weights
    assert own.keys() == {name for name in state if not name.startswith(LAST)}
    assert all(torch.equal(value, state[name]) for name, value in own.items())


LAST = ("classifier.3.", "classifier.weight", "classifier.bias")


@pytest.mark.parametrize("arch", WEIGHTS)
def test_pretrained_starts_from_the_library_s_weights_with_a_new_classifier(arch, cached, tmp_path, monkeypatch):
    assert_equal_but_the_classifier(build(arch, 100, 32, pretrained=True), cached[arch])
    same = build(arch, 1000, 32, pretrained=True)
    assert torch.equal(same.classifier.bias, cached[arch][f"{LAST[0]}bias" if arch == OF_TORCHVISION else LAST[2]])
    folder = trained(arch, tmp_path / "a", "--pretrained", "--lr", "1e-30", "--weight-decay", "0")
    assert folder.name == f"teacher_{arch}_pretrained_seed0"
    found = read(folder)
    assert found.about["mean"] == pytest.approx([0.485, 0.456, 0.406]) and found.about["classes"] == 100
    weights = {
        f"body.{name}": value for name, value in cached[arch].items() if "running" not in name and "tracked" not in name
    }
    assert all(torch.equal(found.state[name], weights[name]) for name in weights.keys() & found.state.keys())
    before = contents(folder)
    assert trained(arch, tmp_path / "a", "--pretrained", "--lr", "1e-30", "--weight-decay", "0") == folder
    assert contents(folder) == before


@pytest.mark.parametrize("arch", [OF_TORCHVISION, pytest.param(MOBILENET, marks=pytest.mark.slow)])
def test_the_library_s_own_weights_are_a_teacher_of_its_own_classes(arch, cached, tmp_path, fails):
    found = read(arch)
    assert_equal_but_the_classifier(found.network(), cached[arch])
    assert found.about == {"arch": arch, "classes": 1000} | {name: found.about[name] for name in ("mean", "std")}
    assert teacher_name(found.file) == arch
    assert "trained on other images, 1000 classes; cifar100 has 100" in fails(
        student.main, "--t-path", arch, "--s-arch", "resnet8"
    )
    for half in ("train", "test"):
        for label in range(1000):
            (tmp_path / "data" / half / f"n{label:04}").mkdir(parents=True)
            Image.new("RGB", (32, 32), (label % 256, label // 4, 0)).save(
                tmp_path / "data" / half / f"n{label:04}" / "a.png"
            )
    words = ["--dataset", "folder", "--few-shot", "1", "--epoch", "1", "--milestones", "1", "--batch-size", "500"]
    student.main(["--t-path", arch, "--s-arch", "resnet8", *words, "--t-epoch", "1", "--t-milestones", "1"])
    assert list(tmp_path.glob(f"experiments/sskd_student_resnet8_weight*_seed0_{arch}/result.json"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--arch", "resnet8", "--pretrained"],
            "--pretrained is for --arch timm.NAME or torchvision.NAME, not for resnet8",
        ),
        (["--arch", "torchvision.resnet18", "--pretrained"], "torchvision.resnet18 can't be used here"),
        (["--arch", "torchvision.resnet18", "--pretrained"], "offline"),
        (["--arch", "timm.resnet18", "--pretrained"], "offline"),
        (["--arch", "timm.ghostnet_050", "--pretrained"], "timm has no weights for this network"),
    ],
)
def test_weights_that_are_unknown_or_out_of_reach_end_in_one_line(words, says, cached, fails, tmp_path):
    assert says in fails(teacher.main, *words, *SHORT)
    assert not (tmp_path / "experiments").exists()


def test_a_sweep_s_pretrained_teachers_are_found_and_finished(cached, tmp_path, capsys):
    flags = ["--pairs", f"{MOBILENET}:{OF_TORCHVISION}", "--methods", "alone", "--", *SHORT, "--pretrained"]
    jobs = sweep.make_jobs(sweep.parse_args(flags))
    assert list(jobs)[0] == f"teacher_{MOBILENET}_pretrained_seed0"
    for job in jobs.values():
        teacher.main(job.command[1:])
    assert sweep.results_of(jobs).keys() == jobs.keys()


# ----------------------------------------------------------------------------------------------------------- addresses


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server of tmp_path/web: its address; TORCH_HOME lies in tmp_path, too."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *words):
            super().__init__(*words, directory=str(tmp_path / "web"))

        def log_message(self, *_): ...

        def copyfile(self, source, sink):
            content = source.read()
            sink.write(content[: len(content) // 2] if "cut" in self.path else content)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def web(tmp_path):
    """What the server shows: a teacher without a word about its network, the same cut off, and an HTML page."""
    content = {"model": fill(build("resnet8")).state_dict()}
    for folder in ("resnet8_vanilla", "cut/resnet8_vanilla", "page/resnet8_vanilla"):
        (tmp_path / "web" / folder).mkdir(parents=True)
        torch.save(content, tmp_path / "web" / folder / "ckpt_epoch_240.pth")
    (tmp_path / "web" / "page" / "resnet8_vanilla" / "ckpt_epoch_240.pth").write_text("<!DOCTYPE html><html></html>")
    return content["model"]


def test_a_teacher_at_an_address_is_fetched_once_and_named_by_its_folder(server, web, tmp_path):
    address = f"{server}/resnet8_vanilla/ckpt_epoch_240.pth?download=1"
    student.main(["--t-path", address, *SHORT_STUDENT])
    (run,) = (tmp_path / "experiments").glob("sskd_student_*_resnet8_vanilla")
    assert (run / "result.json").exists()
    shutil.rmtree(tmp_path / "web")
    found = read(address)  # from the cache
    assert found.arch == "resnet8" and all(torch.equal(found.state[name], web[name]) for name in web)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("cut/resnet8_vanilla/ckpt_epoch_240.pth", "damaged or truncated"),
        ("page/resnet8_vanilla/ckpt_epoch_240.pth", "is an HTML page"),
        ("resnet8_vanilla/nothing.pth", "could not be fetched: HTTP Error 404"),
        ("", "names no file"),
    ],
)
def test_what_is_no_whole_checkpoint_at_an_address_ends_in_one_line_and_is_not_kept(
    path, says, server, web, tmp_path, fails
):
    for _ in range(2):
        line = fails(student.main, "--t-path", f"{server}/{path}", *SHORT_STUDENT)
        assert says in line and f"{server}/{path}" in line and ".part" not in line
        assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_an_address_that_nobody_serves_ends_in_one_line(tmp_path, monkeypatch, fails):
    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    address = "https://example.org/wrn_40_2_vanilla/ckpt_epoch_240.pth"
    assert f"{address} could not be fetched: <urlopen error offline>" in fails(teacher.main, "--evaluate", address)
