"""The rotation fit against numpy's and scipy's in float64, on points that behave and on points that do not."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.transform import Rotation
from scipy.stats import ortho_group

from trainer.ops import rotation_fit
from trainer.ops.rotation_fit import GRADIENT_TOLERANCE, TOLERANCE, factorise, fit_rotation, iterate, rotation_equivariance

KINDS = (
    "random", "noise 1e-1", "noise 1e-2", "noise 1e-4", "noise 0", "reflected", "spectrum 1e-3", "spectrum 1e-5",
    "spectrum 1e-8", "spectrum 1e-8, noise 1e-1", "spectrum 1e-8, noise 0", "rank 3", "duplicates", "collapsed", "zeros",
)  # fmt: skip


def points(kind: str, n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and target [n, d] in float64, the source's norm about sqrt(n)."""
    rng = np.random.default_rng(seed)
    source = rng.standard_normal((n, d)) / d**0.5
    turn = ortho_group.rvs(d, random_state=seed) if d > 1 else np.ones((1, 1))
    turn[0] *= np.linalg.det(turn) * (-1 if kind == "reflected" else 1)
    name, _, noise = kind.partition(", ")
    noise = float((noise or name).removeprefix("noise ")) if "noise" in kind else 0 if kind == "reflected" else 1e-2
    if name == "zeros":
        return source, 0 * source
    if name == "random":
        return source, rng.standard_normal((n, d)) / d**0.5
    if name.startswith("spectrum"):
        u, _, vh = np.linalg.svd(source, full_matrices=False)
        source = n**0.5 * (u * np.geomspace(1, float(name.split()[1]), min(n, d))) @ vh
    elif name == "rank 3":
        source = rng.standard_normal((n, 3)) @ rng.standard_normal((3, d)) / (3 * d) ** 0.5
    elif name == "duplicates":
        source = source[rng.integers(0, (n + 1) // 2, n)]
    elif name == "collapsed":
        source, noise = np.full((n, d), d**-0.5), 0
        return source, source.copy()
    return source, source @ turn + noise * rng.standard_normal((n, d)) / d**0.5


def batch(kinds: list[str], n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [points(kind, n, d, seed + i) for i, kind in enumerate(kinds)]
    source, target = (torch.from_numpy(np.stack(side)).to(dtype) for side in zip(*pairs, strict=True))
    return source, target


def best_turn(source: np.ndarray, target: np.ndarray, group: str) -> np.ndarray:
    """R [d, d]: scipy's, but for rotations with the smallest singular value turned round (Umeyama 1991)."""
    if group == "O":
        return orthogonal_procrustes(source, target)[0]
    u, _, vh = np.linalg.svd(source.T @ target)
    u[:, -1] *= np.linalg.det(u) * np.linalg.det(vh)
    return u @ vh


def left(source: np.ndarray, target: np.ndarray, turn: np.ndarray) -> float:
    return float(np.square(source @ turn - target).sum())


def check(kinds: list[str], n: int, d: int, seed: int, group: str) -> None:
    """All that is promised of a fit, for groups of these kinds in one call."""
    source, target = (x.requires_grad_() for x in batch(kinds, n, d, seed))
    fit = fit_rotation(source, target, group=group)
    gradients = torch.autograd.grad(fit.residual.sum(), (source, target))
    assert all(torch.isfinite(x).all() for x in (*fit, *gradients))
    cheaper = fit_rotation(source, target, group=group, rotation=False)
    for g, kind in enumerate(kinds):
        a, b = (x[g].detach().double().numpy() for x in (source, target))
        expected, scale = left(a, b, best_turn(a, b, group)), np.square(a).sum() + np.square(b).sum()
        singular = np.linalg.svd(a, compute_uv=False)
        hard = singular[-1] < 1e-6 * singular[0] and expected < 1e-6 * scale
        close = {"rel": 1e-3 if hard else TOLERANCE, "abs": 1e-15 * scale}
        assert fit.residual[g].item() == pytest.approx(expected, **close), kind
        assert cheaper.residual[g].item() == pytest.approx(expected, **close), kind
        turn = fit.rotation[g].detach().double().numpy()
        assert np.abs(turn @ turn.T - np.eye(d)).max() < 1e-5, kind
        assert group == "O" or np.linalg.det(turn) == pytest.approx(1, abs=1e-4), kind
        rounding = 1e-6 * (expected * scale) ** 0.5 + 1e-12 * scale  # of a rotation in float32
        assert left(a, b, turn) == pytest.approx(expected, rel=1e-5, abs=rounding), kind
        assert np.trace(turn.T @ a.T @ b) == pytest.approx(fit.nuclear[g].item(), rel=1e-5, abs=1e-7 * scale), kind


@settings(max_examples=120, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    n=st.integers(1, 40),
    d=st.integers(1, 24),
    seed=st.integers(0, 99),
    group=st.sampled_from(["SO", "O"]),
)
def test_fits_as_a_float64_svd_does(kinds, n, d, seed, group):
    check(kinds, n, d, seed, group)


def products_first(source: torch.Tensor, rotation: bool) -> list:
    """The GPU's routes, but for its kernel."""
    exact = partial(factorise, rotation=rotation)
    return [exact, exact] if rotation else [iterate, iterate, exact]


@settings(max_examples=80, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    n=st.integers(1, 40),
    d=st.integers(1, 24),
    seed=st.integers(0, 99),
    group=st.sampled_from(["SO", "O"]),
)
def test_matrix_products_fit_as_well_and_what_they_cannot_is_fitted_again(kinds, n, d, seed, group):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation_fit, "routes", products_first)
        check(kinds, n, d, seed, group)


@pytest.mark.parametrize(("n", "d"), [(400, 5), (128, 128), (32, 512)])
def test_serves_many_points_and_many_dimensions(n, d):
    check(["random", "noise 1e-2", "spectrum 1e-8, noise 1e-1"], n, d, 0, "SO")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(2, 12), noise=st.sampled_from([0.0, 1e-3, 0.5]))
def test_in_three_dimensions_it_is_scipys_rotation(seed, n, noise):
    rng = np.random.default_rng(seed)
    source = rng.standard_normal((n, 3))
    target = Rotation.random(random_state=seed).apply(source) + noise * rng.standard_normal((n, 3))
    expected, distance = Rotation.align_vectors(target, source)
    fit = fit_rotation(*(torch.from_numpy(x)[None] for x in (source, target)), group="SO")
    assert np.abs(fit.rotation[0].numpy().T - expected.as_matrix()).max() < 1e-6
    assert fit.residual.item() == pytest.approx(distance**2, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), more=st.integers(1, 12), seed=st.integers(0, 99), kind=st.sampled_from(["random", "noise 1e-1"]))
