"""The readers of JSON and arrays: a value of the stated type, or an error that names the file."""

import json
import random
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zoo.files import (
    checked,
    checked_fields,
    json_items,
    load_tensors,
    near,
    read_arrays,
    read_json,
    save_tensors,
)


class Sizes(TypedDict):
    name: str
    sizes: list[int] | None


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff", b"{", b"1" * 5000, b"", b"\x00{}"])
def test_what_is_no_json_is_refused_by_the_name_of_its_file(text, tmp_path):
    file = tmp_path / "index.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=r"index\.json (is not JSON|cannot be read)"):
        read_json(file)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("[1]", "list is not a dict"),
        ('{"name": "a"}', 'missing required key.*"sizes"'),
        ('{"name": 3, "sizes": null}', "key 'name'"),
        ('{"name": "a", "sizes": [1, 2.5]}', "item 1 is not an instance of int"),
    ],
)
def test_a_json_value_of_another_type_is_refused_by_its_place(value, complaint, tmp_path):
    file = tmp_path / "index.json"
    file.write_text(value)
    with pytest.raises(ValueError, match=rf"index\.json has another form.*{complaint}"):
        read_json(file, Sizes)


def test_a_json_value_of_the_right_type_is_returned_as_it_is(tmp_path):
    file = tmp_path / "index.json"
    file.write_text('{"name": "a", "sizes": [1, 2]}')
    assert read_json(file, Sizes) == dict(name="a", sizes=[1, 2])
    assert checked(1, float, "lr") == 1


