"""The command line of the GPU benchmark, as far as it goes without a GPU."""

import pytest

from ssu_bridge.bench.cuda import command


def test_ssd_without_prompts_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--ssd", "folder"])
    assert "--ssd: expected with --tokens or --prompts" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["--tokens", "--prompts"])
def test_ssd_goes_with_a_part_that_has_prompts(part, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(SystemExit):
        command.main([part, "--ssd", "folder"])
    assert "the GPU benchmark needs torch" in capsys.readouterr().err
