"""The table of the README: what backends say, and that they refuse nothing else."""

from pathlib import Path

import pytest

from ssu_bridge.__main__ import main
from ssu_bridge.backends.base import Feature, features
from ssu_bridge.cases import CASES
from ssu_bridge.choose import module
from ssu_bridge.support import COLUMNS, problem_of, supports, table


def test_the_readme_has_it(capsys):
    assert main(["info", "--table"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == table()
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"\n\n{printed}\n\n" in readme


def test_every_feature_but_trees_has_a_case():
    for backend in COLUMNS:
        assert [feature for feature, _ in supports(backend)] == [f for f in Feature if f is not Feature.TREES]


@pytest.mark.parametrize("backend", COLUMNS)
def test_a_backend_refuses_what_the_table_says_and_nothing_else(backend):
    able = dict(supports(backend))
    for case in CASES:
        problem = problem_of(case, backend)
        refusal = module(backend).refusal(problem)
        lacking = [feature for feature in features(problem) if not able[feature]]
        assert (refusal is None) == (not lacking), (case.name, refusal)
        assert all(feature in refusal for feature in lacking), (case.name, refusal)
