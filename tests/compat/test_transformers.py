"""transformers decodes with the drop-in for mamba_ssm once it is installed under that name."""

import importlib
import importlib.metadata
import sys

import pytest
import torch
from transformer_families import FAMILIES, tiny

from ssu_bridge.compat import install_as_mamba_ssm, mamba_ssm

STEP = "mamba_ssm.ops.triton.selective_state_update"


@pytest.fixture
def calls(monkeypatch):
    """A list that gets an entry for each call of the drop-in."""
    made, real = [], mamba_ssm.repeated

    def repeated(*args):
        made.append(args)
        return real(*args)

    monkeypatch.setattr(mamba_ssm, "repeated", repeated)
    return made


@pytest.fixture
def modeling_mamba2():
    """The module of the family, imported by the tests that need it: it takes seconds."""
    return importlib.import_module("transformers.models.mamba2.modeling_mamba2")


@pytest.fixture(autouse=True)
def _quiet_and_on_one_thread():
    import transformers

    before, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the models are so small that threads cost more than they compute
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(before)


def greedy(model, count):
    prompts = torch.randint(3, 257, (2, 11), generator=torch.Generator().manual_seed(0))
    result = model.generate(
        prompts, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return result.sequences, torch.stack(result.logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_writes_the_same_tokens(family, calls):
    model = tiny(family)
    expected, logits = greedy(model, 64)
    assert expected.shape == (2, 75)
    assert not calls
    with install_as_mamba_ssm():
        tokens, got = greedy(model, 64)
    assert len(calls) in (63, 126)  # a layer or two, and all tokens but the first, which the prompt gives
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5)


def step(module):
    """Call a model's step as the model does, with more keywords than mamba_ssm's function has."""
    state, x, B = torch.zeros(2, 4, 8, 16), torch.ones(2, 4, 8), torch.ones(2, 1, 16)
    return module.mamba2_selective_state_update(state, x, x, -torch.ones(4, 8, 16), B, B, z=None, seq_idx=None, other=3)


def test_models_that_were_imported_before_and_after(calls, modeling_mamba2, monkeypatch):
    with install_as_mamba_ssm():
        step(modeling_mamba2)
        assert len(calls) == 1
        monkeypatch.delitem(sys.modules, modeling_mamba2.__name__)
        imported_now = importlib.import_module(modeling_mamba2.__name__)
        step(imported_now)
        assert len(calls) == 2
    step(imported_now)
    assert len(calls) == 2
    monkeypatch.undo()


def test_undoing_leaves_nothing():
    before = {name for name in sys.modules if name.startswith("mamba_ssm")}
    installed = install_as_mamba_ssm()
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    assert selective_state_update is mamba_ssm.selective_state_update
    with pytest.raises(ImportError, match="cannot import name 'Mamba2'"):
        from mamba_ssm import Mamba2  # noqa: F401
    with install_as_mamba_ssm():  # again: changes nothing, and undoes nothing
        pass
    assert importlib.import_module(STEP).selective_state_update is selective_state_update
    installed.close()
    assert {name for name in sys.modules if name.startswith("mamba_ssm")} == before
    with pytest.raises(ImportError):
        importlib.import_module(STEP)


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A package mamba_ssm, another module of which has imported the function by name."""
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "modules.py").write_text(f"from {STEP} import selective_state_update\n")
    (folder / "selective_state_update.py").write_text("def selective_state_update(state, x): return 'real'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
        del sys.modules[name]


@pytest.mark.usefixtures("real")
def test_the_real_package_is_kept_unless_forced():
    with pytest.raises(RuntimeError, match=r"mamba_ssm is installed, .* install_as_mamba_ssm\(force=True\)"):
        install_as_mamba_ssm()
    user = importlib.import_module("mamba_ssm.modules")
    with install_as_mamba_ssm(force=True):
        assert user.selective_state_update is mamba_ssm.selective_state_update
        assert importlib.import_module(STEP).selective_state_update is mamba_ssm.selective_state_update
        assert importlib.import_module("mamba_ssm.modules") is user
    assert user.selective_state_update(1, 2) == "real"
    assert importlib.import_module(STEP).selective_state_update(1, 2) == "real"


def test_an_older_transformers_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.13.1")
    with pytest.warns(RuntimeWarning, match=r"transformers 5\.13\.1 .* pip install 'transformers>=5\.16'"):
        installed = install_as_mamba_ssm()
    installed.close()


def test_a_function_that_cannot_be_replaced_is_named(modeling_mamba2, monkeypatch):
    class Func:  # what the package kernels makes of the function
        def __call__(self):
            raise AssertionError

    monkeypatch.setattr(modeling_mamba2, "mamba2_selective_state_update", Func())
    with pytest.warns(RuntimeWarning, match=r"modeling_mamba2: imported before, and the package kernels"):
        installed = install_as_mamba_ssm()
    with pytest.warns(RuntimeWarning, match="imported before"):
        installed.close()
