import json

from train import report

LINE = {
    "train_loss": 1.0,
    "test_loss": 2.0,
    "train_accuracy": 0.5,
    "test_accuracy": 0.25,
}


def write(folder):
    folder.mkdir(parents=True)
    lines = [json.dumps({"epoch": epoch, **LINE}) for epoch in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_curves_show_every_run(tmp_path):
    runs = [write(tmp_path / name) for name in ("a/first", "b/second")]
    figure = report.plot_curves({report.name_of(run): report.read(run) for run in runs})
    loss, accuracy = figure.axes
    labels = [line.get_label() for line in loss.lines]
    assert labels == ["first, test", "training", "second, test", "training"]
    assert list(loss.lines[0].get_ydata()) == [2, 2]
    assert list(accuracy.lines[0].get_ydata()) == [25, 25]
    assert report.name_of(runs[0] / "metrics.jsonl") == "first"


def test_command(tmp_path, capsys):
    runs = [write(tmp_path / name) for name in ("a/same", "b/same")]
    out = tmp_path / "out.png"
    report.main([*map(str, runs), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"Wrote {out}.\n"
