"""Reading foreign files: plain data comes through, code does not."""

import argparse
import enum
import functools
import os
import pathlib
import pickle
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zoo.weights import check_keys, read_checkpoint, read_state


class Precision(enum.Enum):
    HALF = "half"


class Stranger:
    def __init__(self):
        self.x = 1


class Opens:
    """A pickle of this would create a file when it is read carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class Runs(Opens):
    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


class Evaluates(Opens):
    def __reduce__(self):
        return (eval, (f"open({str(self.path)!r}, 'w')",))


WEIGHTS = {"a.weight": torch.arange(4.0), "b": torch.ones(2, dtype=torch.float16)}


@pytest.fixture
def save(tmp_path):
    def save(content, name="file.pth.tar", **how):
        torch.save(content, tmp_path / name, **how)
        return tmp_path / name

    return save


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_taken_off(save, wrapper, prefix):
    content = {prefix + key: value for key, value in WEIGHTS.items()}
    state = read_state(save({wrapper: content, "epoch": 3} if wrapper else content))
    torch.testing.assert_close(state, WEIGHTS)


def test_averaged_weights_are_preferred(save):
    path = save({"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}})
    assert read_state(path)["a"] == 1


def test_files_of_old_torch_and_safetensors_are_read(save, tmp_path):
    old = save({"state_dict": WEIGHTS}, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(read_state(old), WEIGHTS)
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    torch.testing.assert_close(read_state(tmp_path / "x.safetensors"), WEIGHTS)


def test_a_namespace_of_plain_contents_comes_back_as_a_dict(save):
    args = argparse.Namespace(
        model="vit_base_patch16_224",
        teachers=[dict(name="clip", use_summary=True), dict(name="sam", use_summary=False)],
        output=pathlib.Path("/data") / "run",
        dtype=torch.bfloat16,
        device=torch.device("cuda", 1),
        lr=np.float64(0.25),
        seed=np.int64(7),
        amp=np.bool_(True),
        nested=types.SimpleNamespace(sizes=(224, 432), kinds={"a", "b"}, span=range(3)),
        precision=Precision.HALF,
        nothing=None,
    )
    state, found = read_checkpoint(save({"state_dict": WEIGHTS, "args": args}))
    torch.testing.assert_close(state, WEIGHTS)
    assert found["teachers"] == args.teachers
    assert found["output"] == pathlib.PurePath("/data/run")
    assert (found["dtype"], found["device"]) == (args.dtype, args.device)
    assert (found["lr"], found["seed"], found["amp"]) == (0.25, 7, True)
    assert type(found["lr"]) is float
    assert found["nested"] == args.nested
    assert found["precision"] is Precision.HALF


def test_arguments_may_be_a_dict_and_may_be_absent(save):
    assert read_checkpoint(save({"model": WEIGHTS, "args": {"lr": 1}}))[1] == {"lr": 1}
    assert read_checkpoint(save(WEIGHTS))[1] == {}


@pytest.mark.parametrize("danger", [Opens, Runs, Evaluates])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_nothing_is_executed(save, tmp_path, danger, zipped):
    trace = tmp_path / "trace"
    args = argparse.Namespace(lr=1, hook=danger(trace))
    path = save({"state_dict": WEIGHTS, "args": args}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"could run code.*safetensors"):
        read_checkpoint(path)
    assert not trace.exists()


def test_the_same_pickle_would_have_acted_on_a_careless_reader(tmp_path):
    pickle.loads(pickle.dumps(Opens(tmp_path / "trace"))).close()
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "value", [Stranger(), print, functools.partial(print), np.arange(3), np.dtype("O")]
)
def test_classes_functions_and_arrays_are_refused(save, value):
    with pytest.raises(ValueError, match="refused"):
        read_checkpoint(save({"state_dict": WEIGHTS, "args": argparse.Namespace(value=value)}))


def test_a_refusal_names_what_the_file_asks_for(save):
    with pytest.raises(ValueError, match=r"it names .*Stranger"):
        read_checkpoint(save({"args": Stranger()}))


def test_a_file_cannot_change_an_enum(save):
    class Forged:
        def __reduce__(self):
            return (Precision, ("half",), {"_value_": "forged"})

    with pytest.raises(ValueError, match=r"refused.*Can only build"):
        read_checkpoint(save({"state_dict": WEIGHTS, "args": Forged()}))
    assert Precision.HALF.value == "half"


def test_reading_leaves_torchs_own_list_as_it_was(save):
    before = set(map(str, torch.serialization.get_safe_globals()))
    read_checkpoint(save({"model": WEIGHTS, "args": argparse.Namespace(p=pathlib.Path("x"))}))
    assert set(map(str, torch.serialization.get_safe_globals())) == before


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), {1: torch.ones(2)}])
def test_a_file_without_named_tensors_is_refused(save, content):
    with pytest.raises(ValueError, match="dict of tensors"):
        read_checkpoint(save(content))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_damaged_and_absent_files_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="no weight file"):
        read_checkpoint(tmp_path / name)
    torch.save(WEIGHTS, tmp_path / "whole")
    (tmp_path / name).write_bytes((tmp_path / "whole").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"damaged|not a readable"):
        read_checkpoint(tmp_path / name)


def test_differences_of_keys_are_listed_ten_of_each():
    wanted = {f"w{i:02d}": torch.ones(2) for i in range(13)} | {"same": torch.ones(3)}
    found = {f"g{i:02d}": torch.ones(2) for i in range(3)} | {"same": torch.ones(4)}
    with pytest.raises(ValueError) as error:
        check_keys(found, wanted, hint="Look again.")
    message = str(error.value)
    assert "13 missing: w00" in message
    assert "w09 and 3 more" in message
    assert "w10" not in message
    assert "3 extra: g00, g01, g02." in message
    assert "same (4,) for (3,)" in message
    assert message.endswith("Look again.")


def test_keys_that_may_be_absent_are_not_missed():
    check_keys(
        {"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, hint="", optional="b"
    )
