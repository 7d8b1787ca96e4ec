"""baseline.py: every compared method trains from the command line, stops, resumes and exports."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import contents, end_of, stop_at
from oracle import PUBLISHED
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import FakeTensorMode

import baseline
import cifar
import methods
import models
import utils
from harness import sources
from harness.flags import UserError
from methods import METHODS, Outputs, crd, negatives
from models import model_dict
from wrapper import classifier, frozen

PAIRS = PUBLISHED["similar"]["pairs"] + PUBLISHED["cross"]["pairs"]
TINY = ["--dataset", "synthetic", "--train-size", "10", "--test-size", "6", "--batch-size", "4"]
TINY += ["--s-arch", "resnet14x05", "--epoch", "2", "--milestones", "1"]
STEPS = 3  # of an epoch: 4, 4 and 2 images
WEIGHTS = {
    "kd": "0.1+0.9+0.0", "fitnet": "0.1+0.9+100.0", "at": "0.1+0.9+1000.0", "sp": "0.1+0.9+3000.0",
    "vid": "0.1+0.9+1.0", "rkd": "0.1+0.9+1.0", "pkt": "0.1+0.9+30000.0", "ab": "0.1+0.9+1.0",
    "ft": "0.1+0.9+200.0", "crd": "0.1+0.9+0.8", "dkd": "1.0+0.0+1.0", "ls": "0.1+0.0+9.0",
}  # fmt: skip
VECTORS = ("kd", "rkd", "pkt", "crd", "dkd", "ls")  # the methods that need no maps


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
    return model_dict["resnet14x05"]()


def same(a, b):
    """Names of the entries of two state dicts that are equal."""
    return {name for name, value in a.items() if torch.equal(value, b[name])}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_its_checkpoint_its_log_and_its_curves(method, flags, tmp_path):
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
    assert all(set(line) == {"phase", "epoch", "seconds", "train/first_loss", "train/first_lr"} for line in first)
    tags = {"train/loss", "train/ce_loss", "train/kd_loss", f"train/{method}_loss", "train/cls_acc", "train/lr"}
    tags |= {"val/ce_loss", "val/cls_acc", "val/cls_acc_top5"}
    assert all(set(line) == tags | {"phase", "epoch", "seconds"} for line in main)
    events = EventAccumulator(str(folder / "events")).Reload()
    for tag in tags:
        assert [x.value for x in events.Scalars(tag)] == pytest.approx([line[tag] for line in main]), tag


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


# The phases


def after_first_phase(method, flags, monkeypatch):
    """State dicts of student and method as the main phase gets them."""
    got = []  # not the run, which holds the folder's lock as long as it exists
    with monkeypatch.context() as patch:
        patch.setattr(baseline, "distil", lambda args, run, networks, made, *_: got.extend((networks, made)))
        baseline.main(flags(method))
    return got[0].student.state_dict(), got[1].state_dict()


def test_abs_first_phase_trains_all_of_the_student_but_its_classifier(flags, monkeypatch):
    student, _ = after_first_phase("ab", flags, monkeypatch)
    assert same(student, initial_student().state_dict()) == {"fc.weight", "fc.bias"}
    assert student["layer3.0.bn1.num_batches_tracked"] == 2 * STEPS


def test_fts_first_phase_trains_only_the_paraphraser_and_its_main_phase_only_the_translator(
    flags, monkeypatch, tmp_path
):
    student, method = copy.deepcopy(after_first_phase("ft", flags, monkeypatch))
    assert same(student, initial_student().state_dict()) == set(student)
    shape = torch.zeros(2, 64, 8, 8), torch.zeros(2, 64)  # resnet8's last map and pooled vector
    started = METHODS["ft"](Outputs([torch.zeros(2, 32, 8, 8), shape[1]], None), Outputs(list(shape), None), None)
    assert same(method, started.state_dict()) == {name for name in method if name.startswith("translator.")}
    baseline.main(flags("ft"))
    after = torch.load(folder_of(tmp_path, "ft") / "ckpt" / "last.pth", weights_only=True)["parts"]["method"]
    assert same(method, after) == {name for name in method if name.startswith("paraphraser.")}


def test_first_epoch_sets_the_length_of_the_first_phase_and_means_nothing_to_other_methods(flags, tmp_path):
    baseline.main(flags("ft", "--first-epoch", "3"))
    assert [line["phase"] for line in lines_of(folder_of(tmp_path, "ft"))] == ["first"] * 3 + ["student"] * 2
    assert baseline.parse_args(flags("kd", "--first-epoch", "3")).first_epoch is None


# Stopping and resuming


@pytest.mark.parametrize(
    "method, steps",
    [
        ("crd", (5,)),  # in the second epoch, when banks and Z have been set
        ("dkd", (5,)),
        ("ab", (2, 5, 5, 5)),  # in both epochs of the first phase, then in both of the main phase
        ("ft", (2, 5, 5, 5)),
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


def test_dkds_warm_up_follows_the_epochs_of_a_resumed_run(flags, monkeypatch):
    warm_ups, forward = [], METHODS["dkd"].forward

    def noting(self, *outputs):
        warm_ups.append(round(self.warm_up.item(), 6))
        return forward(self, *outputs)

    monkeypatch.setattr(METHODS["dkd"], "forward", noting)
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert end_of(baseline.main, flags("dkd")) == 1
    baseline.main(flags("dkd"))
    assert warm_ups == [0.05] * STEPS + [0.1] * 2 + [0.1] * STEPS  # the second epoch begins again
    warm_ups.clear()
    baseline.main(flags("dkd", "--first-epoch", "1", "--seed", "1"))
    assert warm_ups == [1.0] * 2 * STEPS


def test_crds_negatives_follow_from_seed_epoch_and_step_of_a_resumed_run(flags, monkeypatch, tmp_path):
    draws, draw = [], crd.draw_negatives

    def noting(*given):
        draws.append(given[-1].tolist())
        return draw(*given)

    monkeypatch.setattr(crd, "draw_negatives", noting)
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert end_of(baseline.main, flags("crd", "--seed", "7")) == 1
    baseline.main(flags("crd", "--seed", "7"))
    assert draws == [[7, *when] for when in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 0), (2, 1), (2, 2)]]
    last = torch.load(folder_of(tmp_path, "crd") / "ckpt" / "last.pth", weights_only=True)["parts"]["method"]
    for bank in ("bank_s", "bank_t"):
        assert last[f"{bank}.Z"] > 0
        assert torch.linalg.vector_norm(last[f"{bank}.memory"], dim=1) == pytest.approx(torch.ones(10))  # each was seen


def test_a_finished_run_says_so_and_exports_its_student(flags, tmp_path, capsys):
    for more in ((), ("--export", tmp_path / "student.pt2")):
        baseline.main(flags("kd", *more))
    assert "is finished" in capsys.readouterr().out
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = models.load(folder_of(tmp_path, "kd")).eval()((pixels - 0.1863) / 0.2018)  # the statistics of synthetic
    exported = torch.export.load(tmp_path / "student.pt2").module()
    torch.testing.assert_close(exported(pixels), expected, rtol=1e-4, atol=1e-4)


# The flags


def test_the_folders_name_holds_the_weights_and_the_temperature(flags):
    args = baseline.parse_args(flags("at", *"--ce-weight 1 --kd-weight 0 --weight 10 --kd-T 2".split()))
    assert baseline.run_folder(args, "teacher").name == "at_student_resnet14x05_weight1.0+0.0+10.0_T2.0_seed0_teacher"


REFUSED = [(name, ["--t-features", "disk"], "needs maps, which are not stored") for name in METHODS.keys() - {*VECTORS}]
REFUSED += [("kd", ["--weight", "1"], "whose weight is --kd-weight")]
REFUSED += [("ab", ["--ce-weight", "0", "--kd-weight", "0"], "nothing to learn")]
REFUSED += [("crd", ["--ce-weight", "0", "--kd-weight", "0", "--weight", "0"], "nothing to learn")]


@pytest.mark.parametrize("method, more, words", sorted(REFUSED))
def test_flags_that_make_no_sense_together_are_refused(method, more, words):
    with pytest.raises(UserError, match=words):
        baseline.parse_args(["--method", method, "--t-path", "unused", *TINY, *more])


def test_the_method_gets_the_labels_of_the_training_images_noise_included(flags, monkeypatch):
    got = {}
    monkeypatch.setattr(baseline, "distil", lambda args, run, networks, made, data, table: got.update(locals()))
    baseline.main(flags("crd", "--train-size", "400", "--few-shot", "0.5", "--label-noise", "0.2"))
    images = got["data"].train
    assert torch.equal(got["made"].labels, images.labels)
    assert (images.labels != sources.synthetic(True, 400)[1][images.index]).sum() == 40
    assert got["made"].bank_s.memory.shape == (200, 128)
    assert "_T4.0_few0.5_noise0.2_seed0_" in got["run"].folder.name


# The step


def step_of(method, *more, t_arch="resnet8", s_arch="resnet14x05"):
    """The flags, networks and method of a run, and a batch of its images."""
    args = baseline.parse_args(["--method", method, "--t-path", "unused", "--s-arch", s_arch, *more])
    images = cifar.Images(sources.synthetic(True, 10), sources.STATISTICS["synthetic"], "cpu", batch_size=4)
    torch.manual_seed(0)
    student, preact = model_dict[s_arch](), METHODS[method].preact
    teacher = frozen(model_dict[t_arch](), preact=preact)
    autocast = utils.precision(args.amp, torch.device("cpu"))
    networks = baseline.Networks(student, teacher, classifier(teacher), preact, autocast)
    made = baseline.make_method(args, networks, images, t_arch)
    return args, networks, made, next(images.batches("baseline", 1, views=1))


@pytest.mark.parametrize("method, weight", [("fitnet", "7"), ("ls", "7"), ("kd", "0")])
def test_the_loss_is_the_weighted_sum_of_its_terms(method, weight):
    """kd itself has no second term."""
    args, networks, made, batch = step_of(method, "--ce-weight", "0.3", "--kd-weight", "0.6", "--weight", weight)
    loss, logged = baseline.make_loss(args, networks, made)(batch)
    s, t = Outputs(*networks.student(batch.x, is_feat=True)), Outputs(*networks.teacher(batch.x))
    kd = 16 * F.kl_div((s.logits / 4).log_softmax(1), (t.logits / 4).softmax(1), reduction="batchmean")
    own = kd if method == "kd" else made(s, t, batch.target, batch.rows)
    ce = F.cross_entropy(s.logits, batch.target)
    for name, term in {"ce": ce, "kd": kd, method: own}.items():
        assert logged[f"{name}_loss"].item() == pytest.approx(term.item(), rel=1e-4), name
    assert loss.item() == pytest.approx((0.3 * ce + 0.6 * kd + float(weight) * own).item(), rel=1e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_term_of_weight_0_may_be_anything(compiled, monkeypatch):
    args, networks, made, batch = step_of("fitnet", "--weight", "0")
    monkeypatch.setattr(type(made), "forward", lambda self, s, *_: (self.regressor(s.features[2]) * torch.nan).sum())
    loss_of = baseline.make_loss(args, networks, made)
    loss, logged = (torch.compile(loss_of, backend="aot_eager") if compiled else loss_of)(batch)
    loss.backward()
    assert loss.isfinite() and logged["fitnet_loss"].isnan()
    assert all(parameter.grad.isfinite().all() for parameter in networks.student.parameters())
    assert made.regressor.conv.weight.grad is None


@pytest.mark.parametrize("method, first", [*((name, False) for name in METHODS), ("ab", True), ("ft", True)])
def test_only_what_the_optimizer_trains_has_a_gradient(method, first):
    """Of wrn, AB reads the maps through the next batch norm, which does not train in its first phase."""
    args, networks, made, batch = step_of(method, t_arch="wrn_16_1", s_arch="wrn_16_1")
    trained = {id(p) for p in methods.set_phase(made, networks.student, first).parameters()}
    loss_of = baseline.make_first_loss(networks, made) if first else baseline.make_loss(args, networks, made)
    loss_of(batch)[0].backward()
    everything = [*networks.student.parameters(), *networks.teacher.parameters(), *made.parameters()]
    having = {id(parameter) for parameter in everything if parameter.grad is not None}
    assert having and having <= trained


@pytest.mark.parametrize("method", VECTORS)
def test_stored_features_give_the_losses_of_computed_ones_without_the_backbone(method):
    """Up to the rounding to float16."""
    args, networks, made, batch = step_of(method)
    again, feature = copy.deepcopy(made), networks.teacher(batch.x)[0][-1].half()
    _, computed = baseline.make_loss(args, networks, made)(batch)
    _, stored = baseline.make_loss(args, networks._replace(teacher=None), again)(batch._replace(feature=feature))
    for name in computed:
        assert stored[name].item() == pytest.approx(computed[name].item(), rel=2e-3), name


def test_a_run_with_stored_features_equals_one_without_up_to_rounding(flags, tmp_path):
    for where in ("compute", "memory"):
        baseline.main([*flags("crd", "--t-features", where), "--experiments", str(tmp_path / where)])
    computed, stored = (lines_of(folder_of(tmp_path / where, "crd")) for where in ("compute", "memory"))
    for one, other in zip(computed, stored, strict=True):
        losses = [tag for tag in one if tag.endswith("loss")]
        assert [other[tag] for tag in losses] == pytest.approx([one[tag] for tag in losses], rel=5e-3)
    assert stored != computed


@pytest.mark.parametrize("method, first", [("crd", False), ("ab", False), ("ab", True), ("ft", True)])
def test_the_loss_with_both_networks_compiles_to_one_graph(method, first):
    args, networks, made, batch = step_of(method)
    if method == "ft":
        networks = networks._replace(student=None)  # its first phase does not run the student
    loss_of = baseline.make_first_loss(networks, made) if first else baseline.make_loss(args, networks, made)
    loss, _ = torch.compile(loss_of, fullgraph=True, backend="eager")(batch)
    loss.backward()
    trained = made.paraphraser if method == "ft" else networks.student
    assert next(trained.parameters()).grad.abs().sum() > 0


def test_dkds_beta_is_that_of_the_pair():
    assert step_of("dkd", t_arch="wrn_40_2", s_arch="wrn_16_2")[2].beta == 6
    method = step_of("dkd")[2]
    assert method.beta == 8
    method.choose_pair("resnet110", "resnet32")
    assert method.beta == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_run_is_the_uncompiled_one_up_to_rounding(method, flags, tmp_path):
    torch.compiler.reset()  # a process has at most eight graphs of one function, and a run is a process of its own
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


@pytest.mark.parametrize(
    "t_arch, s_arch", [PAIRS[0], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS[1:])]
)
def test_every_pairs_step_runs_on_cuda_without_waiting_for_the_device(t_arch, s_arch):
    """With fake tensors, a tensor on the wrong device fails, and so does a value that the host reads."""
    with FakeTensorMode(), torch.device("cuda"):
        student, teacher = model_dict[s_arch](), model_dict[t_arch]().eval()
        batch = cifar.Batch(torch.randn(4, 3, 32, 32), torch.arange(4), torch.arange(4))
        given = {
            preact: [network(batch.x, is_feat=True, preact=preact) for network in (student, teacher)]
            for preact in (False, True)
        }
        for name in METHODS.keys() - {"crd"}:  # its constructor counts the labels; its step is in test_methods.py
            args = baseline.parse_args(["--method", name, "--t-path", "unused", "--s-arch", s_arch])
            preact = name == "ab"
            once = [lambda *_, out=out, **__: out for out in given[preact]]
            networks = baseline.Networks(*once, None, preact, utils.precision("off", torch.device("cuda")))
            made = METHODS[name](networks.of_student(batch.x), networks.of_teacher(batch.x), batch.target)
            loss, logged = baseline.make_loss(args, networks, made)(batch)
            assert {x.device.type for x in (loss, *logged.values())} == {"cuda"}
            if name in ("ab", "ft"):
                assert baseline.make_first_loss(networks, made)(batch)[0].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t_arch, s_arch", PAIRS)
def test_every_method_trains_a_step_of_every_pair(t_arch, s_arch, method, amp):
    args, networks, made, batch = step_of(method, "--amp", amp, t_arch=t_arch, s_arch=s_arch)
    before = copy.deepcopy(networks.student).state_dict()
    losses = {True: baseline.make_first_loss(networks, made)} if made.first_phase else {}
    for first, loss_of in (losses | {False: baseline.make_loss(args, networks, made)}).items():
        trained = methods.set_phase(made, networks.student, first)
        loss, _ = loss_of(batch)
        assert loss.isfinite()
        utils.SGD(trained, 0.001, [], args).step(loss)
    changed = set(before) - same(before, networks.student.state_dict())
    assert {name for name, _ in networks.student.named_parameters()} <= changed
