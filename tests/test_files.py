"""The readers of JSON and arrays: a value of the stated type, or an error that names the file."""

from typing import Any, TypedDict

import numpy as np
import pytest

from zoo.files import checked, read_arrays, read_json


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
