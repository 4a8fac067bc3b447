"""`zoo list`: a table that is read, not built, and that says what the built models say."""

import pytest

import zoo
from zoo.cli import main
from zoo.commands.model_table import build_facts, read_table

TABLE = read_table()


def test_the_table_holds_every_registered_model_and_no_other():
    assert sorted(TABLE) == zoo.list_models(), "run `make models.json`"


@pytest.mark.parametrize("name", TABLE)
def test_the_table_says_what_the_built_model_says(name):
    assert TABLE[name] == build_facts(name), "run `make models.json`"


def test_a_pattern_fits_names_with_and_without_their_tag(capsys):
    main(["list", "mambavision_t.*"])
    shown = capsys.readouterr().out
    assert "mambavision_t " in shown and "mambavision_s" not in shown and "in1k" in shown
    main(["list", "eradio_n?no"])
    assert "0.75 M" in capsys.readouterr().out
