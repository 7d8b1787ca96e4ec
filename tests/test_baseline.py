"""baseline.py: every compared method trains from the command line, stops, resumes and exports."""

import collections
import copy
import itertools
import json
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, contents, end_of, run_script
from oracle import PUBLISHED
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import FakeTensorMode

import baseline
import cifar
import methods
import models
from methods import negatives
import utils
from methods import METHODS, Outputs
from teacher_store import load_teacher

PAIRS = PUBLISHED["similar"]["pairs"] + PUBLISHED["cross"]["pairs"]
TINY = ["--dataset", "synthetic", "--train-size", "10", "--test-size", "6", "--batch-size", "4"]
TINY += ["--s-arch", "resnet14x05", "--epoch", "2", "--milestones", "1"]
STEPS = 3  # of an epoch: 4, 4 and 2 images
WEIGHTS = {
    "kd": "0.1+0.9+0.0", "fitnet": "0.1+0.9+100.0", "at": "0.1+0.9+1000.0", "sp": "0.1+0.9+3000.0",
    "vid": "0.1+0.9+1.0", "rkd": "0.1+0.9+1.0", "pkt": "0.1+0.9+30000.0", "ab": "0.1+0.9+1.0",
    "ft": "0.1+0.9+200.0", "crd": "0.1+0.9+0.8", "dkd": "1.0+0.0+1.0", "ls": "0.1+0.0+9.0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """First phases of two epochs, few negatives."""
    for name in ("ab", "ft"):
        monkeypatch.setattr(METHODS[name], "first_epochs", 2)
    monkeypatch.setattr(methods.CRD, "negatives", 8)


@pytest.fixture
def flags(runs, tmp_path):
    """The command line of a tiny run of a method."""

    def command(method, *more):
        networks = ["--t-path", runs.teacher, "--experiments", tmp_path]
        return [str(word) for word in ("--method", method, *networks, *TINY, *more)]

    return command


def folder_of(tmp_path, method):
    (folder,) = tmp_path.glob(f"{method}_student_*")
    return folder


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def initial_student():
    torch.manual_seed(0)
    return models.model_dict["resnet14x05"]()


def same(a, b):
    """Names of the entries of two state dicts that are equal."""
    return {name for name, value in a.items() if torch.equal(value, b[name])}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_what_the_design_promises(method, flags, tmp_path):
    baseline.main(flags(method))
    folder = folder_of(tmp_path, method)
    assert folder.name == f"{method}_student_resnet14x05_weight{WEIGHTS[method]}_T4.0_seed0_teacher_resnet8_seed0"
    assert {path.name for path in (folder / "ckpt").iterdir()} == {"student_best.pth", "last.pth"}
    best = torch.load(folder / "ckpt" / "student_best.pth", weights_only=True)
    result = json.loads((folder / "result.json").read_text())
    assert set(best) == {"epoch", "state_dict", "best_acc", "about"}
    assert (best["best_acc"], best["epoch"], 2) == (result["best_acc"], result["best_epoch"], result["epochs"])
    student = models.load(folder)  # the network that the checkpoint names
    assert same(best["state_dict"], student.state_dict()) == set(student.state_dict())
    assert not same(dict(student.named_parameters()), dict(initial_student().named_parameters()))
    first = [line for line in lines_of(folder) if line["phase"] == "first"]
    main = [line for line in lines_of(folder) if line["phase"] == "student"]
    assert ([line["epoch"] for line in first], len(main)) == ([1, 2] if method in ("ab", "ft") else [], 2)
    assert all(set(line) == {"phase", "epoch", "train/first_loss", "train/first_lr"} for line in first)
    tags = {"train/ce_loss", "train/kd_loss", f"train/{method}_loss", "train/cls_acc", "train/lr"}
    tags |= {"val/ce_loss", "val/cls_acc", "val/cls_acc_top5"}
    assert all(set(line) == tags | {"phase", "epoch"} for line in main)
    events = EventAccumulator(str(folder / "events")).Reload()
    for tag in tags:
        points = [(point.step, point.value) for point in events.Scalars(tag)]
        assert points == [(line["epoch"], pytest.approx(line[tag])) for line in main], tag


@pytest.mark.parametrize(
    "method, more",
    [
        *((method, ["--amp", "bf16"]) for method in ("vid", "ft", "crd")),
        ("crd", ["--amp", "fp16"]),
        ("crd", ["--deterministic"]),
    ],
)
def test_half_precision_and_deterministic_runs_work(method, more, flags, tmp_path):
    baseline.main(flags(method, *more, "--s-arch", "resnet8", "--epoch", "1"))
    assert torch.are_deterministic_algorithms_enabled() == (more == ["--deterministic"])
    assert len(lines_of(folder_of(tmp_path, method))) == 1 + 2 * (method == "ft")


def after_first_phase(method, flags, monkeypatch):
    """Student and method as the main phase gets them."""
    got = []  # not the run, which holds the folder's lock as long as it is there
    monkeypatch.setattr(baseline, "distil", lambda args, run, networks, method, data: got.extend((networks, method)))
    baseline.main(flags(method))
    return got[0].student.state_dict(), got[1].state_dict()


def test_abs_first_phase_trains_the_student_but_its_classifier(flags, monkeypatch):
    student, _ = after_first_phase("ab", flags, monkeypatch)
    assert same(student, initial_student().state_dict()) == {"fc.weight", "fc.bias"}
    assert student["layer3.0.bn1.num_batches_tracked"] == 2 * STEPS


def test_fts_first_phase_trains_the_paraphraser_alone(flags, monkeypatch):
    student, method = after_first_phase("ft", flags, monkeypatch)
    before = initial_student()
    assert same(student, before.state_dict()) == set(student)
    shape = torch.zeros(2, 64, 8, 8), torch.zeros(2, 64)  # resnet8's last map and pooled vector
    started = METHODS["ft"](Outputs([torch.zeros(2, 32, 8, 8), shape[1]], None), Outputs(list(shape), None), None)
    unchanged = same(method, started.state_dict())
    assert unchanged == {name for name in method if name.startswith("translator.")}


def test_fts_first_phase_does_not_run_the_student(flags):
    _, networks, made, batch = step_of("ft", flags)
    loss, _ = baseline.make_first_loss(networks._replace(student=None), made)(batch)
    assert loss.requires_grad


def test_fts_main_phase_leaves_the_paraphraser_alone(flags, monkeypatch, tmp_path):
    _, before = copy.deepcopy(after_first_phase("ft", flags, monkeypatch))
    monkeypatch.undo()
    monkeypatch.setattr(METHODS["ft"], "first_epochs", 2)
    baseline.main(flags("ft"))
    after = torch.load(folder_of(tmp_path, "ft") / "ckpt" / "last.pth", weights_only=True)["parts"]["method"]
    assert same(before, after) == {name for name in before if name.startswith("paraphraser.")}


VECTORS = ("kd", "rkd", "pkt", "crd", "dkd", "ls")


@pytest.mark.parametrize("method", [name for name in METHODS if name not in VECTORS])
def test_methods_that_ask_for_maps_do_not_go_with_stored_features(method, flags, fails):
    assert "asks for maps, which are not stored" in fails(baseline.main, *flags(method, "--t-features", "disk"))


@pytest.mark.parametrize("method", VECTORS)
def test_stored_features_give_the_losses_of_computed_ones(method, flags, monkeypatch):
    """Up to the rounding to float16, and without the teacher's backbone."""
    got = []

    def first_batch(module, loss_of, batches, *args):
        batch = next(batches)
        got.append((loss_of(batch)[1], batch.feature))
        raise utils.Fault("enough")

    monkeypatch.setattr(utils, "train_epoch", first_batch)
    for where in ("compute", "memory"):
        assert end_of(baseline.main, flags(method, "--t-features", where, "--overwrite")) == 1
    (computed, none), (stored, feature) = got
    assert none is None
    assert feature.shape == (4, 64)
    for name in computed:
        assert stored[name].item() == pytest.approx(computed[name].item(), rel=2e-3), name


def stop_at(step, monkeypatch):
    """Lets a run fail before its update number `step`."""
    updates = iter(range(1, 10**9))
    update = utils.SGD.step

    def failing(self, loss):
        if next(updates) == step:
            raise utils.Fault("stopped by the test")
        update(self, loss)

    monkeypatch.setattr(utils.SGD, "step", failing)


@pytest.mark.parametrize(
    "method, steps",
    [
        ("crd", (5,)),  # in the second epoch, when banks and Z have been set
        ("dkd", (5,)),
        ("ab", (2, 5)),  # in either epoch of the first phase
        ("ab", (8, 5)),  # in the first epoch of the main phase, then, from where that began, in its second
        ("ft", (5, 5)),
        ("ft", (11,)),
    ],
)
def test_a_stopped_run_ends_as_if_it_had_never_been_stopped(method, steps, flags, tmp_path, monkeypatch, capsys):
    baseline.main([*flags(method), "--experiments", str(tmp_path / "whole")])
    for step in steps:
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            assert end_of(baseline.main, flags(method)) == 1
        assert "stopped by the test" in capsys.readouterr().err
    baseline.main(flags(method))
    assert contents(folder_of(tmp_path, method)) == contents(folder_of(tmp_path / "whole", method))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, phases", [("crd", ["student"]), ("ab", ["first", "student"]), ("ft", ["first", "student"])]
)
def test_kills_at_random_moments_of_every_phase_change_nothing(method, phases, runs, tmp_path):
    """Each round trains anew, killed again and again until it is through; rounds until each phase had five kills."""
    rng = random.Random(0)
    flags = ["--method", method, "--t-path", str(runs.teacher), *TINY, "--epoch", "30"]  # as many as a first phase has

    def one_run(cwd, seconds=None):
        """Runs in a new folder, killed again and again, within `seconds` after an epoch; gives the run folder."""
        cwd.mkdir()
        while seconds:
            command = [sys.executable, ROOT / "baseline.py", *flags]
            process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            with process:
                of_epochs = (line for line in process.stdout if "/30 " in line)
                list(itertools.islice(of_epochs, rng.randrange(20)))
                try:
                    process.communicate(timeout=rng.uniform(0, seconds))
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
            lines = [line for log in cwd.glob("experiments/*/log.jsonl") for line in log.read_text().splitlines()]
            kills[json.loads(lines[-1])["phase"] if lines else "before the first epoch"] += 1
        done = run_script("baseline.py", *flags, cwd=cwd)
        assert (done.returncode, done.stderr) == (0, "")
        return folder_of(cwd / "experiments", method)

    kills = collections.Counter()
    whole = one_run(tmp_path / "whole")
    epoch = json.loads((whole / "result.json").read_text())["seconds"] / (30 * len(phases))
    for number in range(10):
        assert contents(one_run(tmp_path / str(number), epoch)) == contents(whole)
        if min(kills[phase] for phase in phases) >= 5:
            break
    assert min(kills[phase] for phase in phases) >= 5, kills


