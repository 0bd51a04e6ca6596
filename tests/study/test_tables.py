from train.study.tables import format_table

ROWS = [
    {"block": "cbam", "shape": (2, 14, 14), "ms": 1.234, "n": 10},
    {"block": "se", "shape": [8], "ms": None, "n": 2},
]


def test_columns():
    assert format_table(ROWS).splitlines() == [
        "block    shape    ms   n",
        " cbam  2x14x14  1.23  10",
        "   se        8     -   2",
    ]


def test_markdown():
    assert format_table(ROWS, markdown=True).splitlines() == [
        "| block |   shape |   ms |  n |",
        "| ----: | ------: | ---: | -: |",
        "|  cbam | 2x14x14 | 1.23 | 10 |",
        "|    se |       8 |    - |  2 |",
    ]
