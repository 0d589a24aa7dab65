"""What the README and the docs show is run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_the_docs_runs(block):
    exec(compile(block, "<docs>", "exec"), {})


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_the_tests_that_hold_a_promise_exist():
    named = re.findall(r"`((?:tests|tools)/[\w/.]+)", (ROOT / "docs/reliability.md").read_text())
    assert len(named) >= 15
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_commands_of_the_readme_exist():
    commands = re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(commands) == {"demo", "test"}
    for command in commands:
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