def test_beyond_the_span_it_turns_least(n, more, seed, kind):
    d = n + more
    a, b = points(kind, n, d, seed)
    u, _, vh = np.linalg.svd(a.T @ b)
    on_span = u[:, :n] @ vh[:n]
    u, s, vh = np.linalg.svd(on_span + (np.eye(d) - on_span @ on_span.T) @ (np.eye(d) - on_span.T @ on_span))
    fit = fit_rotation(torch.from_numpy(a)[None], torch.from_numpy(b)[None], group="O")
    assert np.abs(fit.rotation[0].numpy() - u @ vh).max() < 1e-10 / s[-1]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 10), d=st.integers(1, 10), seed=st.integers(0, 99), group=st.sampled_from(["SO", "O"]),
    kind=st.sampled_from(["random", "noise 1e-1", "noise 1e-4", "reflected"]),
)  # fmt: skip
def test_the_gradient_is_the_slope_of_the_reference(n, d, seed, group, kind):
    source, target = (x.requires_grad_() for x in batch([kind], n, d, seed, torch.float64))
    gradients = torch.autograd.grad(fit_rotation(source, target, group=group, rotation=False).residual.sum(), (source, target))
    a, b = (x[0].detach().numpy() for x in (source, target))
    singular = np.linalg.svd(a.T @ b, compute_uv=False)[: min(n, d)]
    sign = np.linalg.det(best_turn(a, b, "O"))
    gap = singular[-2:].sum() if n < d or group == "O" or sign > 0 else np.diff(singular[-2:])[0] if d > 1 else 1
    if abs(gap) < 1e-2 * singular[0] or singular[-1] < 1e-3 * singular[0]:
        return  # next to a kink
    rng = np.random.default_rng(seed)
    da, db = rng.standard_normal(a.shape), rng.standard_normal(b.shape)
    step = 1e-6

    def at(t: float) -> float:
        return left(a + t * da, b + t * db, best_turn(a + t * da, b + t * db, group))

    slope = sum(float((g[0].numpy() * x).sum()) for g, x in zip(gradients, (da, db), strict=True))
    assert slope == pytest.approx((at(step) - at(-step)) / (2 * step), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("route", ["factorise", "iterate"])
@pytest.mark.parametrize(("n", "d"), [(8, 20), (32, 64), (40, 6)])
def test_float32_gradients_follow_the_envelope_formula(n, d, route, monkeypatch):
    if route == "iterate":
        monkeypatch.setattr(rotation_fit, "routes", products_first)
    kinds = ["random", "noise 1e-1", "noise 1e-2", "noise 1e-4"]
    source, target = (x.requires_grad_() for x in batch(kinds, n, d, 0))
    found = torch.autograd.grad(fit_rotation(source, target, group="O", rotation=False).residual.sum(), (source, target))
    for g in range(len(kinds)):
        a, b = (x[g].detach().double().numpy() for x in (source, target))
        turn = best_turn(a, b, "O")
        for slope, expected in zip(found, (2 * (a - b @ turn.T), 2 * (b - a @ turn)), strict=True):
            assert np.linalg.norm(slope[g].numpy() - expected) < 1e-4 * np.linalg.norm(expected), kinds[g]


def test_identical_embeddings_have_no_residual_and_no_gradient():
    z = torch.nn.functional.normalize(torch.ones(2, 6, 9), dim=2).requires_grad_()
    residual = fit_rotation(z, z.detach(), rotation=False).residual
    assert residual.max() < 1e-12
    assert torch.autograd.grad(residual.sum(), z)[0].abs().max() < 1e-5


def test_a_group_that_is_not_finite_spoils_no_other():
    source, target = batch(["random"] * 3, 8, 12, 0)
    source[1, 2, 3], target[2, 0, 0] = torch.nan, torch.inf
    source.requires_grad_()
    fit = fit_rotation(source, target)
    gradient = torch.autograd.grad(fit.residual.sum(), source)[0]
    for values in (
        fit.rotation.flatten(1),
        fit.residual[:, None],
        fit.nuclear[:, None],
        fit.gauge[:, None],
        gradient.flatten(1),
    ):
        assert values[0].isfinite().all()
        assert values[1:].isnan().all()


def test_half_types_count_in_float32_in_and_out_of_autocast():
    source, target = (x.bfloat16().requires_grad_() for x in batch(["random", "noise 1e-2"], 8, 20, 0))
    with torch.autocast("cpu", torch.bfloat16):
        fit = fit_rotation(source, target)
    expected = fit_rotation(source.float(), target.float())
    assert torch.equal(fit.residual, expected.residual)
    assert torch.equal(fit.rotation, expected.rotation)
    assert torch.autograd.grad(fit.residual.sum(), source)[0].dtype == torch.bfloat16


def test_precision_that_the_program_allows_elsewhere_does_not_reach_the_fit():
    source, target = batch(["noise 1e-1"] * 4, 40, 60, 0)
    expected = fit_rotation(source, target)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(fit_rotation(source, target).residual, expected.residual)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_training_term_is_the_mean_squared_distance_that_the_best_map_leaves():
    source, target = batch(["random", "reflected", "noise 1e-1"], 7, 5, 0)
    expected = np.mean([left(a, b, best_turn(a, b, "O")) / 7 for a, b in zip(source.numpy(), target.numpy(), strict=True)])
    assert rotation_equivariance(source.flatten(0, 1), target.flatten(0, 1), 3).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("source", "target"), [((2, 3, 4), (2, 3, 5)), ((3, 4), (3, 4)), ((2, 0, 4), (2, 0, 4))])
