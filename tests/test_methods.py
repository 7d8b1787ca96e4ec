"""methods.py against the figures of the published code (golden/COMPARED.md), brute force and statistics."""

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracle import COMPARED, LATER, fill_rounded, labels, rounded
from torch.utils._python_dispatch import TorchDispatchMode

import methods
from methods import METHODS, Outputs
from models import model_dict

PAIRS, LOSSES, EDGE = COMPARED["pairs"], COMPARED["losses"], COMPARED["edge"]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=PAIRS)
def case(request, dtype):
    """The inputs of one pair of shapes, and `near(got, figures)` with the tolerance of this precision."""
    pair, figures = PAIRS[request.param], LOSSES[request.param]
    return SimpleNamespace(name=request.param, base=pair["base"], dtype=dtype, figures=figures, **inputs(pair, dtype))


def inputs(pair, dtype, scale=1.0):
    base = pair["base"]
    student = [rounded(base + i, shape, scale).to(dtype) for i, shape in enumerate(pair["student"])]
    teacher = [rounded(base + 50 + i, shape, scale).to(dtype) for i, shape in enumerate(pair["teacher"])]
    batch = len(student[0])
    s_logits, t_logits = (rounded(base + k, (batch, 100), 3).to(dtype) for k in (20, 70))
    student, teacher = Outputs(student, s_logits), Outputs(teacher, t_logits)
    for x in [*student.features, *teacher.features, s_logits, t_logits]:
        x.requires_grad_()
    return {
        "student": student,
        "teacher": teacher,
        "target": labels(base + 90, batch, 100),
        "rows": torch.arange(batch),
        "labels": torch.arange(50) % 10,
    }


def build(name, case):
    return METHODS[name](case.student, case.teacher, case.labels)


def term(method, case):
    return method(case.student, case.teacher, case.target, case.rows)


def l2(x):
    return torch.linalg.vector_norm(x.detach().double()).item()


def near(got, want, f32=None, what=""):
    """Compares numbers, lists and dictionaries with those figures of `want` that are there in `got`."""
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
        # gradients of biases before a BN are rounding alone
        bound = 1e-13 if double else 1e-6 if want == 0 else 0
        got = got.item() if isinstance(got, torch.Tensor) else got
        assert got == pytest.approx(want, rel=rel, abs=bound), what


def near_entry(got, entry):
    near(got, entry, entry["f32"])


def grads(module):
    return {name: l2(parameter.grad) for name, parameter in module.named_parameters()}


def running(module):
    return {name: l2(x) for name, x in module.named_buffers() if name.endswith(("running_mean", "running_var"))}


def grad_feat(case):
    """Norms of the gradients by feature index; the teacher's features must have none."""
    assert all(x.grad is None for x in [*case.teacher.features, case.teacher.logits])
    return {i: l2(x.grad) for i, x in enumerate(case.student.features) if x.grad is not None}


def entries(module):
    return [[name, list(x.shape)] for name, x in module.state_dict().items()]


# The figures of the published code


def test_kd_equals_the_published_one(case):
    entry, method = case.figures["KD"], build("kd", case)
    loss = term(method, case)
    (grad,) = torch.autograd.grad(loss, case.student.logits, retain_graph=True)
    ce = F.cross_entropy(case.student.logits, case.target)
    total = 0.1 * ce + 0.9 * loss
    total.backward()
    assert case.target.tolist() == entry["labels"]
    got = {"loss": loss, "grad_logits_l2": l2(grad), "ce": ce, "total_r0.1_a0.9": total}
    near_entry(got | {"grad_total_logits_l2": l2(case.student.logits.grad)}, entry)
    assert grad_feat(case) == {}


def test_fitnet_equals_the_published_one(case):
    entry, method = case.figures["FitNet"], build("fitnet", case)
    fill_rounded(method.regressor, entry["adapter"]["fill_base"])
    assert entries(method.regressor) == entry["adapter"]["state_dict"]
    assert method.hint_layer == entry["hint_layer"]
    out = F.relu(copy.deepcopy(method.regressor)(case.student.features[2]))
    loss = term(method, case)
    loss.backward()
    near_entry({"loss": loss, "out_l2": l2(out), "grad_feat_l2": grad_feat(case)}, entry)
    near(grads(method.regressor), entry["adapter"]["grad_l2"], entry["f32"])
    near(running(method.regressor), entry["adapter"]["buffers_after_l2"], entry["f32"])


def kind_of(conv):
    kernel, stride, padding = list(conv.kernel_size), conv.stride[0], conv.padding[0]
    return f"{type(conv).__name__} kernel {kernel} stride {stride} padding {padding}"


def test_fitnets_regressor_fits_every_layer(case):
    entry = case.figures["FitNet_every_layer"]
    for layer, want in entry["layers"].items():
        method = type("Layer", (methods.FitNet,), {"hint_layer": int(layer)})(case.student, case.teacher, case.labels)
        fill_rounded(method.regressor, case.base + 100)
        assert kind_of(method.regressor.conv) == want["conv"]
        loss = term(method, case)
        (grad,) = torch.autograd.grad(loss, case.student.features[int(layer)])
        near({"loss": loss, "grad_feat_l2": l2(grad)}, want, entry["f32"])


