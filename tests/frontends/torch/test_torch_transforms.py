"""Torch's transforms and modes: a step under one is right, or refused by the transform's name with nothing written."""

import itertools

import pytest
import torch
from matrix_cases import MATRIX_CASES
from modes import to_mode
from thinned import thinned
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ssu_bridge
from ssu_bridge.testing.cases import Case

CASE = Case("transforms", headdim=8, dstate=16)
ROUNDED = Case("transforms, rounded", headdim=8, dstate=16, dtypes={"state": "float16"})


def tensors(seed=1):
    return to_mode(CASE.arrays(seed=seed), "torch")


REST = {name: tensor for name, tensor in tensors().items() if name not in ("state", "x")}


CALLS = ("first call", "repeated call")


@pytest.fixture(params=CALLS)
def given(request):
    """The arguments of a call, after one like it or not."""
    ssu_bridge.api._launchers.clear()
    if request.param == "repeated call":
        ssu_bridge.update(**tensors(), **CASE.flags)
    return tensors()


def step(**arrays):
    return ssu_bridge.update(**arrays, **CASE.flags)


def summed(arrays, name):
    """The sum of a step's outputs as a function of one of its arguments."""
    return lambda value: step(**{**arrays, name: value})[0].sum()


REFUSED = {
    "torch.func.vmap": lambda a: torch.func.vmap(lambda x: step(**{**a, "x": x})[0])(torch.stack([a["x"]] * 2)),
    "torch.func.jvp": lambda a: torch.func.jvp(summed(a, "x"), (a["x"],), (a["x"],)),
    "torch.func.grad": lambda a: torch.func.grad(summed(a, "D"))(a["D"]),
    "torch.func.functionalize": lambda a: torch.func.functionalize(lambda x: step(**{**a, "x": x})[0])(a["x"]),
}
MADE_OF_THEM = {
    "jacrev": ("torch.func.grad", lambda a: torch.func.jacrev(summed(a, "A"))(a["A"])),
    "jacfwd": ("torch.func.jvp", lambda a: torch.func.jacfwd(summed(a, "dt"))(a["dt"])),
    "hessian": ("torch.func.grad", lambda a: torch.func.hessian(summed(a, "C"))(a["C"])),
    "nothing mapped": ("torch.func.vmap", lambda a: torch.func.vmap(lambda _: step(**a)[0])(torch.zeros(2))),
}
CASES = {name: (name, call) for name, call in REFUSED.items()} | MADE_OF_THEM


@pytest.mark.parametrize("name", CASES)
def test_a_transform_of_functions_is_refused_by_its_name(given, name):
    transform, call = CASES[name]
    held = given["state"].clone()
    with pytest.raises(ssu_bridge.UnsupportedError, match=transform):
        call(given)
    assert torch.equal(given["state"], held)


# By default those that others are made of, each after a call or before any: they are found while Dynamo traces.
@pytest.mark.parametrize(
    ("name", "given"),
    [
        *thinned(REFUSED, CALLS, one_in=2),
        *(pytest.param(*chosen, marks=pytest.mark.nightly) for chosen in itertools.product(MADE_OF_THEM, CALLS)),
    ],
    indirect=["given"],
)
@pytest.mark.filterwarnings("ignore")
def test_compiled_code_refuses_it_too(given, name):
    transform, call = CASES[name]
    torch._dynamo.reset()
    held = given["state"].clone()
    with pytest.raises(ssu_bridge.UnsupportedError, match=transform):
        torch.compile(call, backend="eager")(given)
    assert torch.equal(given["state"], held)


def test_a_transform_is_refused_before_a_seed_is_drawn():
    a = to_mode(ROUNDED.arrays(seed=1), "torch")
    with (
        ssu_bridge.using(stochastic_rounding=True),
        pytest.raises(ssu_bridge.UnsupportedError, match=r"torch\.func\.vmap"),
    ):
        torch.func.vmap(lambda x: ssu_bridge.update(**{**a, "x": x})[0])(torch.stack([a["x"]] * 2))


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_a_tangent_is_refused(given, name):
    held = given["state"].clone()
    with forward_ad.dual_level():
        step(**{**given, "state": given["state"].clone()})  # without a tangent there is nothing to lose
        dual = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(ssu_bridge.UnsupportedError, match=rf"{name}: it has a tangent.*forward_ad"):
            step(**{**given, name: dual})
    assert torch.equal(given["state"], held)


def test_a_tangent_of_what_is_written_is_refused(given):
    with forward_ad.dual_level():
        out = forward_ad.make_dual(torch.zeros_like(given["x"]), torch.ones_like(given["x"]))
        with pytest.raises(ssu_bridge.UnsupportedError, match="out: it has a tangent"):
            step(**given, out=out)
    assert not out.any()


