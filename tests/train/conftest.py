import pytest


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail; returns its one line of error."""

    def run(command, *arguments, code=2):
        with pytest.raises(SystemExit) as stop:
            command.main([str(a) for a in arguments])
        error = capsys.readouterr().err
        assert stop.value.code == code, error
        (line,) = error.splitlines()
        assert line.startswith(f"{command.__name__}: ")
        return line

    return run