def test_dkds_warm_up_follows_the_epochs_of_a_resumed_run(flags, monkeypatch, capsys):
    warm_ups = []
    forward = METHODS["dkd"].forward

    def noting(self, *outputs):
        warm_ups.append(round(self.warm_up.item(), 6))
        return forward(self, *outputs)

    monkeypatch.setattr(METHODS["dkd"], "forward", noting)
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert end_of(baseline.main, flags("dkd")) == 1
    baseline.main(flags("dkd"))
    assert warm_ups == [0.05] * STEPS + [0.1] * 2 + [0.1] * STEPS  # the second epoch twice, as it was not over
    warm_ups.clear()
    baseline.main(flags("dkd", "--first-epoch", "1", "--overwrite"))
    assert warm_ups == [1.0] * 2 * STEPS


def test_the_first_phases_length_may_be_given_and_is_no_flag_of_other_methods(flags, tmp_path):
    baseline.main(flags("ft", "--first-epoch", "3"))
    assert [line["phase"] for line in lines_of(folder_of(tmp_path, "ft"))] == ["first"] * 3 + ["student"] * 2
    assert baseline.parse_args(flags("kd", "--first-epoch", "3")).first_epoch is None


def test_crd_saves_its_banks_and_their_constants(flags, tmp_path):
    baseline.main(flags("crd"))
    last = torch.load(folder_of(tmp_path, "crd") / "ckpt" / "last.pth", weights_only=True)["parts"]["method"]
    for bank in ("bank_s", "bank_t"):
        assert last[f"{bank}.Z"] > 0
        assert torch.linalg.vector_norm(last[f"{bank}.memory"], dim=1) == pytest.approx(torch.ones(10))  # each was seen


