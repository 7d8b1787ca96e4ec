"""Networks of timm, of torchvision and of one's own: the contract, training as teacher and as student, names."""

import sys

import pytest
import torch
from conftest import SHORT, SHORT_STUDENT, contents, end_of, run_script
from oracle import images

import baseline
import student
import teacher
import utils
from experiments import sweep
from harness.checkpoint import _arch_in_name, read
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
VARIED += ["torchvision.resnet18", "torchvision.shufflenet_v2_x0_5", "torchvision.swin_t", "torchvision.mnasnet0_5"]
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