def test_points_that_do_not_pair_are_refused(source, target):
    with pytest.raises(ValueError, match=r"\[groups, points, dimensions\]"):
        fit_rotation(torch.zeros(source), torch.zeros(target))


@pytest.mark.parametrize(("proper", "gradients", "rotation"), [(True, True, True), (False, True, False), (True, False, False)])
def test_torch_finds_the_operator_registered_well(proper, gradients, rotation):
    source, target = (x.requires_grad_(gradients) for x in batch(["random", "noise 1e-2"], 5, 8, 0))
    torch.library.opcheck(rotation_fit._fit, (source, target, proper, gradients, rotation))


def test_compiled_it_is_the_same():
    def term(source, target):
        fit = fit_rotation(source * 2, target, rotation=True)
        return fit.residual.sum(), fit.rotation

    source, target = (x.requires_grad_() for x in batch(["random", "noise 1e-2"], 5, 8, 0))
    (value, turn), (expected, expected_turn) = (
        torch.compile(term, fullgraph=True, backend="aot_eager")(source, target),
        term(source, target),
    )
    assert torch.equal(value, expected)
    assert torch.equal(turn, expected_turn)
    for found, slope in zip(*(torch.autograd.grad(x, (source, target)) for x in (value, expected)), strict=True):
        assert torch.equal(found, slope)


