"""methods/ against the figures of the published code (golden/COMPARED.md), brute force and statistics."""

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracle import COMPARED, LATER, fill_rounded, labels, rounded
from torch import nn

from harness.flags import UserError
from methods import METHODS, Outputs, crd, kd_loss, maps, phases, set_phase
from models import model_dict

PAIRS, LOSSES, EDGE = COMPARED["pairs"], COMPARED["losses"], COMPARED["edge"]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    """The default dtype of the test."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


float64 = pytest.mark.parametrize("dtype", [torch.float64], indirect=True, ids=["float64"])


@pytest.fixture(params=PAIRS)
def case(request, dtype):
    """The inputs of one pair of shapes, and the published figures for them."""
    return inputs(request.param)


def inputs(name, scale=1.0):
    base, dtype = PAIRS[name]["base"], torch.get_default_dtype()

    def outputs(key, shapes):
        features = [rounded(base + key + i, shape, scale).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
        logits = rounded(base + key + 20, (shapes[0][0], 100), 3).to(dtype)
        return Outputs(features, logits.requires_grad_())

    student, teacher = (outputs(key, PAIRS[name][side]) for key, side in ((0, "student"), (50, "teacher")))
    rows = torch.arange(len(student.logits))
    batch = {"student": student, "teacher": teacher, "target": labels(base + 90, len(rows), 100), "rows": rows}
    return SimpleNamespace(name=name, base=base, figures=LOSSES[name], labels=torch.arange(50) % 10, **batch)


def build(name, case):
    return METHODS[name](case.student, case.teacher, case.labels)


def term(method, case):
    return method(case.student, case.teacher, case.target, case.rows)


def l2(x):
    return torch.linalg.vector_norm(x.detach().double()).item()


def near(got, want, f32=None, what=""):
    """Compares numbers, lists and dictionaries with the figures in `want`, to the tolerance of the default dtype."""
    if isinstance(got, dict):
        for key, value in got.items():
            near(value, want[str(key)], f32, f"{what}/{key}")
    elif isinstance(got, list | tuple):
        assert len(got) == len(want), what
        for i, value in enumerate(got):
            near(value, want[i], f32, f"{what}/{i}")
    else:
        double = torch.get_default_dtype() == torch.float64
        rel = 1e-9 if double else max(2e-5, 10 * f32["worst_relative"])
        # the gradient of a bias before a BN is only rounding
        bound = 1e-13 if double else 1e-6 if want == 0 else 0
        got = got.item() if isinstance(got, torch.Tensor) else got
        assert got == pytest.approx(want, rel=rel, abs=bound), what


def grads(module):
    return {name: l2(parameter.grad) for name, parameter in module.named_parameters()}


def running(module):
    return {name: l2(x) for name, x in module.named_buffers() if name.endswith(("running_mean", "running_var"))}


def entries(module):
    return [[name, list(x.shape)] for name, x in module.state_dict().items()]


def compare(case, loss, entry, *adapters):
    """Runs the backward pass, then compares the loss, all gradients and the adapters' state with an entry."""
    loss.backward()
    near(loss, entry["loss"], entry["f32"])
    if "grad_logits_l2" in entry:
        near(l2(case.student.logits.grad), entry["grad_logits_l2"], entry["f32"])
    of_features = {str(i): l2(x.grad) for i, x in enumerate(case.student.features) if x.grad is not None}
    assert set(of_features) == set(entry.get("grad_feat_l2", {}))
    near(of_features, entry.get("grad_feat_l2"), entry["f32"])
    assert all(x.grad is None for x in [*case.teacher.features, case.teacher.logits])
    wanted = entry["adapters"] if "adapters" in entry else [entry["adapter"]] if "adapter" in entry else []
    for adapter, want in zip(adapters, wanted, strict=True):
        assert entries(adapter) == want.get("state_dict", entries(adapter))
        near(grads(adapter), want["grad_l2"], entry["f32"])
        near(running(adapter), want.get("buffers_after_l2"), entry["f32"])


@pytest.mark.parametrize("name", ["KD", "AT", "SP", "PKT"])
def test_kd_at_sp_and_pkt_equal_the_published_ones(case, name):
    compare(case, term(build(name.lower(), case), case), case.figures[name])