def test_at_equals_the_published_one(case):
    entry = case.figures["AT"]
    loss = term(build("at", case), case)
    loss.backward()
    middle = zip(case.student.features[1:-1], case.teacher.features[1:-1], strict=True)
    parts = [methods.AT.of_map(*methods.pool_to_smaller(s, t)) for s, t in middle]
    near_entry({"loss": loss, "parts": parts, "grad_feat_l2": grad_feat(case)}, entry)


def test_sp_equals_the_published_one(case):
    loss = term(build("sp", case), case)
    loss.backward()
    near_entry({"loss": loss, "grad_feat_l2": grad_feat(case)}, case.figures["SP"])


@pytest.mark.parametrize("name", ["VID", "VID_initial_scale"])
def test_vid_equals_the_published_one(case, name):
    entry, method = case.figures[name], build("vid", case)
    for q, adapter in zip(method.maps, entry["adapters"], strict=True):
        fill_rounded(q if name == "VID" else q.regressor, adapter["fill_base"])
        assert entries(q) == adapter.get("state_dict", entries(q))
        if name == "VID_initial_scale":
            near_entry({"initial_log_scale": q.log_scale[0]}, entry)
            near_entry({"initial_variance": F.softplus(q.log_scale[-1]) + 1e-5}, entry)
    loss = term(method, case)
    loss.backward()
    middle = zip(method.maps, case.student.features[1:-1], case.teacher.features[1:-1], strict=True)
    parts = [q(*methods.pool_to_smaller(s, t)) for q, s, t in middle]
    near_entry({"loss": loss, "parts": parts, "grad_feat_l2": grad_feat(case)}, entry)
    for q, adapter in zip(method.maps, entry["adapters"], strict=True):
        near(grads(q), adapter["grad_l2"], entry["f32"])


def test_rkd_equals_the_published_one(case):
    entry, pooled = case.figures["RKD"], case.student.features[-1]
    for name, relation in (("distance", methods.RKD.distances), ("angle", methods.RKD.angles)):
        part = F.smooth_l1_loss(relation(pooled), relation(case.teacher.features[-1]))
        (grad,) = torch.autograd.grad(part, pooled)
        near({"loss": part, "grad_feat_l2": l2(grad)}, entry[name], entry["f32"])
    loss = term(build("rkd", case), case)
    loss.backward()
    got = {"loss": loss, "grad_feat_l2": l2(pooled.grad)}
    near(got, entry["total_25_50"], entry["f32"])
    first_pair = (pooled[0] - pooled[1]).norm() / methods.RKD.distances(pooled)[0, 1]
    near_entry({"student_mean_distance": first_pair}, entry)


def test_pkt_equals_the_published_one(case):
    loss = term(build("pkt", case), case)
    loss.backward()
    near_entry({"loss": loss, "grad_feat_l2": grad_feat(case)}, case.figures["PKT"])


def test_abs_first_phase_equals_the_published_one(case):
    entry, figures = case.figures["AB_pretraining"], case.figures
    case = SimpleNamespace(figures=figures, **inputs(PAIRS[case.name], case.dtype, scale=2))
    method = build("ab", case)
    fill_rounded(method.connectors, entry["adapter"]["fill_base"])
    assert [[f"connectors.{name}", shape] for name, shape in entries(method.connectors)] == [
        [name, shape] for name, shape in entry["adapter"]["state_dict"]
    ]
    middle = list(zip(case.student.features[1:-1], case.teacher.features[1:-1], strict=True))
    out = [c(s) for c, (s, _) in zip(copy.deepcopy(method.connectors), middle, strict=True)]
    sums = [methods.AB.boundary(x, t).item() for x, (_, t) in zip(out, middle, strict=True)]
    parts = [w * x / len(case.rows) * 3e-3 for w, x in zip(entry["layer_weights"], sums, strict=True)]
    loss = method.first_loss(case.student, case.teacher)
    loss.backward()
    near_entry({"loss": loss, "parts": parts, "out_l2": [l2(x) for x in out], "grad_feat_l2": grad_feat(case)}, entry)
    near(grads(method), entry["adapter"]["grad_l2"], entry["f32"])
    near(running(method), entry["adapter"]["buffers_after_l2"], entry["f32"])
    kinds = ["identity" if isinstance(c, torch.nn.Identity) else kind_of(c.conv) for c in method.connectors]
    assert [kind.split(" padding")[0] for kind in kinds] == [
        k.removesuffix(" + BatchNorm2d") for k in entry["adapter"]["kinds"]
    ]