def test_a_json_file_beyond_the_bound_is_not_read(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(" " * 100 + "{}")
    with pytest.raises(ValueError, match=r"config\.json has 102 bytes; at most 50"):
        read_json(file, dict[str, Any], most=50)


@pytest.mark.parametrize("damage", [slice(0, 60), slice(40, None), slice(0, 0)])
@pytest.mark.parametrize("name", ["some.npz", "some.npy"])
def test_a_damaged_file_of_arrays_is_refused_by_name(name, damage, tmp_path):
    file = tmp_path / name
    np.savez(file, a=np.arange(9)) if name.endswith("z") else np.save(file, np.arange(9))
    file.write_bytes(file.read_bytes()[damage])
    with pytest.raises(ValueError, match=f"{name} holds no readable arrays"):
        read_arrays(file)


def test_arrays_are_read_by_name_and_python_objects_are_not(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.eye(2))
    assert set(read_arrays(tmp_path / "a.npz")) == {"x", "y"}
    np.save(tmp_path / "a.npy", np.arange(3))
    assert read_arrays(tmp_path / "a.npy")[""].tolist() == [0, 1, 2]
    np.save(tmp_path / "o.npy", np.array([None], object))
    with pytest.raises(ValueError, match=r"o\.npy holds no readable arrays"):
        read_arrays(tmp_path / "o.npy")


TENSORS = dict(
    whole=torch.arange(6).reshape(2, 3), half=torch.randn(5, dtype=torch.bfloat16),
    one=torch.tensor(2.0), mask=torch.tensor([True, False]), none=torch.empty(0, 3),
)  # fmt: skip


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_a_flipped_byte_anywhere_in_a_file_of_tensors_is_harmless_or_refused(tmp_path):
    file = tmp_path / "some.safetensors"
    save_tensors(TENSORS, file)
    content, draw = file.read_bytes(), random.Random(0)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            assert_same(load_tensors(file), TENSORS)  # as when the name of the checksum is hit
            assert place < len(content) - 20  # never in the data
        except ValueError as error:
            assert "some.safetensors is" in str(error)


def test_tensors_come_back_also_from_files_that_had_no_checksum_yet(tmp_path):
    file = tmp_path / "some.safetensors"
    save_file(TENSORS, file)
    assert_same(load_tensors(file), TENSORS)


@pytest.mark.parametrize("text", [b"", b"\xff" * 64, None])
def test_what_holds_no_tensors_is_refused_by_name(tmp_path, text):
    file = tmp_path / "some.safetensors"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(ValueError, match=r"some\.safetensors is not a readable safetensors file"):
        load_tensors(file)


@dataclass
class Row:
    name: str
    values: dict[str, float | None]
    seed: int = 0


def test_a_json_object_becomes_a_dataclass_or_its_wrong_field_is_named():
    assert checked_fields(Row, dict(name="a", values={"x": 1}), "line 1").values == {"x": 1}
    for wrong, said in (
        (dict(name="a"), "line 1 is no Row: .*values"),
        (dict(name="a", values={}, size=1), "line 1 has a field 'size'"),
        (dict(name="a", values={"x": "1"}), "line 1, field values, has another form"),
        (dict(name=None, values={}), "line 1, field name, has another form"),
    ):
        with pytest.raises(ValueError, match=said):
            checked_fields(Row, wrong, "line 1")


ITEMS = [
    {"a": "é\n\"]},{", "b": [1, 2.5, -1e-3, None]}, {}, {"ü": {"x": [[]]}}, 12, 1.25, "[", [True],
]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_read_by_pieces_is_what_the_library_reads_at_once(encoding, indent, tmp_path):
    file = tmp_path / "list.json"
    for items in (ITEMS, ITEMS[:1], []):
        file.write_bytes(f" {json.dumps(items, indent=indent)}\r\n".encode(encoding))
        for chunk in (1, 2, 3, 7, 1000):
            assert (
                list(json_items(file, Any, chunk=chunk)) == json.loads(file.read_bytes()) == items
            )


def test_a_broken_list_is_refused_wherever_the_library_refuses_it(tmp_path):
    file, whole, draws = tmp_path / "list.json", json.dumps(ITEMS).encode(), random.Random(0)
    refused = 0
    for _ in range(400):
        at = draws.randrange(len(whole))
        text = draws.choice(
            [whole[:at], whole[:at] + b"]" + whole[at:], whole[:at] + whole[at + 1 :], whole + b"x"]
        )
        file.write_bytes(text)
        try:
            expected = json.loads(text)
        except ValueError:
            expected = None
        if isinstance(expected, list):
            assert list(json_items(file, Any, chunk=5)) == expected
            continue
        refused += 1
        with pytest.raises(ValueError, match=r"list\.json is not JSON at entry \d+: .+\."):
            list(json_items(file, Any, chunk=5))
    assert refused > 100


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}, {"b": ]', r"entry 1: Expecting value \(char 17\)"),
        ('[{"a": 1} {"b": 2}]', r"entry 0: a comma or \] is missing \(char 10\)"),
        ('{"a": 1}', r"entry 0: it is no list \(char 0\)"),
        ('[{"a": 1}, 2]', "entry 1"),
        ('[{"a": 1}, ' + "[" * 100_000, r"entry 1: it is nested too deeply \(char 11\)"),
        ('[{"a": 1}, ' + "1" * 5000 + "]", "entry 1: Exceeds the limit"),
        ('[{"a": 1}, ]', "entry 1: Expecting value"),
    ],
)
def test_the_place_where_a_list_is_broken_is_named(text, says, tmp_path):
    file = tmp_path / "list.json"
    file.write_text(text)
    for chunk in (4, 2**20):
        with pytest.raises(ValueError, match=says):
            list(json_items(file, chunk=chunk))


def test_a_similar_name_beside_a_missing_one_is_named(tmp_path):
    for name in ("photos", "runs", ".photo"):
        (tmp_path / name).mkdir()
    assert near(tmp_path / "photo") == f" Did you mean {tmp_path / 'photos'}?"
    assert near(tmp_path / "quite-other") == near(tmp_path / "nowhere" / "photos") == ""
    assert near(tmp_path / "genrated", ["generated"]) == " Did you mean generated?"
