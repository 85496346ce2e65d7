"""Indices and headers of tensor files that lie: a named error each, before the values are looked at."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import toy_run
from tests.store.test_untrusted import refused
from treering.core.errors import CheckpointError
from treering.store.model_folder import INDEX, tensor_files
from treering.store.untrusted import read_header, read_json

NAMES = ["../x.safetensors", "/x.safetensors", "C:x", "a\\b", "a/b", "..", "", "x\0", "y" * 300]


@pytest.fixture
def model(tmp_path):
    return toy_run.folder(tmp_path / "model")


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_plain_files_only(model, name):
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    refused(model, INDEX, "only plain names", call=tensor_files)


def test_a_tensor_in_two_files_is_refused(model):
    for name in ("a.safetensors", "b.safetensors"):
        (model / name).write_bytes((model / "model.safetensors").read_bytes())
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    refused(model, "a.safetensors", "b.safetensors", call=tensor_files)


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(start: int, stop: int, **values) -> dict:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]} | values


HEADERS = {
    "a length of 2^63": framed(b"{}", length=2**63),
    "a length beyond the file": framed(b"{}", length=100),
    "overlap": framed(json.dumps({"a": entry(0, 8), "b": entry(4, 12)}).encode(), bytes(12)),
    "a hole": framed(json.dumps({"a": entry(0, 4), "b": entry(8, 12)}).encode(), bytes(12)),
    "a tail": framed(json.dumps({"a": entry(0, 4)}).encode(), bytes(12)),
    "outside": framed(json.dumps({"a": entry(0, 400)}).encode(), bytes(12)),
    "overflow": framed(json.dumps({"a": entry(0, 4, shape=[2**62] * 4)}).encode(), bytes(4)),
    "an unknown dtype": framed(json.dumps({"a": entry(0, 4, dtype="PY")}).encode(), bytes(4)),
    "twice": framed(b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
    "a key of an entry twice": framed(b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "deep": framed(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "nine million values": framed(b'{"a":[' + b"1," * (9 << 20) + b"1]}"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, kind):
    (tmp_path / "model.safetensors").write_bytes(HEADERS[kind])
    refused(tmp_path, "model.safetensors", call=tensor_files)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NUMBER = st.sampled_from([0, 1, 2, 4, 8, -1, 2**31, 2**63, 2**64]) | JSON
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F4", "BF16", "X"]) | JSON,
        "shape": st.lists(NUMBER, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBER, max_size=3) | JSON,
    },
)


HEADER = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRY | JSON, max_size=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=300)
@given(HEADER, st.binary(max_size=24))
def test_any_header_is_what_safetensors_reads_or_a_named_error(place, header, data):
    from safetensors import safe_open

    file = place / "x.safetensors"
    file.write_bytes(framed(json.dumps(header).encode(), data))
    try:
        names = [tensor.name for tensor in read_header(file)]
    except CheckpointError as error:
        assert "x.safetensors" in str(error)
        return
    with safe_open(file, "pt") as opened:
        assert sorted(opened.keys()) == names


@settings(max_examples=300)
@given(JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=4), st.text(max_size=6) | JSON)}))
def test_any_index_is_a_named_error(place, index):
    (place / INDEX).write_text(json.dumps(index))
    try:
        assert tensor_files(place) == {}
    except CheckpointError as error:
        assert str(place) in str(error)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_a_named_error(place, data):
    (place / "any.json").write_bytes(data)
    try:
        assert isinstance(read_json(place / "any.json"), dict)
    except CheckpointError as error:
        assert "any.json" in str(error)
