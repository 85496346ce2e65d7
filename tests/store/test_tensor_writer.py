"""Files written tensor by tensor: laid out beforehand, closed to readers until whole, and read again."""

import json

import pytest
import torch
from safetensors.torch import load_file

import treering as tr
from treering.store.model_folder import INDEX, tensor_files
from treering.store.tensor_writer import TensorWriter


def stored(folder):
    return {name: load_file(path)[name] for name, path in tensor_files(folder).items()}


def meta(tensors):
    return {name: value.to("meta") for name, value in tensors.items()}


def written(folder, tensors, **how):
    folder.mkdir(exist_ok=True)
    writer = TensorWriter(meta(tensors), **how)
    writer.open(folder)
    for name, value in tensors.items():
        writer.add(name, value)
    writer.close()
    writer.check()
    return writer


def test_the_writer_starts_a_new_file_at_its_limit(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each
    written(tmp_path, tensors, limit=80)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 200
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*sorted(set(index["weight_map"].values())), INDEX]
    assert all(torch.equal(stored(tmp_path)[name], value) for name, value in tensors.items())


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path):
    written(tmp_path, {"a": torch.ones(10), "b": torch.ones(10)}, limit=8)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and len(stored(tmp_path)) == 2


def test_tensors_of_every_kind_come_in_any_order_and_lie_aligned(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "turned": torch.randn(4, 3).T,
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }
    writer = TensorWriter(meta(tensors))
    writer.open(tmp_path)
    for name in reversed(tensors):
        writer.add(name, tensors[name])
    writer.close()
    writer.check()
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[n], v) and found[n].dtype == v.dtype for n, v in tensors.items())
    assert not [n for n, place in writer.places.items() if place.start % tensors[n].element_size()]


def test_a_file_cannot_be_opened_before_its_last_tensor_came(tmp_path):
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    writer = TensorWriter(meta(tensors))
    writer.open(tmp_path)
    writer.add("a", tensors["a"])
    with pytest.raises(tr.CheckpointError):
        tensor_files(tmp_path)
    with pytest.raises(tr.CheckpointError, match="b and 0 more tensors never came"):
        writer.close()
    with pytest.raises(tr.CheckpointError, match=r"came as torch\.float64"):
        writer.add("b", tensors["b"].double())
    with pytest.raises(tr.CheckpointError, match="none was announced"):
        writer.add("c", tensors["b"])


@pytest.mark.parametrize("place", ["header", "data", "end"])
def test_what_the_disk_changed_is_found_when_it_is_read_again(tmp_path, place):
    writer = written(tmp_path, {"a": torch.arange(64.0), "b": torch.arange(64.0)})
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    at = {"header": content.index(b'"b"') + 1, "data": writer.places["b"].start + 9, "end": len(content) - 1}[place]
    content[at] ^= 2
    path.write_bytes(content)
    with pytest.raises(tr.CheckpointError, match=r"model\.safetensors"):
        writer.check()