def test_fts_first_phase_equals_the_published_one(case):
    entry, method = case.figures["FT_pretraining"], build("ft", case)
    fill_rounded(method.paraphraser, entry["adapter"]["fill_base"])
    assert entries(method.paraphraser) == entry["adapter"]["state_dict"]
    last = case.teacher.features[-2].detach()
    factor = method.paraphraser.encoder(last)
    loss = method.first_loss(None, case.teacher)
    loss.backward()
    assert list(factor.shape) == entry["factor_shape"]
    got = {"loss": loss, "factor_l2": l2(factor), "reconstruction_l2": l2(method.paraphraser(last))}
    near_entry(got, entry)
    near(grads(method.paraphraser), entry["adapter"]["grad_l2"], entry["f32"])
    assert all(parameter.grad is None for parameter in method.translator.parameters())
    assert grad_feat(case) == {}


def test_ft_equals_the_published_one(case):
    entry, method = case.figures["FT"], build("ft", case)
    fill_rounded(method.paraphraser, entry["paraphraser_fill_base"])
    fill_rounded(method.translator, entry["adapter"]["fill_base"])
    assert [[f"encoder.{name}", shape] for name, shape in entries(method.translator)] == entry["adapter"]["state_dict"]
    s_factor = copy.deepcopy(method.translator)(case.student.features[-2])
    t_factor = method.paraphraser.encoder(case.teacher.features[-2])
    loss = term(method, case)
    loss.backward()
    got = {"loss": loss, "student_factor_l2": l2(s_factor), "teacher_factor_l2": l2(t_factor)}
    near_entry(got | {"grad_feat_l2": grad_feat(case)}, entry)
    near({f"encoder.{k}": v for k, v in grads(method.translator).items()}, entry["adapter"]["grad_l2"], entry["f32"])
    after = {f"encoder.{k}": v for k, v in running(method.translator).items()}
    near(after, entry["adapter"]["buffers_after_l2"], entry["f32"])
    assert all(parameter.grad is None for parameter in method.paraphraser.parameters())


def crd(student, teacher, class_of, dim, base, monkeypatch, embeddings=(100, 200), memories=(300, 301)):
    """A filled CRD with embeddings of `dim` numbers."""
    monkeypatch.setattr(methods.CRD, "dim", dim)
    method = methods.CRD(student, teacher, class_of)
    for embed, offset in zip((method.embed_s, method.embed_t), embeddings, strict=True):
        fill_rounded(embed, base + offset)
    for bank, offset in zip((method.bank_s, method.bank_t), memories, strict=True):
        bank.memory.copy_(rounded(base + offset, bank.memory.shape, 1 / math.sqrt(dim / 3)))
    return method


@pytest.mark.parametrize("name", ["CRD_exact", "CRD_relax"])
def test_crd_equals_the_published_one_over_two_steps(case, name, monkeypatch):
    entry = case.figures[name]
    method = crd(case.student, case.teacher, case.labels, entry["feat_dim"], case.base, monkeypatch)
    for side in ("embed_s", "embed_t"):
        assert [[f"linear.{k}", shape] for k, shape in entries(getattr(method, side))] == entry[side]["state_dict"]
    assert method.temperature == entry["T"]
    near_entry({"memory_before_l2": [l2(method.bank_s.memory), l2(method.bank_t.memory)]}, entry)
    for step, want in enumerate(entry["steps"]):
        if step:
            for outputs, key in ((case.student, 310), (case.teacher, 311)):
                pooled = outputs.features[-1]
                outputs.features[-1] = rounded(case.base + key, pooled.shape).to(case.dtype).requires_grad_()
        method.zero_grad()
        rows, contrast = torch.tensor(want["index"]), torch.tensor(want["contrast_idx"])
        before = copy.deepcopy(method)
        v = methods.unit(before.embed_s(case.student.features[-1]))
        w = methods.unit(before.embed_t(case.teacher.features[-1]))
        loss = method.contrast(case.student, case.teacher, rows, contrast)
        loss.backward()
        got = {
            "loss": loss,
            "student_loss": before.bank_t.contrast(v, contrast, 0.07),
            "teacher_loss": before.bank_s.contrast(w, contrast, 0.07),
            "Z_v1": method.bank_t.Z,
            "Z_v2": method.bank_s.Z,
            "grad_feat_l2": l2(case.student.features[-1].grad),
            "grad_embed_s_l2": {f"linear.{k}": v for k, v in grads(method.embed_s).items()},
            "grad_embed_t_l2": {f"linear.{k}": v for k, v in grads(method.embed_t).items()},
            "memory_v1_after_l2": l2(method.bank_s.memory),
            "memory_v2_after_l2": l2(method.bank_t.memory),
            "memory_v1_row0_after": method.bank_s.memory[rows[0], :4].tolist(),
        }
        near(got, want, entry["f32"])
        assert case.teacher.features[-1].grad is None