def test_rkd_equals_the_published_one(case):
    entry, method, pooled = case.figures["RKD"], build("rkd", case), case.student.features[-1]
    for name, relation in (("distance", method.distances), ("angle", method.angles)):
        part = F.smooth_l1_loss(relation(pooled), relation(case.teacher.features[-1]))
        (grad,) = torch.autograd.grad(part, pooled)
        near({"loss": part, "grad_feat_l2": l2(grad)}, entry[name], entry["f32"])
    total = {"grad_feat_l2": {str(len(case.student.features) - 1): entry["total_25_50"]["grad_feat_l2"]}}
    compare(case, term(method, case), entry | total)


def test_fitnet_equals_the_published_one_at_every_layer(case):
    entry, every = case.figures["FitNet"], case.figures["FitNet_every_layer"]
    for layer, want in every["layers"].items():
        method = type("Layer", (maps.FitNet,), {"hint_layer": int(layer)})(case.student, case.teacher, case.labels)
        fill_rounded(method.regressor, case.base + 100)
        loss = term(method, case)
        (grad,) = torch.autograd.grad(loss, case.student.features[int(layer)])
        near({"loss": loss, "grad_feat_l2": l2(grad)}, want, every["f32"])
    method = build("fitnet", case)
    assert method.hint_layer == entry["hint_layer"]
    fill_rounded(method.regressor, entry["adapter"]["fill_base"])
    compare(case, term(method, case), entry, method.regressor)


@pytest.mark.parametrize("name", ["VID", "VID_initial_scale"])
def test_vid_equals_the_published_one(case, name):
    entry, method = case.figures[name], build("vid", case)
    for q, adapter in zip(method.adapters, entry["adapters"], strict=True):
        fill_rounded(q if name == "VID" else q.regressor, adapter["fill_base"])
        if name == "VID_initial_scale":
            got = {"initial_log_scale": q.log_scale[0], "initial_variance": F.softplus(q.log_scale[-1]) + 1e-5}
            near(got, entry, entry["f32"])
    compare(case, term(method, case), entry, *method.adapters)


def test_abs_first_phase_equals_the_published_one(case):
    entry, case = case.figures["AB_pretraining"], inputs(case.name, scale=2)
    method = build("ab", case)
    fill_rounded(method.connectors, entry["adapter"]["fill_base"])
    compare(case, method.first_loss(case.student, case.teacher), entry, method)


def test_fts_first_phase_equals_the_published_one(case):
    entry, method = case.figures["FT_pretraining"], build("ft", case)
    fill_rounded(method.paraphraser, entry["adapter"]["fill_base"])
    compare(case, method.first_loss(None, case.teacher), entry, method.paraphraser)
    assert all(parameter.grad is None for parameter in method.translator.parameters())


def test_ft_equals_the_published_one(case):
    entry, method = case.figures["FT"], build("ft", case)
    fill_rounded(method.paraphraser, entry["paraphraser_fill_base"])
    fill_rounded(method.translator, entry["adapter"]["fill_base"])
    compare(case, term(method, case), entry, nn.ModuleDict({"encoder": method.translator}))
    assert all(parameter.grad is None for parameter in method.paraphraser.parameters())


def filled_crd(student, teacher, class_of, dim, base, embeddings=(100, 200), memories=(300, 301)):
    """A CRD with embeddings of `dim` numbers, its weights and banks filled from the hash."""
    method = type("Small", (crd.CRD,), {"dim": dim})(student, teacher, class_of)
    for embed, offset in zip((method.embed_s, method.embed_t), embeddings, strict=True):
        fill_rounded(embed, base + offset)
    for bank, offset in zip((method.bank_s, method.bank_t), memories, strict=True):
        bank.memory.copy_(rounded(base + offset, bank.memory.shape, 1 / math.sqrt(dim / 3)))
    return method


def linear(embed):
    """An embedding with the published prefix of its names."""
    return nn.ModuleDict({"linear": embed})