def assert_like_a_step(recorded):
    """Assert that a function of state, x does with other numbers what a step does."""
    expected, got = tensors(seed=2), tensors(seed=2)
    y, state = step(**{**REST, "state": expected["state"], "x": expected["x"]})
    assert torch.equal(recorded(got["state"], got["x"]), y)
    assert torch.equal(got["state"], state)


def function(state, x):
    return step(state=state, x=x, **REST)[0]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_step(given, mode):
    rest = {name: given[name] for name in REST}
    graph = make_fx(lambda state, x, rest: step(state=state, x=x, **rest)[0], tracing_mode=mode)(
        given["state"], given["x"], rest
    )
    assert torch.ops.ssu_bridge.update.default in {node.target for node in graph.graph.nodes}
    assert_like_a_step(lambda state, x: graph(state, x, REST))


def test_make_fx_on_real_tensors_runs_the_step(given):
    expected = tensors()["state"]
    function(expected, given["x"])
    make_fx(function)(given["state"], given["x"])
    assert torch.equal(given["state"], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_step(given):
    assert_like_a_step(torch.jit.trace(function, (given["state"], given["x"])))


@pytest.mark.parametrize("strict", [False, True])
def test_export(given, strict):
    class Model(torch.nn.Module):
        def forward(self, state, x):
            return function(state, x)

    exported = torch.export.export(Model(), (given["state"], given["x"]), strict=strict)
    assert_like_a_step(exported.module())


def test_inference_mode(given):
    expected = step(**tensors())
    with torch.inference_mode():
        made_there = tensors()
        for _ in range(2):
            results = step(**{**made_there, "state": made_there["state"].clone()})
            for got, wanted in zip(results, expected, strict=True):
                assert torch.equal(got, wanted)
    for got, wanted in zip(step(**made_there), expected, strict=True):  # and outside of it
        assert torch.equal(got, wanted)


def test_a_mode_sees_the_step(given):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        results = step(**given)
    assert torch.ops.ssu_bridge.update.default in seen
    for got, wanted in zip(results, step(**tensors()), strict=True):
        assert torch.equal(got, wanted)


def test_fake_tensors_in_their_mode_have_the_shapes_of_the_results(given):
    with FakeTensorMode() as mode:
        results = step(**{name: mode.from_tensor(tensor) for name, tensor in given.items()})
    for got, wanted in zip(results, step(**given), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


def differentiated(trace):
    """A function of a step's state and x, of which x requires grad, that ``trace`` turns into a program."""
    return lambda a: trace(function, a["state"], a["x"].requires_grad_())


def compiled(**options):
    return differentiated(lambda f, *arrays: torch.compile(f, backend="eager", **options)(*arrays))


def made_by_fx(mode):
    return differentiated(lambda f, *arrays: make_fx(f, tracing_mode=mode)(*arrays))


def step_with_fake_tensors(a):
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in a.items()}
        step(**{**fake, "x": fake["x"].requires_grad_()})


def seed_that_was_not_drawn_yet(a):
    with ssu_bridge.using(stochastic_rounding=True):
        compiled(fullgraph=True)({**a, "state": a["state"].half()})


REFUSED_GRADIENTS = {
    "compiled": compiled(),
    "compiled, one graph": compiled(fullgraph=True),
    "compiled, symbolic sizes": compiled(fullgraph=True, dynamic=True),
    **{f"make_fx, {mode}": made_by_fx(mode) for mode in ("real", "fake", "symbolic")},
    "torch.jit.trace": differentiated(lambda f, *arrays: torch.jit.trace(f, arrays)),
    "FakeTensorMode": step_with_fake_tensors,
    "a seed to draw": seed_that_was_not_drawn_yet,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", REFUSED_GRADIENTS)
def test_a_traced_call_that_would_lose_a_gradient_is_refused_by_the_selected_backend(given, how):
    torch._dynamo.reset()
    held = given["state"].clone()
    # Dynamo has an error of its own for code that is to be one graph; it quotes the one raised there.
    errors = (ssu_bridge.UnsupportedError, torch._dynamo.exc.Unsupported)
    with pytest.raises(errors, match="x: it requires grad, but backend cpu has no gradient"):
        REFUSED_GRADIENTS[how](given)
    assert torch.equal(given["state"], held)


OF_SEVERAL_TOKENS = {
    "trees": Case("trees", tokens=4, steps=4, headdim=8, dstate=16, parents=((-1, 0, 0, 1),) * 3),
    "destinations": Case(
        "destinations", tokens=2, headdim=8, dstate=16, parents=((-1, -1),) * 3, destinations=((0, 1), (2, 3), (4, 5))
    ),
    "fresh": Case("fresh", tokens=2, headdim=8, dstate=16, has_initial_state=(True, False, False)),
    "strides": Case("strides", tokens=4, steps=2, headdim=8, dstate=16, intermediate_stride=2),
    "rounded each": Case("each", tokens=4, headdim=8, dstate=16, round_each_token=True, dtypes={"state": "bfloat16"}),
    "quantised": Case(
        "quantised", tokens=2, steps=2, headdim=8, dstate=16, parents=((-1, 0),) * 3, dtypes={"state": "int8"}
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", OF_SEVERAL_TOKENS)
def test_arguments_of_several_tokens_inside_compiled_code(what, compiler):
    assert_compiled(OF_SEVERAL_TOKENS[what], "torch", compiler)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mode", "form"), [("torch", "loop"), pytest.param("torch.cuda", "matrix", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("what", MATRIX_CASES)
def test_either_form_inside_compiled_code(what, mode, form):
    assert_compiled(MATRIX_CASES[what], mode, "aot_eager", algorithm=form)


def assert_compiled(case, mode, compiler, **flags):
    """Assert that a compiled call gives what an eager one does, and changes as much."""
    flags = {**case.flags, **flags}
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: ssu_bridge.update(**a, **flags), backend=compiler, fullgraph=True)
    given, held = (to_mode(case.arrays(seed=1), mode) for _ in range(2))
    results, expected = compiled(given), ssu_bridge.update(**held, **flags)
    for got, right in zip(pytree.tree_leaves(results), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(got, right)
    for got, right in zip(pytree.tree_leaves(given), pytree.tree_leaves(held), strict=True):
        assert (
            torch.equal(torch.nan_to_num(got), torch.nan_to_num(right))
            if got.is_floating_point()
            else torch.equal(got, right)
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_using_inside_compiled_code(backend):
    """The configuration in force is that of the blocks that are traced, and what they leave out that of the caller."""
    a = to_mode(ROUNDED.arrays(seed=1), "torch")
    flags = {**ROUNDED.flags, "rand_seed": 5}

    def rounded(a, config):
        with ssu_bridge.using(config), ssu_bridge.using(algorithm="simple"):
            inside = ssu_bridge.get_config()
            results = ssu_bridge.update(**a, **flags)
        return results, (inside.philox_rounds, str(inside.backend), inside.algorithm)

    torch._dynamo.reset()
    compiled = torch.compile(rounded, backend=backend, fullgraph=True)
    before, seen = ssu_bridge.get_config(), []
    for config in (ssu_bridge.SSUConfig(backend="reference", philox_rounds=7), ssu_bridge.SSUConfig(backend="cpu")):
        held = [{**a, "state": a["state"].clone()} for _ in range(2)]
        results, fields = compiled(held[0], config)
        expected, wanted = rounded(held[1], config)
        assert fields == wanted == (config.philox_rounds, str(config.backend), "simple")
        for got, right in zip(results, expected, strict=True):
            assert torch.equal(got, right)
        seen.append(results[1])
    assert not torch.equal(*seen)  # other rounds, other numbers
    assert ssu_bridge.get_config() == before


@pytest.mark.filterwarnings("ignore")
def test_numbers_of_a_configuration_are_constants_of_the_graph():
    """Others are compiled in again: Dynamo would make a variable of a number that differs between calls."""

    def configured(x, config, rounds, tile):
        with ssu_bridge.using(config), ssu_bridge.using(philox_rounds=rounds, triton_tile=tile):
            inside = ssu_bridge.get_config()
        return x + 1, (inside.backend.value, inside.philox_rounds, inside.triton_tile)

    torch._dynamo.reset()
    compiled = torch.compile(configured, backend="eager", fullgraph=True)
    for backend, rounds, tile in (("cpu", 7, None), ("cpu", 5, (16, 4)), ("reference", 3, (32, 4)), ("cpu", 7, None)):
        config = ssu_bridge.SSUConfig(backend=backend, philox_rounds=9, triton_tile=(8, 1))
        assert compiled(torch.ones(1), config, rounds, tile)[1] == (backend, rounds, tile)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("field", "wrong"), [("triton_tile", (1.5, 4)), ("philox_rounds", 2.5), ("philox_rounds", True), ("algorithm", "x")]
)
def test_a_wrong_field_is_named_in_compiled_code(field, wrong):
    a = tensors()
    held = a["state"].clone()

    def configured(a):
        with ssu_bridge.using(**{field: wrong}):
            return step(**a)

    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"{field}: expected"):  # Dynamo wraps it
        torch.compile(configured, backend="eager", fullgraph=True)(a)
    assert torch.equal(a["state"], held)


@pytest.mark.filterwarnings("ignore")
def test_check_indices_is_refused_in_a_graph_and_works_in_code_that_is_not_one_graph():
    a = tensors()
    checked = lambda a: ssu_bridge.update(**a, **CASE.flags, check_indices=True)[0]  # noqa: E731
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="check_indices: expected False while Torch traces"):
        torch.compile(checked, backend="eager", fullgraph=True)(a)
    assert torch.equal(torch.compile(checked, backend="eager")(a), step(**tensors())[0])
