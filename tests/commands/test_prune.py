"""`zoo prune`: the table of a model, and what is refused before any work starts."""

import pytest

from zoo.cli import main


def test_shapes_lists_tensors_and_axes_layers_of_one_form_once(capsys):
    main(["prune", "vit_tiny_patch16_224/random", "--shapes"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any("blocks.#.attn.qkv.weight x12 │ 576 192 │ 3 h d, C" in line for line in lines)
    assert any("blocks.#.attn.d x12 │ 64 │ 3 │ no: scale" in line for line in lines)
    assert lines[-1] == "5,717,416 numbers in 152 tensors"


def test_shapes_of_an_unknown_class_or_model_end_with_one_line(capsys, tmp_path):
    for name, message in [
        ("beit_base_patch16_224/random", "tensors of Beit have no named shape"),
        ("no_such_model", "no_such_model is no folder and no registered model"),
        (str(tmp_path), "holds no model: config.json"),
    ]:
        with pytest.raises(SystemExit):
            main(["prune", name, "--shapes"])
        assert message in capsys.readouterr().err