@pytest.mark.parametrize("name", ["CRD_exact", "CRD_relax"])
def test_crd_equals_the_published_one_over_two_steps(case, name):
    entry = case.figures[name]
    method = filled_crd(case.student, case.teacher, case.labels, entry["feat_dim"], case.base)
    assert entries(linear(method.embed_s)) == entry["embed_s"]["state_dict"]
    assert entries(linear(method.embed_t)) == entry["embed_t"]["state_dict"]
    assert method.temperature == entry["T"]
    for step, want in enumerate(entry["steps"]):
        if step:
            for outputs, key in ((case.student, 310), (case.teacher, 311)):
                pooled = outputs.features[-1]
                outputs.features[-1] = rounded(case.base + key, pooled.shape).to(pooled.dtype).requires_grad_()
        method.zero_grad()
        rows, contrast = torch.tensor(want["index"]), torch.tensor(want["contrast_idx"])
        loss = method.contrast(case.student, case.teacher, rows, contrast)
        loss.backward()
        got = {
            "loss": loss,
            "Z_v1": method.bank_t.Z,
            "Z_v2": method.bank_s.Z,
            "grad_feat_l2": l2(case.student.features[-1].grad),
            "grad_embed_s_l2": grads(linear(method.embed_s)),
            "grad_embed_t_l2": grads(linear(method.embed_t)),
            "memory_v1_after_l2": l2(method.bank_s.memory),
            "memory_v2_after_l2": l2(method.bank_t.memory),
        }
        near(got, want, entry["f32"])
        assert case.teacher.features[-1].grad is None


def test_crd_equals_the_published_one_at_its_size(dtype):
    want = COMPARED["crd_published_size"]
    base, images, k = want["base"], want["n_data"], want["K"]
    pooled = rounded(base, (2, 64)).to(dtype).requires_grad_()
    student, teacher = Outputs([pooled], pooled), Outputs([rounded(base + 50, (2, 64)).to(dtype)], pooled)
    method = filled_crd(student, teacher, torch.arange(images) % 100, want["feat_dim"], base)
    assert (method.negatives, method.replace) == (k, False)
    rows = torch.tensor(want["index"])
    negatives = labels(base + 303, 2 * k, images).view(2, k)
    assert negatives.sum() == want["negatives_sum"]
    loss = method.contrast(student, teacher, rows, torch.cat([rows[:, None], negatives], 1))
    loss.backward()
    got = {"loss": loss, "Z_v1": method.bank_t.Z, "Z_v2": method.bank_s.Z, "grad_feat_l2": l2(pooled.grad)}
    got |= {f"grad_{side}_l2": grads(linear(getattr(method, side))) for side in ("embed_s", "embed_t")}
    near(got, want, {"worst_relative": 2e-6})


@pytest.mark.parametrize("want", LATER, ids=lambda want: f"C{want['classes']}")
@float64
def test_dkd_and_ls_equal_the_published_ones(want, dtype):
    shape = (want["batch"], want["classes"])
    s_logits, t_logits = (rounded(want["base"] + k, shape, want["scale"]).requires_grad_() for k in (0, 1))
    target = labels(want["base"] + 4, *shape)
    student, teacher = Outputs([], s_logits), Outputs([], t_logits)
    for name, figures in (("dkd", want["dkd"]), ("ls", want["standardised_kd"])):
        method = METHODS[name](student, teacher, target)
        method.beta = figures.get("beta")
        loss = method(student, teacher, target, None)
        grad, of_teacher = torch.autograd.grad(loss, (s_logits, t_logits), allow_unused=True)
        near({"loss": loss, "grad_l2": l2(grad)}, figures)
        assert of_teacher is None


def test_adapters_start_with_the_published_values():
    def of_size(channels, height):
        return torch.zeros(1, channels, height, height)

    pooled = Outputs([torch.zeros(1, 64)], None)
    adapters = {
        "ConvReg 16->24, stride 2": lambda: maps.Regressor(of_size(16, 8), of_size(24, 4)),
        "ConvReg 16->24, transposed": lambda: maps.Regressor(of_size(16, 4), of_size(24, 8)),
        "ConvReg 16->24, 3x3": lambda: maps.Regressor(of_size(16, 6), of_size(24, 4)),
        "VIDLoss 16->24": lambda: maps.Variational(16, 24),
        "Paraphraser 24": lambda: phases.Paraphraser(24, 12),
        "Translator 16->12": lambda: phases.encoder(16, 12, norm=True),
        "LinearEmbed 64->128": lambda: crd.CRD(pooled, pooled, torch.arange(2)).embed_s,
    }
    assert set(adapters) == set(COMPARED["init_seed0_l2"])
    for name, adapter in adapters.items():
        torch.manual_seed(0)
        got = [l2(parameter) for parameter in adapter().parameters()]
        assert got == pytest.approx(list(COMPARED["init_seed0_l2"][name].values()), rel=1e-6), name