def test_crd_equals_the_published_one_at_its_size(dtype, monkeypatch):
    want = COMPARED["crd_published_size"]
    base, images, k = want["base"], want["n_data"], want["K"]
    pooled = rounded(base, (2, 64)).to(dtype).requires_grad_()
    student, teacher = Outputs([pooled], pooled), Outputs([rounded(base + 50, (2, 64)).to(dtype)], pooled)
    method = crd(student, teacher, torch.arange(images) % 100, want["feat_dim"], base, monkeypatch)
    assert (method.negatives, method.replace) == (k, False)
    rows = torch.tensor(want["index"])
    negatives = labels(base + 303, 2 * k, images).view(2, k)
    assert negatives.sum() == want["negatives_sum"]
    loss = method.contrast(student, teacher, rows, torch.cat([rows[:, None], negatives], 1))
    loss.backward()
    got = {"loss": loss, "Z_v1": method.bank_t.Z, "Z_v2": method.bank_s.Z, "grad_feat_l2": l2(pooled.grad)}
    got |= {f"grad_{side}_l2": grads(getattr(method, side)) for side in ("embed_s", "embed_t")}
    want = want | {
        f"grad_{side}_l2": {
            "weight": want[f"grad_{side}_l2"]["linear.weight"],
            "bias": want[f"grad_{side}_l2"]["linear.bias"],
        }
        for side in ("embed_s", "embed_t")
    }
    near(got, want, {"worst_relative": 2e-6})


@pytest.mark.parametrize("want", LATER, ids=lambda want: f"C{want['classes']}")
def test_dkd_and_ls_equal_the_published_ones(want, float64):
    shape = (want["batch"], want["classes"])
    s_logits, t_logits = (rounded(want["base"] + k, shape, want["scale"]) for k in (0, 1))
    s_logits.requires_grad_()
    target = labels(want["base"] + 4, *shape)
    student, teacher = Outputs([], s_logits), Outputs([], t_logits)
    for name, figures in (("dkd", want["dkd"]), ("ls", want["standardised_kd"])):
        method = METHODS[name](student, teacher, target)
        method.beta = figures.get("beta")
        loss = method(student, teacher, target, None)
        (grad,) = torch.autograd.grad(loss, s_logits)
        near({"loss": loss, "grad_l2": l2(grad)}, figures)


def test_adapters_start_with_the_published_values():
    def maps(channels, height):
        return torch.zeros(1, channels, height, height)

    pooled = Outputs([torch.zeros(1, 64)], None)
    adapters = {
        "ConvReg 16->24, stride 2": lambda: methods.Regressor(maps(16, 8), maps(24, 4)),
        "ConvReg 16->24, transposed": lambda: methods.Regressor(maps(16, 4), maps(24, 8)),
        "ConvReg 16->24, 3x3": lambda: methods.Regressor(maps(16, 6), maps(24, 4)),
        "VIDLoss 16->24": lambda: methods.Variational(16, 24),
        "Paraphraser 24": lambda: methods.Paraphraser(24, 12),
        "Translator 16->12": lambda: methods._encoder(16, 12, norm=True),
        "LinearEmbed 64->128": lambda: methods.CRD(pooled, pooled, torch.arange(2)).embed_s,
    }
    assert set(adapters) == set(COMPARED["init_seed0_l2"])
    for name, adapter in adapters.items():
        torch.manual_seed(0)
        got = [l2(parameter) for parameter in adapter().parameters()]
        assert got == pytest.approx(list(COMPARED["init_seed0_l2"][name].values()), rel=1e-6), name


def test_crds_banks_start_with_rows_of_about_unit_length():
    memory = methods.Bank(5000, 128).memory
    bound = 1 / math.sqrt(128 / 3)
    assert memory.abs().max() <= bound
    assert memory.abs().max() > 0.999 * bound
    assert memory.mean().item() == pytest.approx(0, abs=5 * bound / math.sqrt(3 * memory.numel()))
    assert memory.pow(2).sum(1).mean().item() == pytest.approx(1, rel=0.01)


# The edges: equal and zero rows


def edge_inputs():
    """Pooled vectors and maps of both networks, some rows equal, some zero."""
    base, batch, dim = EDGE["base"], EDGE["batch"], EDGE["dim"]
    s, t = rounded(base, (batch, dim)), rounded(base + 50, (batch, dim))
    s[1], s[2], t[4] = s[0], 0, t[3]
    s_map, t_map = (rounded(base + key, (batch, 4, 6, 6)) for key in (1, 51))
    s_map[2], t_map[4] = 0, 0
    student, teacher = Outputs([s_map, s_map, s_map, s], s), Outputs([t_map, t_map, t_map, t], t)
    return student, teacher, torch.arange(batch)


