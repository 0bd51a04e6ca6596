import json

import pytest

from train import report
from train.study.logs import labels_of

PARTS = ("test", "training")
LINE = {"train_loss": 1.0, "test_loss": 2.0}
LINE |= {"train_accuracy": 0.5, "test_accuracy": 0.25}


def write(folder):
    folder.mkdir(parents=True)
    lines = [json.dumps({"epoch": epoch, **LINE}) for epoch in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_curves_show_every_run(tmp_path):
    runs = [write(tmp_path / name) for name in ("a/first", "b/second")]
    lines = map(report.read, runs)
    figure = report.plot_curves(dict(zip(labels_of(runs), lines, strict=True)))
    loss, accuracy = figure.axes
    labels = [line.get_label() for line in loss.lines]
    assert labels == [f"{n}, {p}" for n in ("first", "second") for p in PARTS]
    assert list(loss.lines[0].get_ydata()) == [2, 2]
    assert list(accuracy.lines[0].get_ydata()) == [25, 25]
    assert labels_of([runs[0] / "metrics.jsonl"]) == ["first"]


def test_command(tmp_path, capsys):
    runs = [write(tmp_path / name) for name in ("a/same", "b/same")]
    out = tmp_path / "out.png"
    report.main([*map(str, runs), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"Wrote {out}.\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "got {run} (no metrics.jsonl in it)"),
        ("", "got {run} (no finished epoch)"),
        ("3", "got {run} (a line that is no JSON object: 3 is not an object)"),
        ("not JSON", "got {run} (a line that is no JSON object: "),
        ('{"epoch": 1}', "got {run} (a line without losses and accuracies)"),
    ],
)
def test_a_run_that_cannot_be_drawn(content, message, tmp_path, refused):
    run, out = tmp_path / "run", tmp_path / "out.png"
    run.mkdir()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    assert message.format(run=run) in refused(report, run, "--out", out)
    assert not out.exists()


def test_no_run_and_a_wrong_path(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "`runs` must be at least one workdir" in refused(report)
    assert "no (No such file or directory)" in refused(report, "no")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written(tmp_path, refused):
    run = write(tmp_path / "run")
    says = f"`out` must be a picture, got {tmp_path / 'a.nonsense'}; end its name with"
    assert says in refused(report, run, "--out", tmp_path / "a.nonsense")
    says = "`out` must be in a folder that exists"
    assert says in refused(report, run, "--out", tmp_path / "no" / "a.png")