def test_crds_banks_start_with_rows_of_about_unit_length():
    memory = crd.Bank(5000, 128).memory
    bound = 1 / math.sqrt(128 / 3)
    assert 0.999 * bound < memory.abs().max() <= bound
    assert memory.pow(2).sum(1).mean().item() == pytest.approx(1, rel=0.01)


def edge_inputs():
    """Outputs of both networks with some equal and some zero rows, and row numbers."""
    base, batch, dim = EDGE["base"], EDGE["batch"], EDGE["dim"]
    s, t = rounded(base, (batch, dim)), rounded(base + 50, (batch, dim))
    s[1], s[2], t[4] = s[0], 0, t[3]
    s_map, t_map = (rounded(base + key, (batch, 4, 6, 6)) for key in (1, 51))
    s_map[2], t_map[4] = 0, 0
    return Outputs([s_map, s_map, s_map, s], s), Outputs([t_map, t_map, t_map, t], t), torch.arange(batch)


@float64
def test_losses_at_degenerate_rows_are_the_published_ones(dtype):
    student, teacher, rows = edge_inputs()
    (s_map, *_, s), (t_map, *_, t) = student.features, teacher.features
    pkt, sp, at, rkd = (METHODS[name](student, teacher, rows) for name in ("pkt", "sp", "at", "rkd"))
    near(F.smooth_l1_loss(rkd.distances(s), rkd.distances(t)), EDGE["RKD_distance"]["loss"])
    near(F.smooth_l1_loss(rkd.angles(s), rkd.angles(t)), EDGE["RKD_angle"]["loss"])
    near(pkt(student, teacher, rows, rows), EDGE["PKT"]["loss"])
    near(sp(student, teacher, rows, rows), EDGE["SP"]["loss"])
    near(at(student, teacher, rows, rows), 2 * EDGE["AT"]["loss"])  # two middle maps
    near(F.l1_loss(maps.attention(s_map), maps.attention(t_map)), EDGE["FT_factor_loss"]["loss"])
    near(phases.AB.boundary(2 * s_map, t_map), EDGE["AB_sum"]["loss"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("factor", [1, 0], ids=["some rows equal or zero", "all zero"])
def test_gradients_at_degenerate_rows_are_finite_and_tame(name, factor, monkeypatch):
    monkeypatch.setattr(crd.CRD, "negatives", 3)
    *both, rows = edge_inputs()
    student, teacher = (Outputs([factor * x.float() for x in o.features], factor * o.logits.float()) for o in both)
    for x in [*student.features, student.logits]:
        x.requires_grad_()
    method = METHODS[name](student, teacher, rows)
    losses = [method(student, teacher, rows, rows)]
    if method.first_phase:
        losses.append(method.first_loss(student, teacher))
    for loss in losses:
        assert math.isfinite(loss.item())
        if loss.requires_grad:
            loss.backward()
    seen = [x.grad for x in [*student.features, student.logits, *method.parameters()] if x.grad is not None]
    assert seen
    # each of FT's three BNs of a constant map multiplies rounding errors by up to 1 / √eps = 316
    assert max(grad.abs().max().item() for grad in seen) < 316**3


@functools.cache
def networks(name):
    """Teacher in eval mode, student (to be copied), images and labels of a trajectory, in float64."""
    setting = COMPARED[name]["setting"]
    batch = setting["batch"]
    images = rounded(setting["image"], (batch, 3, 4, 4), 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    images += rounded(setting["noise"], (batch, 3, 32, 32), 0.3)
    teacher = fill_rounded(model_dict[setting["teacher"]](), setting["teacher_fill_base"]).train()
    for module in teacher.modules():  # one pass with this momentum does what so many do with 0.1
        module.momentum = 1 - 0.9 ** setting["teacher_bn_warmup_passes"]
    with torch.no_grad():
        teacher(images)
    student = fill_rounded(model_dict[setting["student"]](), setting["student_fill_base"])
    return teacher.eval(), student, images, labels(setting["y"], batch, 100)


@pytest.mark.parametrize("setting", ["trajectories", "trajectories_wrn"])
@float64
def test_trajectories_start_where_the_published_ones_do(setting, dtype):
    teacher, student, images, _ = networks(setting)
    got = {}
    with torch.no_grad():
        for name, network, mode in (("teacher", teacher, False), ("student", copy.deepcopy(student), True)):
            features, logits = network.train(mode)(images, is_feat=True)
            got[f"{name}_feat_l2"], got[f"{name}_logits_l2"] = [l2(x) for x in features], l2(logits)
            features, _ = network.eval()(images, is_feat=True, preact=True)
            got[f"{name}_preact_eval_feat_l2"] = [l2(x) for x in features]
    near(got, COMPARED[setting]["start"])


def norms(network):
    """L2 norms of all parameters and of all running statistics."""
    parameters = torch.cat([x.detach().flatten() for x in network.parameters()])
    return l2(parameters), math.hypot(*running(network).values())


def adapters_of(method):
    """The adapters, in the order in which the published code creates them."""
    return [q.regressor for q in method.adapters] if isinstance(method, maps.VID) else list(method.children())


ROWS = [
    (setting, row, row.split()[0].removesuffix("+KD").lower())
    for setting in ("trajectories", "trajectories_wrn")
    for row in COMPARED[setting]["steps"]
]


@pytest.mark.parametrize("setting, row, name", [row for row in ROWS if row[2] in METHODS])
@float64
def test_five_steps_follow_the_published_ones(setting, row, name, dtype):
    want, names = COMPARED[setting]["steps"][row], COMPARED[setting]["setting"]
    teacher_network, network, images, target = networks(setting)
    network, preact = copy.deepcopy(network), METHODS[name].preact
    with torch.no_grad():
        teacher = Outputs(*teacher_network(images, is_feat=True, preact=preact))
        shapes = Outputs(*copy.deepcopy(network)(images, is_feat=True, preact=preact))
    class_of, base = torch.arange(names["n_data"]) % 10, names["adapter_base"]
    if name == "crd":
        method = filled_crd(shapes, teacher, class_of, names["feat_dim"], base, (0, 100), (200, 201))
        places = torch.tensor(want["index"]), torch.tensor(want["contrast_idx"])
        method.forward = lambda student, teacher, *_: method.contrast(student, teacher, *places)
    else:
        method = METHODS[name](shapes, teacher, class_of)
        for j, adapter in enumerate(adapters_of(method)):
            fill_rounded(adapter, base + 100 * j)

    def train(modules, lr, sensitivity, terms_of):
        """Steps on the first of the terms, each of which is compared with its figures."""
        optimizer = torch.optim.SGD(modules.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        for i, moved in enumerate(sensitivity):
            optimizer.zero_grad()
            terms = terms_of(Outputs(*network(images, is_feat=True, preact=preact)))
            for figure, got in terms.items():
                assert got.item() == pytest.approx(want[figure][i], rel=max(1e-8, 1e4 * moved))
            next(iter(terms.values())).backward()
            optimizer.step()

    if "pretraining" in want:
        before = copy.deepcopy(network.state_dict())
        rate = method.first_rate(names["student"], want["lr"])
        modules, sensitivity = set_phase(method, network, first=True), want["pretraining_sensitivity"]
        train(modules, rate, sensitivity, lambda student: {"pretraining": method.first_loss(student, teacher)})
        after = want["after_pretraining"]
        assert norms(network) == pytest.approx((after["student_l2"], after["student_bn_l2"]), rel=1e-8)
        unchanged = [name for name, x in network.state_dict().items() if torch.equal(x, before[name])]
        every = after["student_entries_unchanged"] == "all"
        assert unchanged == (list(before) if every else after["student_entries_unchanged"])

    def main_terms(student):
        ce, kl = F.cross_entropy(student.logits, target), kd_loss(student.logits, teacher.logits)
        term = method(student, teacher, target, None)
        return {"total": weights["gamma"] * ce + weights["alpha"] * kl + method.weight * term, "ce": ce, "kl": kl}

    weights, modules = want["weights"], set_phase(method, network)
    assert method.weight == weights["beta"]
    assert sum(p.numel() for p in modules.parameters()) == want["trained_numbers"]
    train(modules, want["lr"], want["sensitivity"], main_terms)
    assert norms(network) == pytest.approx((want["student_after_l2"], want["student_bn_after_l2"]), rel=1e-8)
    if name == "crd":
        assert (method.bank_t.Z.item(), method.bank_s.Z.item()) == pytest.approx((want["Z_v1"], want["Z_v2"]), rel=1e-8)
        assert [l2(method.bank_s.memory), l2(method.bank_t.memory)] == pytest.approx(want["memory_after_l2"], rel=1e-8)


@pytest.fixture
def batch(monkeypatch):
    """Random outputs (float32) of two networks for 6 of 50 images, with few negatives."""
    monkeypatch.setattr(crd.CRD, "negatives", 8)
    generator = torch.Generator().manual_seed(0)

    def outputs():
        shapes = ((8, 16), (8, 16), (16, 8), (32, 4))
        features = [torch.randn(6, channels, height, height, generator=generator) for channels, height in shapes]
        pooled = torch.randn(6, 32, generator=generator).relu()
        return Outputs([*features, pooled], torch.randn(6, 100, generator=generator))

    class_of = torch.arange(50) % 10
    rows = torch.randperm(50, generator=generator)[:6]
    return SimpleNamespace(student=outputs(), teacher=outputs(), target=class_of[rows], rows=rows, labels=class_of)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_traces_as_one_graph(name, batch):
    method = build(name, batch)
    traced = torch.compile(copy.deepcopy(method), fullgraph=True, backend="eager")
    for _ in range(2):  # CRD's first step sets Z
        assert term(traced, batch).item() == term(method, batch).item()
    if method.first_phase:
        traced = torch.compile(copy.deepcopy(method).first_loss, fullgraph=True, backend="eager")
        assert traced(batch.student, batch.teacher).item() == method.first_loss(batch.student, batch.teacher).item()


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_outputs_are_computed_in_float32_and_float64_stays(name, batch):
    def term_in(dtype):
        """The term of the same values, which bfloat16 can hold, in another dtype."""
        of_both = ([x.bfloat16().to(dtype) for x in (*o.features, o.logits)] for o in (batch.student, batch.teacher))
        student, teacher = (Outputs(features, logits) for *features, logits in of_both)
        copied = copy.deepcopy(method).double() if dtype == torch.float64 else copy.deepcopy(method)
        return copied(student, teacher, batch.target, batch.rows)

    method = build(name, batch)
    half, full, double = map(term_in, (torch.bfloat16, torch.float32, torch.float64))
    assert (half.dtype, double.dtype) == (torch.float32, torch.float64)
    assert half.shape == double.shape == ()
    assert half.item() == full.item() == pytest.approx(double.item(), rel=1e-4)


HEADS = {  # what lies behind the stages
    "resnet20": "fc", "resnet8x4": "fc", "wrn_16_2": "bn1 fc", "vgg8": "classifier", "MobileNetV2": "conv2 classifier",
    "ShuffleV1": "linear", "ShuffleV2": "conv2 bn2 linear", "ResNet50": "linear",
}  # fmt: skip


@pytest.mark.parametrize("arch, head", HEADS.items())
def test_abs_first_phase_leaves_out_what_lies_behind_the_stages(arch, head, batch):
    with torch.device("meta"):
        network = model_dict[arch]()
    method = build("ab", batch)
    trained = {id(parameter) for parameter in set_phase(method, network, first=True).parameters()}
    assert [name for name, child in network.named_children() if not child.training] == head.split()
    for name, parameter in network.named_parameters():
        assert (id(parameter) in trained) == (name.split(".")[0] not in head.split()), name
    set_phase(method, network)
    assert all(module.training for module in network.modules())


# The eleven pairs of the tables. Numbers of trained values, counted in the published code: FitNet's regressor, VID,
# AB's connectors, FT's paraphraser and translator, CRD's two embeddings; then DKD's β.
OF_PAIR = {
    ("wrn_40_2", "wrn_16_2"): (4288, 64736, 0, 516672, 258816, 16512, 16512, 6),
    ("wrn_40_2", "wrn_40_1"): (2240, 53984, 11424, 516672, 111168, 8320, 16512, 6),
    ("resnet56", "resnet20"): (1120, 16240, 0, 129312, 64896, 8320, 8320, 2),
    ("resnet32x4", "resnet8x4"): (16768, 258496, 0, 2065536, 1033728, 32896, 32896, 8),
    ("vgg13", "vgg8"): (66304, 1820032, 0, 8259840, 4131840, 65664, 65664, 6),
    ("vgg13", "MobileNetV2"): (4864, 1325952, 1345152, 8259840, 1190880, 163968, 65664, 6),
    ("ResNet50", "MobileNetV2"): (132608, 11533056, 6221056, 132129792, 11148768, 163968, 262272, 8),
    ("ResNet50", "vgg8"): (2098688, 12881664, 12070144, 132129792, 16522752, 65664, 262272, 8),
    ("resnet32x4", "ShuffleV1"): (983424, 495040, 5162304, 2065536, 9551424, 123008, 32896, 8),
    ("resnet32x4", "ShuffleV2"): (475520, 328384, 2495808, 2065536, 2621808, 131200, 32896, 8),
    ("wrn_40_2", "ShuffleV1"): (491712, 204512, 2581152, 516672, 8887488, 123008, 16512, 8),
}


@pytest.mark.parametrize("pair", OF_PAIR, ids=" ".join)
def test_every_pair_has_the_published_sizes_of_adapters_and_beta(pair):
    class_of, names = torch.arange(20) % 10, ("fitnet", "vid", "ab", "ft", "crd", "dkd")
    with torch.device("meta"):
        teacher, student = (Outputs(*model_dict[arch]()(torch.zeros(2, 3, 32, 32), is_feat=True)) for arch in pair)
        fitnet, vid, ab, ft, contrast, dkd = (METHODS[m](student, teacher, class_of) for m in names)
    dkd.choose_pair(*pair)
    parts = (fitnet, vid, ab, ft.paraphraser, ft.translator, contrast.embed_s, contrast.embed_t)
    assert (*(sum(p.numel() for p in part.parameters()) for part in parts), dkd.beta) == OF_PAIR[pair]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_needs_the_features_that_it_compares(name, batch):
    """A network of one's own may return fewer: here the pooled vector, or one map with it."""
    for count in (1, 2):
        few = Outputs(batch.student.features[-count:], batch.student.logits)
        short = SimpleNamespace(student=few, teacher=few, labels=batch.labels, target=batch.target, rows=batch.rows)
        if not METHODS[name].maps or (count == 2 and name in ("sp", "ft")):
            assert term(build(name, short), short).isfinite()
        else:
            with pytest.raises(UserError, match=f"returns {count} features, and it needs [2-4]"):
                build(name, short)


def test_ab_refuses_a_student_whose_stages_have_other_names(batch):
    with pytest.raises(UserError, match=r"name them layer… or block… in the student \(it has body, head\)"):
        build("ab", batch).first_modules(nn.ModuleDict({"body": nn.Identity(), "head": nn.Identity()}))


def test_methods_have_the_published_weights_and_lengths():
    # test_five_steps_follow_the_published_ones checks the weights of the other methods
    weights = {name: (m.weight, m.ce_weight, m.kd_weight) for name, m in METHODS.items()}
    assert (weights["dkd"], weights["ls"], weights["crd"]) == ((1, 1, 0), (9, 0.1, 0), (0.8, 0.1, 0.9))
    assert [METHODS["ft"].first_rate(None, arch, 0.05) for arch in ("resnet8x4", "wrn_40_1", "vgg8")] == [
        0.01,
        0.01,
        0.05,
    ]
    assert {name: m.first_epochs for name, m in METHODS.items() if m.first_epochs} == {"ab": 30, "ft": 30, "dkd": 20}


def test_dkd_warms_up_over_twenty_epochs(batch):
    method = build("dkd", batch)
    full = term(method, batch).item()
    for epoch, share in ((1, 0.05), (10, 0.5), (20, 1), (240, 1)):
        method.start_epoch(0, epoch)
        assert term(method, batch).item() == pytest.approx(share * full, rel=1e-6)


def test_crd_draws_other_negatives_at_each_step_and_with_replacement_only_if_it_must(batch):
    method = build("crd", batch)
    method.start_epoch(7, 2)
    assert [term(method, batch).isfinite() for _ in range(3)] == [True] * 3
    assert (method.replace, method.when.tolist()) == (False, [7, 2, 3])
    many = type("Many", (crd.CRD,), {"negatives": 60})(batch.student, batch.teacher, batch.labels)
    assert many.replace and term(many, batch).isfinite()
