"""The feature table of the docs: what backends say, and that they refuse nothing else."""

import tomllib
from pathlib import Path

import pytest
from modes import GPU_PAIRS, PAIRS, framework

from feature_table import COLUMNS, problem_of, supports, table
from ssu_bridge.backends.base import Feature, features
from ssu_bridge.config import Backend
from ssu_bridge.dispatch import module
from ssu_bridge.testing.cases import CASES

# The backends with the frameworks that they take arrays of.
SERVED = sorted({(Backend.parse(backend), framework(mode)) for mode, backend in (*PAIRS, *GPU_PAIRS)})


def test_the_docs_have_it():
    page = Path(__file__).parents[2] / "docs" / "how-to" / "choosing-a-backend.md"
    assert f"\n\n{table()}\n\n" in page.read_text()


def test_every_feature_has_a_case():
    for backend in COLUMNS:
        assert [feature for feature, _ in supports(backend)] == [*Feature]


def test_every_backend_of_the_table_is_asked():
    assert {backend for backend, _ in SERVED} == {*COLUMNS}


# What a test skips because a backend refuses it has to be what the table says, in every framework.
@pytest.mark.parametrize(("backend", "asking"), SERVED)
def test_a_backend_refuses_what_the_table_says_and_nothing_else(backend, asking):
    able = dict(supports(backend))
    for case in CASES:
        problem = problem_of(case, backend, asking)
        refusal = module(backend).refusal(problem)
        lacking = [feature for feature in features(problem) if not able[feature]]
        assert (refusal is None) == (not lacking), (case.name, refusal)
        assert all(feature in refusal for feature in lacking), (case.name, refusal)


# The contract skips what a backend refuses, so what it runs is written down apart from what it says of itself.
@pytest.mark.parametrize(("backend", "framework"), SERVED)
def test_a_backend_runs_the_cases_that_it_did(backend, framework):
    refused = tomllib.loads((Path(__file__).parent / "refused_cases.toml").read_text())
    names = [c.name for c in CASES if module(backend).refusal(problem_of(c, backend, framework)) is not None]
    assert names == refused[backend]
