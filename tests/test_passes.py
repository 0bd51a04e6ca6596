import json
import math
from functools import partial

import pytest

from tests import processes

run = partial(processes.complete, "train.passes")


@pytest.mark.long
def test_tables(tmp_path):
    out = tmp_path / "out.json"
    result = run(
        *("--shapes", 2, 8, 8, 16, 1, 4, 4, 32, "--sizes", 128, 256),
        *("--rounds", 2, "--json", out),
    )
    assert result.returncode == 0, result.stderr
    tables = json.loads(out.read_text())
    rows = {row["pass"]: row for row in tables["passes"]}
    assert len(rows) == 14
    for row in rows.values():
        each = [row["2x8x8x16"], row["1x4x4x32"]]
        assert math.isclose(row["mean"], math.sqrt(math.prod(each)), rel_tol=1e-6)
    # Each single pass counted once, and the squeezes of one operand share their read.
    assert rows["sum: CBAM forward"]["least"] == 3
    assert rows["CBAM forward"]["least"] == 2
    assert rows["CBAM forward + backward"]["least"] == 6.5
    assert [row["maps"] for row in tables["convolutions"]] == [
        [16, 128, 128, 2],
        [4, 256, 256, 2],
    ]
    # The product's temporaries grow with the pixels, as the convolution's do: no
    # matrix of a side as long as a wide map's row.
    small, large = (row["product_temporaries"] for row in tables["convolutions"])
    assert large < 1.1 * small
    assert "Passes over the map" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sizes", 0), "`sizes` must be at least 1"),
        (("--rounds", 0), "`rounds` must be at least 1"),
        (("--shapes", 1, 0, 4, 4), "`shapes` must have axes of at least 1"),
    ],
)
def test_bad_options(arguments, says):
    result = run(*arguments)
    assert result.returncode == 2 and says in result.stderr
    assert "Traceback" not in result.stderr
