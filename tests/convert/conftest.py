"""The command, in this process."""

import pytest

from flax_attn import convert


# The command.
@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = convert.main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return run
