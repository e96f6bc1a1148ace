"""`distil-jax data list`: every source with its licence, and whether it is on and why."""

from distil_jax import cli
from distil_jax.data.catalogue import SOURCES


def test_the_table_has_every_source_with_licence_state_and_reason(capsys):
    assert cli.main(["data", "list"]) == 0
    said = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    first, why, name = {}, {}, ""
    for cells in lines:  # a cell that is folded goes on in a line whose first cell is empty
        name = cells[0] if cells[4] else name
        first.setdefault(name, cells)
        why[name] = f"{why.get(name, '')} {cells[5]}".strip()
    for source in SOURCES:
        assert first[source.name][2:5] == [
            source.licence,
            f"{source.rows:,}" if source.rows else "?",
            "on" if source.on else "off",
        ]
        assert why[source.name] == source.why
    assert "PubMedQA test" in said and "pubmedqa:pqa_labeled/train" in said


def test_another_word_is_told(capsys):
    assert cli.main(["data", "show"]) == 2
    assert "distil-jax data:" in capsys.readouterr().err