def test_the_method_knows_the_labels_of_the_images_as_served(flags, monkeypatch):
    got = {}
    monkeypatch.setattr(baseline, "distil", lambda args, run, networks, method, data: got.update(locals()))
    baseline.main(flags("crd", "--train-size", "400", "--few-shot", "0.5", "--label-noise", "0.2"))
    train_set = got["data"][0]
    assert len(train_set) == len(cifar.load(got["args"], "cpu")[0]) < 400
    assert torch.equal(got["method"].labels, train_set.labels)
    assert got["method"].bank_s.memory.shape == (len(train_set), 128)
    assert "_T4.0_few0.5_noise0.2_seed0_" in got["run"].folder.name


def test_the_teachers_accuracy_is_that_of_its_own_run(runs, flags, tmp_path, capsys):
    baseline.main(flags("kd", "--test-size", "40"))
    reported = json.loads((runs.teacher / "result.json").read_text())["best_acc"]
    assert f"test accuracy {reported:.2f}\n" in capsys.readouterr().out


def test_a_finished_run_says_so_and_exports_its_student(flags, tmp_path, capsys):
    baseline.main(flags("kd"))
    before = contents(folder_of(tmp_path, "kd"))
    baseline.main(flags("kd", "--export", tmp_path / "student.pt2"))
    assert "is finished" in capsys.readouterr().out
    assert contents(folder_of(tmp_path, "kd")) == before
    exported = torch.export.load(tmp_path / "student.pt2").module()
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = models.load(folder_of(tmp_path, "kd")).eval()((pixels - 0.1863) / 0.2018)  # the statistics of synthetic
    torch.testing.assert_close(exported(pixels), expected, rtol=1e-4, atol=1e-4)