def test_losses_at_degenerate_rows_are_the_published_ones(float64):
    student, teacher, target = edge_inputs()
    (s_map, *_, s), (t_map, *_, t) = student.features, teacher.features
    near(F.smooth_l1_loss(methods.RKD.distances(s), methods.RKD.distances(t)), EDGE["RKD_distance"]["loss"])
    near(F.smooth_l1_loss(methods.RKD.angles(s), methods.RKD.angles(t)), EDGE["RKD_angle"]["loss"])
    near(METHODS["pkt"]()(student, teacher, target, target), EDGE["PKT"]["loss"])
    near(METHODS["sp"]()(student, teacher, target, target), EDGE["SP"]["loss"])
    near(methods.AT.of_map(s_map, t_map), EDGE["AT"]["loss"])
    near(methods.FT.factor_loss(s_map, t_map), EDGE["FT_factor_loss"]["loss"])
    near(methods.AB.boundary(2 * s_map, t_map), EDGE["AB_sum"]["loss"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("zero", [False, True], ids=["some rows equal or zero", "all zero"])
def test_gradients_at_degenerate_rows_are_finite_and_tame(name, zero, monkeypatch):
    monkeypatch.setattr(methods.CRD, "negatives", 3)
    student, teacher, target = edge_inputs()
    student, teacher = (
        Outputs([(0 if zero else 1) * x.float() for x in o.features], (0 if zero else 1) * o.logits.float())
        for o in (student, teacher)
    )
    for x in [*student.features, student.logits]:
        x.requires_grad_()
    method = METHODS[name](student, teacher, target)
    losses = [method(student, teacher, target, target)]
    if hasattr(method, "first_loss"):
        losses.append(method.first_loss(student, teacher))
    for loss in losses:
        assert math.isfinite(loss.item())
        if loss.requires_grad:
            loss.backward()
    seen = [x.grad for x in [*student.features, student.logits, *method.parameters()] if x.grad is not None]
    assert seen
    # each of FT's three BNs of a constant map multiplies rounding errors by up to 1 / √eps = 316
    assert max(grad.abs().max().item() for grad in seen) < 316**3


# The five-step trajectories


@functools.cache  # thirty passes
def networks(name):
    """Teacher in eval mode, student (to be copied), images and labels of a trajectory; in float64."""
    setting = COMPARED[name]["setting"]
    batch = setting["batch"]
    images = rounded(setting["image"], (batch, 3, 4, 4), 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    images += rounded(setting["noise"], (batch, 3, 32, 32), 0.3)
    teacher = fill_rounded(model_dict[setting["teacher"]](), setting["teacher_fill_base"]).train()
    with torch.no_grad():
        for _ in range(setting["teacher_bn_warmup_passes"]):
            teacher(images)
    student = fill_rounded(model_dict[setting["student"]](), setting["student_fill_base"])
    return teacher.eval(), student, images, labels(setting["y"], batch, 100)


def norms(network):
    """Of all parameters, and of all running statistics."""
    parameters = torch.cat([x.detach().flatten() for x in network.parameters()])
    statistics = [x for name, x in network.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return l2(parameters), l2(torch.cat(statistics))


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize("setting", ["trajectories", "trajectories_wrn"])
def test_trajectories_start_where_the_published_ones_do(setting, float64):
    figures = COMPARED[setting]
    teacher, student, images, target = networks(setting)
    student = copy.deepcopy(student)
    got = {"labels": target.tolist(), "image_l2": l2(images)}
    with torch.no_grad():
        for name, network, mode in (("teacher", teacher, False), ("student", student, True)):
            features, logits = network.train(mode)(images, is_feat=True)
            got[f"{name}_feat_l2"], got[f"{name}_logits_l2"] = [l2(x) for x in features], l2(logits)
            got[f"{name}_feat_shapes"] = [list(x.shape) for x in features]
            features, _ = network.eval()(images, is_feat=True, preact=True)
            got[f"{name}_preact_eval_feat_l2"] = [l2(x) for x in features]
    near(got, figures["start"])


def adapters_of(method):
    """In the order in which the published code creates them."""
    if isinstance(method, methods.VID):
        return [q.regressor for q in method.maps]
    return list(method.children())


ROWS = [
    (setting, row)
    for setting in ("trajectories", "trajectories_wrn")
    for row in COMPARED[setting]["steps"]
    if row.split()[0].removesuffix("+KD").lower() in METHODS
]


@pytest.mark.parametrize("setting, row", ROWS, ids=lambda x: x)
def test_five_steps_follow_the_published_ones(setting, row, float64, monkeypatch):
    figures = COMPARED[setting]
    want, base, names = figures["steps"][row], figures["setting"]["adapter_base"], figures["setting"]
    teacher_network, network, images, target = networks(setting)
    network = copy.deepcopy(network)
    kind = METHODS[row.split()[0].removesuffix("+KD").lower()]
    preact = getattr(kind, "preact", False)
    with torch.no_grad():
        teacher = Outputs(*teacher_network(images, is_feat=True, preact=preact))
        shapes = Outputs(*copy.deepcopy(network)(images, is_feat=True, preact=preact))
    class_of = torch.arange(names["n_data"]) % 10
    if kind is methods.CRD:
        method = crd(shapes, teacher, class_of, names["feat_dim"], base, monkeypatch, (0, 100), (200, 201))
        rows, contrast = torch.tensor(want["index"]), torch.tensor(want["contrast_idx"])
        monkeypatch.setattr(methods.CRD, "forward", lambda self, s, t, *_: self.contrast(s, t, rows, contrast))
    else:
        method = kind(shapes, teacher, class_of)
        for j, adapter in enumerate(adapters_of(method)):
            fill_rounded(adapter, base + 100 * j)

    def close(got, figure, sensitivity):
        assert got == pytest.approx(figure, rel=max(1e-8, 1e4 * sensitivity))

    if "pretraining" in want:
        before = copy.deepcopy(network.state_dict())
        trained = methods.set_phase(method, network, first=True)
        optimizer = sgd(trained.parameters(), method.first_rate(names["student"], want["lr"]))
        for figure, sensitivity in zip(want["pretraining"], want["pretraining_sensitivity"], strict=True):
            optimizer.zero_grad()
            loss = method.first_loss(Outputs(*network(images, is_feat=True, preact=preact)), teacher)
            close(loss.item(), figure, sensitivity)
            loss.backward()
            optimizer.step()
        after = want["after_pretraining"]
        assert norms(network) == pytest.approx((after["student_l2"], after["student_bn_l2"]), rel=1e-8)
        unchanged = [name for name, x in network.state_dict().items() if torch.equal(x, before[name])]
        every = after["student_entries_unchanged"] == "all"
        assert unchanged == (list(before) if every else after["student_entries_unchanged"])

    weights = want["weights"]
    assert method.weight == weights["beta"]
    parameters = list(methods.set_phase(method, network).parameters())
    assert sum(p.numel() for p in parameters) == want["trained_numbers"]
    optimizer = sgd(parameters, want["lr"])
    for i, sensitivity in enumerate(want["sensitivity"]):
        optimizer.zero_grad()
        student = Outputs(*network(images, is_feat=True, preact=preact))
        ce, kl = F.cross_entropy(student.logits, target), methods.kd_loss(student.logits, teacher.logits)
        total = weights["gamma"] * ce + weights["alpha"] * kl + method.weight * method(student, teacher, target, None)
        for got, name in ((total, "total"), (ce, "ce"), (kl, "kl")):
            close(got.item(), want[name][i], sensitivity)
        total.backward()
        optimizer.step()
    assert norms(network) == pytest.approx((want["student_after_l2"], want["student_bn_after_l2"]), rel=1e-8)
    if kind is methods.CRD:
        assert (method.bank_t.Z.item(), method.bank_s.Z.item()) == pytest.approx((want["Z_v1"], want["Z_v2"]), rel=1e-8)
        assert [l2(method.bank_s.memory), l2(method.bank_t.memory)] == pytest.approx(want["memory_after_l2"], rel=1e-8)


# What a step is made of


@pytest.fixture
def batch(monkeypatch):
    """Random outputs (float32) of two networks for 6 of 50 images, with few negatives."""
    monkeypatch.setattr(methods.CRD, "negatives", 8)
    generator = torch.Generator().manual_seed(0)
    widths = ((8, 16), (8, 16), (16, 8), (32, 4))

    def outputs():
        maps = [torch.randn(6, c, height, height, generator=generator) for c, height in widths]
        features = [*maps, torch.randn(6, 32, generator=generator).relu()]
        return Outputs(features, torch.randn(6, 100, generator=generator))

    class_of = torch.arange(50) % 10
    rows = torch.randperm(50, generator=generator)[:6]
    return SimpleNamespace(student=outputs(), teacher=outputs(), target=class_of[rows], rows=rows, labels=class_of)


def cast(outputs, dtype):
    return Outputs([x.to(dtype) for x in outputs.features], outputs.logits.to(dtype))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_traces_as_one_graph(name, batch):
    method = build(name, batch)
    traced = torch.compile(copy.deepcopy(method), fullgraph=True, backend="eager")
    for _ in range(2):  # CRD's first step sets Z
        assert term(traced, batch).item() == term(method, batch).item()
    if hasattr(method, "first_loss"):
        traced = torch.compile(copy.deepcopy(method).first_loss, fullgraph=True, backend="eager")
        assert traced(batch.student, batch.teacher).item() == method.first_loss(batch.student, batch.teacher).item()


class Operations(TorchDispatchMode):
    """Notes the operations that run and the largest tensor they make."""

    def __init__(self):
        super().__init__()
        self.names, self.elements = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_asks_the_device_for_a_number(name, batch):
    method = build(name, batch)
    with Operations() as seen:
        term(method, batch)
    assert not seen.names & {"_local_scalar_dense", "nonzero", "item", "masked_select"}


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_outputs_are_computed_in_float32_and_float64_stays(name, batch):
    method = build(name, batch)
    half = SimpleNamespace(**vars(batch) | {n: cast(getattr(batch, n), torch.bfloat16) for n in ("student", "teacher")})
    full = SimpleNamespace(**vars(batch) | {n: cast(getattr(half, n), torch.float32) for n in ("student", "teacher")})
    double = SimpleNamespace(**vars(batch) | {n: cast(getattr(half, n), torch.float64) for n in ("student", "teacher")})
    a, b, c = (term(copy.deepcopy(method), half), term(copy.deepcopy(method), full), term(method.double(), double))
    assert (a.dtype, c.dtype) == (torch.float32, torch.float64)
    assert a.shape == b.shape == c.shape == ()
    assert a.item() == b.item()
    assert a.item() == pytest.approx(c.item(), rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_adapters_of_the_main_phase_get_a_gradient_and_the_teacher_none(name, batch):
    method = build(name, batch)
    for outputs in (batch.student, batch.teacher):
        for x in [*outputs.features, outputs.logits]:
            x.requires_grad_()
    trained = list(methods.set_phase(method, torch.nn.Identity()).parameters())
    loss = term(method, batch)
    if name == "ab":
        assert (loss.item(), loss.requires_grad, trained) == (0, False, [])
        loss, trained = method.first_loss(batch.student, batch.teacher), list(method.parameters())
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)
    others = {id(p) for p in method.parameters()} - {id(p) for p in trained}
    assert all(p.grad is None for p in method.parameters() if id(p) in others)
    assert all(x.grad is None for x in [*batch.teacher.features, batch.teacher.logits])


# Phases

HEADS = {
    "resnet20": ["fc"],
    "resnet8x4": ["fc"],
    "wrn_16_2": ["bn1", "fc"],
    "vgg8": ["classifier"],
    "MobileNetV2": ["conv2", "classifier"],
    "ShuffleV1": ["linear"],
    "ShuffleV2": ["conv2", "bn2", "linear"],
    "ResNet50": ["linear"],
}


@pytest.mark.parametrize("arch", HEADS)
def test_abs_first_phase_leaves_out_what_lies_behind_the_stages(arch, batch):
    with torch.device("meta"):
        network = model_dict[arch]()
    method = build("ab", batch)
    trained = {id(parameter) for parameter in methods.set_phase(method, network, first=True).parameters()}
    left = [name for name, child in network.named_children() if not child.training]
    assert left == HEADS[arch]
    for name, parameter in network.named_parameters():
        assert (id(parameter) in trained) == (name.split(".")[0] not in HEADS[arch]), name
    methods.set_phase(method, network)
    assert all(module.training for module in network.modules())


def test_fts_phases_train_the_paraphraser_then_the_translator_beside_the_student(batch):
    method, network = build("ft", batch), torch.nn.Linear(2, 2)
    assert list(methods.set_phase(method, network, first=True)) == [method.paraphraser]
    assert (network.training, method.translator.training, method.paraphraser.training) == (False, False, True)
    assert list(methods.set_phase(method, network)) == [network, method.translator]
    assert (network.training, method.translator.training, method.paraphraser.training) == (True, True, False)
    assert [method.first_rate(arch, 0.05) for arch in ("resnet8x4", "wrn_40_1", "vgg8")] == [0.01, 0.01, 0.05]


# The eleven pairs of the tables: trained values of FitNet's regressor, VID, AB's connectors, FT's paraphraser and
# translator, CRD's two embeddings, counted in the published code

PAIR_SIZES = {
    ("wrn_40_2", "wrn_16_2"): (4288, 64736, 0, 516672, 258816, 16512, 16512),
    ("wrn_40_2", "wrn_40_1"): (2240, 53984, 11424, 516672, 111168, 8320, 16512),
    ("resnet56", "resnet20"): (1120, 16240, 0, 129312, 64896, 8320, 8320),
    ("resnet32x4", "resnet8x4"): (16768, 258496, 0, 2065536, 1033728, 32896, 32896),
    ("vgg13", "vgg8"): (66304, 1820032, 0, 8259840, 4131840, 65664, 65664),
    ("vgg13", "MobileNetV2"): (4864, 1325952, 1345152, 8259840, 1190880, 163968, 65664),
    ("ResNet50", "MobileNetV2"): (132608, 11533056, 6221056, 132129792, 11148768, 163968, 262272),
    ("ResNet50", "vgg8"): (2098688, 12881664, 12070144, 132129792, 16522752, 65664, 262272),
    ("resnet32x4", "ShuffleV1"): (983424, 495040, 5162304, 2065536, 9551424, 123008, 32896),
    ("resnet32x4", "ShuffleV2"): (475520, 328384, 2495808, 2065536, 2621808, 131200, 32896),
    ("wrn_40_2", "ShuffleV1"): (491712, 204512, 2581152, 516672, 8887488, 123008, 16512),
}


@pytest.mark.parametrize("pair", PAIR_SIZES, ids=" ".join)
def test_adapters_of_every_pair_have_the_published_sizes(pair):
    class_of = torch.arange(20) % 10
    with torch.device("meta"):
        teacher, student = (Outputs(*model_dict[arch]()(torch.zeros(2, 3, 32, 32), is_feat=True)) for arch in pair)
        fitnet, vid, ab, ft, crd = (
            METHODS[m](student, teacher, class_of) for m in ("fitnet", "vid", "ab", "ft", "crd")
        )
    parts = (fitnet, vid, ab, ft.paraphraser, ft.translator, crd.embed_s, crd.embed_t)
    assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == PAIR_SIZES[pair]


def outputs_of(*heights):
    return Outputs([*(torch.zeros(2, 4, height, height) for height in heights), torch.zeros(2, 4)], torch.zeros(2, 10))


def test_a_pair_that_does_not_go_with_a_method_is_an_error():
    with pytest.raises(methods.MethodError, match="height 3 to the teacher's of 8"):
        METHODS["fitnet"](outputs_of(8, 8, 3), outputs_of(8, 8, 8), None)
    with pytest.raises(methods.MethodError, match="the student has 2 of them, the teacher 1"):
        METHODS["ab"](outputs_of(8, 8, 8), outputs_of(8, 8), None)
    with pytest.raises(methods.MethodError, match="one class only"):
        METHODS["crd"](outputs_of(8), outputs_of(8), torch.zeros(5, dtype=torch.long))


def test_published_weights():
    weights = {name: method.weight for name, method in METHODS.items()}
    assert weights == {
        "kd": 0, "fitnet": 100, "at": 1000, "sp": 3000, "vid": 1, "rkd": 1, "pkt": 30000, "ab": 1, "ft": 200,
        "crd": 0.8, "dkd": 1, "ls": 9,
    }  # fmt: skip
    first = {name: method.first_epochs for name, method in METHODS.items() if hasattr(method, "first_epochs")}
    assert first == {"ab": 30, "ft": 30, "dkd": 20}
    assert {name for name, method in METHODS.items() if hasattr(method, "first_loss")} == {"ab", "ft"}
    assert (METHODS["dkd"].ce_weight, METHODS["dkd"].kd_weight) == (1, 0)
    assert (METHODS["ls"].ce_weight, METHODS["ls"].kd_weight) == (0.1, 0)


# DKD


def test_dkd_warms_up_over_twenty_epochs(batch):
    method = build("dkd", batch)
    full = term(method, batch).item()
    for epoch, share in ((1, 0.05), (10, 0.5), (20, 1), (240, 1)):
        method.start_epoch(0, epoch)
        assert term(method, batch).item() == pytest.approx(share * full, rel=1e-6)


def test_dkds_beta_is_that_of_the_pair(batch):
    method = build("dkd", batch)
    got = {}
    for t_arch, s_arch in PAIR_SIZES:
        method.choose_pair(t_arch, s_arch)
        got[t_arch, s_arch] = method.beta
    assert [got.pop(pair) for pair in (("resnet56", "resnet20"), ("vgg13", "vgg8"), ("vgg13", "MobileNetV2"))] == [
        2, 6, 6,
    ]  # fmt: skip
    assert [got.pop(("wrn_40_2", student)) for student in ("wrn_16_2", "wrn_40_1")] == [6, 6]
    assert set(got.values()) == {8}


# CRD's banks and negatives


def test_the_step_gathers_no_rows_of_the_bank(batch):
    images, k = 300, 200
    method = type("Large", (methods.CRD,), {"negatives": k})(batch.student, batch.teacher, torch.arange(images) % 10)
    with Operations() as seen:
        term(method, batch).backward()
    assert seen.elements == images * 128  # the bank itself; 6 · 201 rows of 128 would be four times as many


def test_the_backward_pass_does_not_need_the_bank(batch):
    gradients = []
    for spoil in (False, True):
        torch.manual_seed(0)
        method = build("crd", batch)
        loss = term(method, batch)
        if spoil:
            method.bank_s.memory.fill_(math.nan)
            method.bank_t.memory.fill_(math.nan)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters()]))
    assert torch.equal(*gradients)


def crd_steps(method, batch, steps):
    return [term(method, batch).item() for _ in range(steps)]


def test_crd_goes_on_bit_for_bit_from_its_state_dict_at_the_start_of_an_epoch(batch):
    straight = build("crd", batch)
    straight.start_epoch(7, 1)
    crd_steps(straight, batch, 3)
    resumed = build("crd", batch)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for method in (straight, resumed):
        method.start_epoch(7, 2)
    assert crd_steps(straight, batch, 3) == crd_steps(resumed, batch, 3)


def test_each_step_of_crd_draws_anew_from_seed_epoch_and_step(batch, monkeypatch):
    drawn = []
    original = methods.draw_negatives

    def noting(*args):
        drawn.append(original(*args).tolist())
        return torch.tensor(drawn[-1])

    monkeypatch.setattr(methods, "draw_negatives", noting)
    method = build("crd", batch)
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (1, 2), (0, 1)):
        method.start_epoch(seed, epoch)
        crd_steps(method, batch, 3)
    assert all((batch.labels[torch.tensor(draw)] != batch.target[:, None]).all() for draw in drawn)
    first, again = drawn[:12], drawn[12:]
    assert again == drawn[:3]
    assert len({str(draw) for draw in first}) == 12


def test_more_negatives_than_images_are_drawn_with_replacement(batch):
    method = type("Many", (methods.CRD,), {"negatives": 60})(batch.student, batch.teacher, batch.labels)
    assert method.replace
    assert math.isfinite(term(method, batch).item())
    assert not build("crd", batch).replace