def test_without_a_rotation_none_is_made():
    source, target = batch(["random"], 3, 4, 0)
    assert fit_rotation(source, target, rotation=False).rotation is None


def within_the_gauge(route, n: int, d: int, kinds: tuple[str, ...] = KINDS) -> list[tuple[str, float, float, float]]:
    """Of every kind: its name, the residual's error, what the gauge allows, both over ||A||^2 + ||B||^2; a gradient's error,
    over the root of that, or nan where singular values are so small that the gradient is not unique in float32."""
    source, target = batch(list(kinds), n, d, 0)
    fit = route(source, target, False)
    rows = []
    for g, kind in enumerate(kinds):
        a, b = (x[g].double().numpy() for x in (source, target))
        turn, scale = best_turn(a, b, "O"), np.square(a).sum() + np.square(b).sum()
        error = abs(fit.residual[g].item() - left(a, b, turn)) / scale
        slopes = (fit.source_gradient, 2 * (a - b @ turn.T)), (fit.target_gradient, 2 * (b - a @ turn))
        slope = max(np.linalg.norm(found[g].numpy() - expected) for found, expected in slopes) / scale**0.5
        singular = np.linalg.svd(a.T @ b, compute_uv=False)[: min(n, d)]
        slope = slope if singular[-1] > 1e-2 * singular[0] else float("nan")  # elsewhere it is float64's to find
        allowed = fit.gauge[g].item() * max(fit.residual[g].item() / scale, torch.finfo(torch.float32).eps ** 2)
        rows.append((kind, float(error), float(allowed), float(slope)))
    return rows


@pytest.mark.parametrize("route", [lambda *given: factorise(*given, False), iterate], ids=["factorise", "iterate"])
@pytest.mark.parametrize(("n", "d"), [(1, 20), (9, 100), (32, 128), (64, 80), (100, 24), (24, 24)])
def test_the_gauge_bounds_the_error_of_float32(n, d, route):
    for kind, error, allowed, _ in within_the_gauge(route, n, d):
        assert error <= 1.001 * allowed, kind