def test_a_run_with_another_weight_has_another_folder(flags, tmp_path):
    baseline.main(flags("at"))
    baseline.main(flags("at", "--ce-weight", "1", "--kd-weight", "0", "--weight", "10", "--kd-T", "2"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("_seed0")[0] for name in names] == [
        "at_student_resnet14x05_weight0.1+0.9+1000.0_T4.0",
        "at_student_resnet14x05_weight1.0+0.0+10.0_T2.0",
    ]


# The step


def step_of(method, flags, *more):
    """The args, networks and method of a run, and a batch of its images."""
    args = baseline.parse_args(flags(method, *more))
    checkpoint = load_teacher(args)
    train_set = cifar.load(args, "cpu").train
    torch.manual_seed(0)
    networks = baseline.make_networks(args, checkpoint.network, torch.device("cpu"))
    made = baseline.make_method(args, checkpoint, networks, train_set.labels)
    return args, networks, made, next(train_set.batches("baseline", 1, views=1))


@pytest.mark.parametrize("method", ["fitnet", "ls"])
def test_the_loss_is_the_weighted_sum_of_its_terms(method, runs, flags):
    args, networks, made, batch = step_of(method, flags, "--ce-weight", "0.3", "--kd-weight", "0.6", "--weight", "7")
    plain, student = models.load(runs.teacher).eval(), copy.deepcopy(networks.student).eval()
    adapter = copy.deepcopy(made).eval()
    loss, logged = baseline.make_loss(args, networks, made.eval())(batch)
    s, t = (Outputs(*network(batch.x, is_feat=True)) for network in (student, plain))
    terms = {
        "ce_loss": F.cross_entropy(s.logits, batch.target),
        "kd_loss": 16 * F.kl_div((s.logits / 4).log_softmax(1), (t.logits / 4).softmax(1), reduction="batchmean"),
        f"{method}_loss": adapter(s, t, batch.target, batch.rows),
    }
    for name, term in terms.items():
        assert logged[name].item() == pytest.approx(term.item(), rel=1e-4), name
    ce, kd, term = (term.item() for term in terms.values())
    assert loss.item() == pytest.approx(0.3 * ce + 0.6 * kd + 7 * term, rel=1e-4)


def test_kd_has_no_second_term(flags):
    args, networks, made, batch = step_of("kd", flags)
    loss, logged = baseline.make_loss(args, networks, made)(batch)
    assert loss.item() == pytest.approx(0.1 * logged["ce_loss"].item() + 0.9 * logged["kd_loss"].item())


def test_a_term_of_weight_0_may_be_anything(flags, monkeypatch):
    args, networks, made, batch = step_of("sp", flags, "--weight", "0")
    monkeypatch.setattr(type(made), "forward", lambda self, *_: torch.tensor(torch.nan))
    loss, logged = baseline.make_loss(args, networks, made)(batch)
    assert loss.isfinite()
    assert logged["sp_loss"].isnan()


@pytest.mark.parametrize("method", ["ab", "crd"])
def test_the_loss_with_both_networks_compiles_to_one_graph(method, flags):
    args, networks, made, batch = step_of(method, flags)
    losses = [baseline.make_loss(args, networks, made)]
    losses += [baseline.make_first_loss(networks, made)] if method == "ab" else []
    for loss_of in losses:
        loss, _ = torch.compile(loss_of, fullgraph=True, backend="eager")(batch)
        loss.backward()
        assert networks.student.conv1.weight.grad.abs().sum() > 0
        networks.student.zero_grad()


def test_dkds_weight_is_that_of_the_pair(runs, flags, tmp_path):
    (tmp_path / "teacher_wrn_40_2").mkdir()
    torch.save(models.model_dict["wrn_40_2"]().state_dict(), tmp_path / "teacher_wrn_40_2" / "best.pth")
    of_pair = step_of("dkd", flags, "--t-path", tmp_path / "teacher_wrn_40_2", "--s-arch", "wrn_16_2")[2]
    assert of_pair.beta == 6
    assert step_of("dkd", flags)[2].beta == 8


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_run_is_the_uncompiled_one_up_to_rounding(method, flags, tmp_path):
    torch.compiler.reset()  # a process has but eight graphs of one function, and a run is a process of its own
    # batches of one size: one graph; a low rate: rounding does not grow from step to step
    more = ["--lr", "0.0001", "--train-size", "8", "--experiments"]
    for name in ("eager", "compiled"):
        baseline.main([*flags(method, *more, tmp_path / name), *(["--compile"] if name == "compiled" else [])])
    eager, compiled = (
        [(line["phase"], {tag: x for tag, x in line.items() if tag.endswith("loss")}) for line in lines_of(folder)]
        for folder in (folder_of(tmp_path / name, method) for name in ("eager", "compiled"))
    )
    assert len(eager) == 2 + 2 * (method in ("ab", "ft"))
    for (phase, expected), (phase_compiled, losses) in zip(eager, compiled, strict=True):
        assert phase_compiled == phase
        assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_compiled_draw_is_the_same():
    labels, when = torch.arange(50) % 10, torch.tensor([2**32 - 1, 240, 781])
    for count, replace in ((20, False), (60, True)):
        given = labels, labels[:6], count, replace, when
        compiled = torch.compile(negatives.draw_negatives, fullgraph=True)
        assert torch.equal(compiled(*given), negatives.draw_negatives(*given))


# The eleven pairs of the published tables


@pytest.mark.parametrize("t_arch, s_arch", PAIRS)
def test_every_pairs_step_runs_on_cuda_without_asking_the_device(t_arch, s_arch):
    """On fake tensors a tensor left on the wrong device fails, and so does a value that the host asks for."""
    with FakeTensorMode(), torch.device("cuda"):
        student, teacher = models.model_dict[s_arch](), models.model_dict[t_arch]().eval()
        batch = cifar.Batch(torch.randn(4, 3, 32, 32), torch.arange(4), torch.arange(4), torch.zeros(4, 1).long())
        given = {
            preact: [network(batch.x, is_feat=True, preact=preact) for network in (student, teacher)]
            for preact in (False, True)
        }
        for name in METHODS.keys() - {"crd"}:  # whose constructor counts the labels; its step is in test_methods.py
            args = baseline.parse_args(["--method", name, "--t-path", "unused", "--s-arch", s_arch])
            preact = name == "ab"
            once = [lambda *_, out=out, **__: out for out in given[preact]]
            networks = baseline.Networks(*once, preact, utils.precision("off", torch.device("cuda")))
            made = METHODS[name](networks.of_student(batch.x), networks.of_teacher(batch.x), batch.target)
            loss, logged = baseline.make_loss(args, networks, made)(batch)
            assert {x.device.type for x in (loss, *logged.values())} == {"cuda"}
            if name in ("ab", "ft"):
                assert baseline.make_first_loss(networks, made)(batch)[0].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t_arch, s_arch", PAIRS)
def test_every_method_trains_a_step_of_every_pair(t_arch, s_arch, method, amp, tmp_path):
    path = tmp_path / f"teacher_{t_arch}"
    args = baseline.parse_args(["--method", method, "--t-path", str(path), "--s-arch", s_arch, "--amp", amp])
    path.mkdir()
    torch.save(models.model_dict[t_arch]().state_dict(), path / "best.pth")
    checkpoint = load_teacher(args)
    train_set = cifar.Images(*cifar.synthetic(True, 8), cifar.STATISTICS["synthetic"], "cpu", batch_size=4)
    networks = baseline.make_networks(args, checkpoint.network, torch.device("cpu"))
    made = baseline.make_method(args, checkpoint, networks, train_set.labels)
    before = copy.deepcopy(networks.student).state_dict()
    losses = {False: baseline.make_loss(args, networks, made)}
    if hasattr(made, "first_loss"):
        losses = {True: baseline.make_first_loss(networks, made)} | losses
    for first, loss_of in losses.items():
        trained = methods.set_phase(made, networks.student, first)
        sgd = utils.SGD(trained.parameters(), 0.001, [], args)
        batches = [next(train_set.batches("baseline", 1, views=1))]
        utils.train_epoch(trained, loss_of, batches, sgd, 4, "one step")  # a Fault if the loss is not finite
    changed = set(before) - same(before, networks.student.state_dict())
    assert {name for name, _ in networks.student.named_parameters()} <= changed
