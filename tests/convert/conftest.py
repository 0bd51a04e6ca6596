import pytest

from flax_attn import convert


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """The command, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = convert.main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return run