def spectra(n: int, d: int, logs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 points whose singular values end at 10^log: one or two so small, on either side or both, or all the way down."""
    rng, pairs, k = np.random.default_rng(0), [], min(n, d)

    def ortho(rows: int) -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((rows, k)))[0]

    for log in logs:
        even, last, two = np.ones(k), np.ones(k), np.ones(k)
        last[-1], two[-2:] = 10**log, 10**log
        steep, loose = np.logspace(0, log, k), 10 ** (log * rng.random(k))
        sides = (
            (even, last),
            (last, even),
            (last, last),
            (even, two),
            (even, steep),
            (steep, steep),
            (even, loose),
            (loose, steep),
        )
        for first, second in sides:
            u = ortho(n)
            a, b = u * first @ ortho(d).T, u * second @ ortho(d).T
            noise = rng.standard_normal((n, d)) / (n * d) ** 0.5
            pairs += [(a, ortho(n) * second @ ortho(d).T), (a, b + 0.1 * np.linalg.norm(b) * noise)]
    source, target = (torch.from_numpy(np.stack(side)).float() for side in zip(*pairs, strict=True))
    return source, target


def worst_accepted(route, n: int, d: int, logs: np.ndarray) -> tuple[float, float, float]:
    """Share of `spectra` that the gauge accepts, and the largest relative errors among them: of residuals, of gradients.

    Of a gradient what lies in the null space of M = A^T B does not count: it is free.
    """
    source, target = spectra(n, d, logs)
    fit = route(source, target, False)
    a, b = source.double(), target.double()
    u, s, vh = torch.linalg.svd(a.mT @ b)
    turn, unique = u @ vh, (s > 1e-13 * s[:, :1])[:, None]
    residual = (a @ turn - b).square().sum((1, 2))
    errors = [(fit.residual - residual).abs() / residual]
    slopes = (fit.source_gradient, 2 * (a - b @ turn.mT), u), (fit.target_gradient, 2 * (b - a @ turn), vh.mT)
    errors += [((found - g) @ (axes * unique)).norm(dim=(1, 2)) / g.norm(dim=(1, 2)) for found, g, axes in slopes]
    accepted = fit.gauge <= TOLERANCE
    worst = [error[accepted].max().item() for error in errors]
    return accepted.float().mean().item(), worst[0], max(worst[1:])


@pytest.mark.parametrize(("n", "d"), [(4, 4), (8, 8), (64, 16), (4, 16), (8, 64)])
def test_products_that_the_gauge_accepts_have_residual_and_gradients(n, d):
    accepted, residual, gradient = worst_accepted(iterate, n, d, np.linspace(-7, -3, 60))
    assert accepted > 0.05
    assert residual <= TOLERANCE
    assert gradient <= GRADIENT_TOLERANCE


@pytest.mark.parametrize(("n", "d"), [(4, 4), (64, 16), (8, 64)])
def test_an_svd_in_float32_that_the_gauge_accepts_is_nearly_as_good(n, d):
    """Its share is larger, by an estimate of rounding and not a bound."""
    accepted, residual, gradient = worst_accepted(lambda *given: factorise(*given, False), n, d, np.linspace(-7, -3, 60))
    assert accepted > 0.2
    assert residual <= TOLERANCE
    assert gradient <= 10 * GRADIENT_TOLERANCE


def fused_in_float32() -> dict:
    from trainer.ops.kernels.rotation_fit import fit

    few = ("random", "spectrum 1e-5", "zeros")
    sizes = ((1, 20, KINDS), (9, 100, KINDS), (32, 128, few), (64, 80, few))
    kinds = [row for n, d, kinds in sizes for row in within_the_gauge(fit, n, d, kinds)]
    return {"kinds": kinds, "spectra": [worst_accepted(fit, n, d, np.linspace(-7, -3, 6)) for n, d in ((4, 16), (8, 64))]}


def test_the_fused_kernel_fits_within_its_gauge():
    pytest.importorskip("triton")
    from kernels import in_interpreter

    found = in_interpreter(fused_in_float32)
    for kind, error, allowed, slope in found["kinds"]:
        assert error <= 1.001 * allowed, kind
        if kind in ("random", "noise 1e-1"):
            assert allowed < 1e-6
        assert math.isnan(slope) or slope < 1e-5, kind
    for accepted, residual, gradient in found["spectra"]:
        assert accepted > 0.05
        assert residual <= TOLERANCE
        assert gradient <= GRADIENT_TOLERANCE


def test_routes_take_turns_until_the_gauge_is_satisfied(monkeypatch):
    """Random groups pass in float32, nearly aligned ones by products in float64, and reflections need the SVD."""
    taken = []

    def traced(name: str, route):
        def run(source, target, proper):
            taken.append((name, source.dtype, len(source)))
            return route(source, target, proper)

        return run

    order = [traced("products", iterate), traced("products", iterate), traced("svd", partial(factorise, rotation=False))]
    monkeypatch.setattr(rotation_fit, "routes", lambda source, rotation: order)
    source, target = batch(["random"], 16, 5, 0)
    fit_rotation(source, source + 0.3 * target, rotation=False)
    assert taken == [("products", torch.float32, 1)]
    taken.clear()
    source, target = batch(["noise 1e-1", "noise 1e-4", "reflected"], 16, 5, 0)
    residual = fit_rotation(source, target, rotation=False).residual
    assert taken == [("products", torch.float32, 3), ("products", torch.float64, 2), ("svd", torch.float64, 1)]
    expected = [
        left(a, b, best_turn(a, b, "SO")) for a, b in zip(source.double().numpy(), target.double().numpy(), strict=True)
    ]
    assert residual.tolist() == pytest.approx(expected, rel=TOLERANCE)


def test_a_second_derivative_is_refused_and_not_taken_for_zero():
    source, target = (x.requires_grad_() for x in batch(["random"], 5, 8, 0))
    value = fit_rotation(source, target, rotation=False).residual.sum() + source.pow(3).sum()
    (slope,) = torch.autograd.grad(value, source, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        slope.sum().backward()


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_the_fused_kernel_compiles_for_hopper(rows):
    pytest.importorskip("triton")
    from kernels import SHARED_LIMIT, compile_report
    from trainer.ops.kernels import rotation_fit as fused

    pointers = ("source", "target", "source_gradient", "target_gradient", "residual", "nuclear", "gauge", "coefficients")
    signature = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(("points", "dim", "split", "end"), "i32")
    constants = {"ROWS": rows, "CHUNK": fused.CHUNK, "PRECISION": fused.PRECISION}
    report = compile_report(fused.fit_kernel, signature, constants, num_warps=4)
    assert report.shared < SHARED_LIMIT
    assert report.spills <= {16: 32, 32: 0, 64: 128}[rows]
    if rows == 16:  # Triton makes a constant of an argument that is 1
        assert compile_report(fused.fit_kernel, signature, constants | {"points": 1}, num_warps=4).shared < SHARED_LIMIT
