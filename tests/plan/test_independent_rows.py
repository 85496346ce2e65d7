"""A rank reads and splits its own experts, one at a time, and gets what one process gets from whole stacks."""

import dataclasses
import weakref
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import treering as tr
from tests.ranks import on_ranks
from tests.zoo import ARCHITECTURES, build, randomise, save
from treering.core.sharded import gather, local_rows
from treering.plan import draft, load, splitting
from treering.plan.open_model import on_meta
from treering.plan.prepared import Prepared
from treering.technique import Applied, Claim, Part, Stage
from treering.weights import plain_tensors
from treering.weights.quantized import opened

EXPERTS = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts"}


def stacked(arch, folder, experts=5):
    config = ARCHITECTURES[arch]()
    setattr(config, EXPERTS[arch], experts)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, 0)
    model.save_pretrained(folder)
    return folder


class Opened:
    """Stands for safe_open, and writes down which tensors of the file are read."""

    def __init__(self, real, log):
        self.real, self.log = real, log

    def __call__(self, path, framework):
        opened, log = self.real(path, framework), self.log

        class File:
            def __enter__(self):
                self.file = opened.__enter__()
                return self

            def __exit__(self, *error):
                return opened.__exit__(*error)

            def get_tensor(self, key):
                log.append(key)
                return self.file.get_tensor(key)

            def get_slice(self, key):
                return self.file.get_slice(key)

        return File()


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_stacked_experts_are_read_one_at_a_time(arch, tmp_path, monkeypatch):
    folder = stacked(arch, tmp_path / "m") if arch in EXPERTS else save(arch, tmp_path / "m")
    source = plain_tensors.from_folder(on_meta(folder, "auto"), folder)
    stacks = [tensor for tensor in source.tensors.values() if len(tensor.shape) == 3]
    assert len(stacks) == (2 if arch == "deepseek_v3" else 4)
    log = []
    monkeypatch.setattr(opened, "safe_open", Opened(opened.safe_open, log))
    for tensor in stacks:
        whole, experts = tensor.read(), tensor.shape[0]
        for start in range(experts + 1):
            for stop in range(start, experts + 1):
                log.clear()
                rows = tensor.rows(start, stop)
                assert rows.dtype == whole.dtype and torch.equal(rows, whole[start:stop])
                assert rows.shape == whole[start:stop].shape
                each = 2 if "gate_up" in tensor.name else 1
                assert len(log) == each * (stop - start)
                assert all(f".experts.{i}." in " ".join(log) for i in range(start, stop))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_of_every_tensor_are_those_of_the_whole(arch, tmp_path):
    folder = save(arch, tmp_path / "m")
    source = plain_tensors.from_folder(on_meta(folder, "auto"), folder)
    for group in source.groups:
        for name in group:
            tensor = source.tensors[name]
            if tensor.row_reader is not None and tensor.shape:
                third = tensor.shape[0] // 3
                assert torch.equal(tensor.rows(third, 2 * third + 1), tensor.read()[third : 2 * third + 1]), name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """A LazyTensor that knows which rows were read of it, and how many bytes of them are alive at most."""

    tensor: plain_tensors.PlainTensor
    rows_read: list
    alive: dict

    name = property(lambda self: self.tensor.name)
    shape = property(lambda self: self.tensor.shape)
    dtype = property(lambda self: self.tensor.dtype)
    stored = None

    start = 0

    def read(self):
        return self._counted(self.tensor.read(), 0, self.shape[0] if self.shape else 1)

    def rows(self, start, stop):
        return self._counted(self.tensor.rows(start, stop), start, stop)

    def _counted(self, value, start, stop):
        self.rows_read.extend(range(start, stop))
        size, alive = value.numel() * value.element_size(), self.alive
        alive["now"] += size
        alive["most"] = max(alive["most"], alive["now"])
        weakref.finalize(value, lambda: alive.update(now=alive["now"] - size))
        return value


def watched(plan):
    """The plan with a source that counts, and what was counted of its stacks."""
    alive = {"now": 0, "most": 0}
    tensors = {
        name: Reading(tensor=tensor, rows_read=[], alive=alive) if len(tensor.shape) == 3 else tensor
        for name, tensor in plan.source.tensors.items()
    }
    source = dataclasses.replace(plan.source, tensors=tensors)
    counted = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Reading)}
    return dataclasses.replace(plan, source=source), counted, alive


def whole_chains(plan):
    """The plan as it was if no part had independent rows."""
    chains = {
        name: dataclasses.replace(
            chain, parts=tuple(dataclasses.replace(part, independent_rows=False) for part in chain.parts)
        )
        for name, chain in plan.chains.items()
    }
    return dataclasses.replace(plan, chains=chains)


def moments(folder):
    model = on_meta(folder, "auto")
    measured = {}
    for name, value in plain_tensors.plain_tensors(model).items():
        if value.ndim < 2:
            continue
        lead = tuple(value.shape[:-2])
        x = torch.randn(*lead, 60, value.shape[-1], generator=torch.Generator().manual_seed(len(measured)))
        measured[name] = {"inputs": x.mT @ x / 60, "tokens": torch.full(lead, 60)}
    return measured


TECHNIQUES = {
    "full": lambda: [tr.Full()],
    "lora": lambda: [tr.LoRA(rank=2)],
    "update by weights": lambda: [tr.OSFT(protect="weights", ratio=0.4, targets=("*.experts.*",))],
    "update by inputs, kept": lambda: [
        tr.OSFT(protect="inputs", ratio=0.4, targets=("*.experts.*",), keep_initial=True, unmeasured="freeze")
    ],
    "factors": lambda: [tr.OSFT(protect="weights", ratio=0.4, targets=("*.experts.*",), form="factors")],
    "forward": lambda: [tr.OSFT(protect="weights", ratio=0.4, targets=("*.experts.*",), form="forward")],
}


def loaded(folder, case, prepared, whole=False):
    """Every live tensor, gathered, and what was read of the stacks."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    statistics = moments(folder) if "inputs" in case else None
    plan = draft(folder, TECHNIQUES[case]() + ([tr.Shard()] if several else []), statistics=statistics)
    if whole:
        plan = whole_chains(plan)
    plan, counted, alive = watched(plan)
    run = load(plan, statistics=statistics, prepared=prepared)
    live = run.plan.live()
    spans = {name: local_rows(value) for name, value in live.items()}
    errors = {name: error for name, error in run.lost.items() if name in counted}
    rows = {name: (tensor.rows_read, _span(name, spans)) for name, tensor in counted.items()}
    return {name: gather(value).clone() for name, value in live.items()}, errors, rows, alive["most"]


def _span(name, spans):
    """The rows of a stack that this rank holds, as they are, or as another tensor of its module."""
    own = name if name in spans else next(n for n in spans if n.startswith(name.rpartition(".")[0]))
    return spans[own]


def one_expert(arch, folder):
    tensors = plain_tensors.from_folder(on_meta(folder, "auto"), folder).tensors.values()
    return max(torch.Size(t.shape[1:]).numel() * t.dtype.itemsize for t in tensors if len(t.shape) == 3)


@pytest.mark.parametrize("case", TECHNIQUES)
@pytest.mark.parametrize("arch", EXPERTS)
def test_pieces_are_bit_for_bit_what_the_whole_is(arch, case, tmp_path):
    folder = stacked(arch, tmp_path / "m")
    wanted, errors, _, _ = loaded(folder, case, None, whole=True)
    for prepared in (None, tmp_path / "prepared", tmp_path / "prepared"):
        found, others, rows, most = loaded(folder, case, prepared)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
        assert others == pytest.approx(errors, rel=1e-4, abs=1e-12)
        assert rows and most <= one_expert(arch, folder)


@pytest.mark.parametrize("world, experts", [(2, 5), (3, 5), (3, 4)])
@pytest.mark.parametrize("case", ["full", "update by inputs, kept", "factors"])
def test_a_rank_reads_and_splits_its_own_experts(case, world, experts, tmp_path):
    arch = "qwen3_moe" if world == 3 else "mixtral"
    folder = stacked(arch, tmp_path / "m", experts)
    wanted = loaded(folder, case, None, whole=True)[0]
    for prepared in (None, tmp_path / "prepared"):
        for found, _, rows, most in on_ranks(world, loaded, folder, case, prepared):
            for name, value in wanted.items():
                assert torch.equal(found[name], value), name
            assert most <= one_expert(arch, folder)
            for name, (read, (start, stop)) in rows.items():
                assert set(read) == set(range(start, stop)), f"{name}: {read} of {start}:{stop}"


MATRIX = "model.layers.0.mlp.up_proj"  # 48 rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves:
    """Stores a matrix as two halves; `log` holds the number of rows that each split was given."""

    log: list = dataclasses.field(default_factory=list)
    short: int = 0  # rows that one half lacks, although it says that rows are independent

    stage: ClassVar[Stage] = Stage.ADAPT

    def claims(self, anatomy, mesh):
        return [Claim(fqn=f"{MATRIX}.weight", aspect="storage", setting="halves")]

    def apply(self, model, site):
        module = model.get_submodule(MATRIX)
        rows, columns = module.weight.shape
        del module.weight
        for half, number in (("left", rows), ("right", rows - self.short)):
            module.register_parameter(half, torch.nn.Parameter(torch.empty(number, columns, device="meta")))
        module.forward = lambda x: x @ (module.left + module.right).T
        left, right = f"{MATRIX}.left", f"{MATRIX}.right"

        def split(weight, below, statistics):
            self.log.append(weight.shape[0])
            return {left: weight.read() * 0.25, right: weight.read() * 0.75}

        part = Part(
            names=(left, right),
            split=split,
            join=lambda tensors, below: below + tensors[left] + tensors[right],
            keeps_base=False,
            independent_rows=True,
        )
        return Applied(trainable=(left, right), parts={f"{MATRIX}.weight": part})


def halved(folder, prepared, at_once):
    splitting.AT_ONCE = at_once
    halves = Halves()
    sharding = [tr.Shard()] if dist.is_initialized() else []
    run = tr.compose(folder, [halves, *sharding], prepared=prepared)
    left = run.model.get_parameter(f"{MATRIX}.left")
    return gather(left).clone(), halves.log, local_rows(left), run.lost


@pytest.mark.parametrize("world", [2, 3])
def test_rows_of_a_matrix_are_split_some_at_a_time(world, tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "AT_ONCE", splitting.AT_ONCE)
    folder = save("llama", tmp_path / "m")
    seven = 7 * 32 * 4  # rows of 32 float32
    wanted, log, _, errors = halved(folder, None, 1 << 20)
    assert log == [48]
    assert halved(folder, tmp_path / "one", seven)[1] == [7] * 6 + [6]
    for found, log, (start, stop), others in on_ranks(world, halved, folder, None, seven):
        assert torch.equal(found, wanted) and sum(log) == stop - start and max(log) == 7
        assert others == pytest.approx(errors, abs=1e-7)
    results = on_ranks(world, halved, folder, tmp_path / "several", seven)
    assert sorted(n for _, log, _, _ in results for n in log) == [6] + [7] * 6, "each piece once, by one rank"
    for found, log, (start, stop), _ in results:
        assert torch.equal(found, wanted) and abs(sum(log) - (stop - start)) < 7
    for found, log, _, _ in on_ranks(world, halved, folder, tmp_path / "one", seven):
        assert torch.equal(found, wanted) and not log, "what one process prepared is found"


def test_a_part_whose_tensors_have_other_rows_is_a_mistake_of_its_technique():
    with pytest.raises(
        AssertionError, match=r"up_proj.weight have independent rows, and .*right does not have the 48 rows"
    ):
        tr.compose(build("llama"), [Halves(short=1)])


def test_a_result_of_before_the_norm_was_kept_is_still_read(tmp_path):
    folder = save("llama", tmp_path / "m")
    pissa = [tr.LoRA(rank=2, init="pissa", targets=("q_proj",))]
    errors = dict(tr.compose(folder, pissa, prepared=tmp_path / "prepared").lost)
    store = Prepared(tmp_path / "prepared")
    for path in (tmp_path / "prepared").iterdir():
        tensors = load_file(path)
        store.write(path.stem, tensors | {"lost": tensors["lost"][:1].clone()})
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prepared").iterdir()}
    assert dict(tr.compose(folder, pissa, prepared=tmp_path / "prepared").lost) == errors
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prepared").iterdir()} == files


def needs_a_folder(folder):
    with pytest.raises(tr.PlanError, match="a folder for prepared tensors is needed"):
        tr.compose(folder, [tr.OSFT(protect="weights", ratio=0.4), tr.Shard()])


def test_weights_whose_rows_depend_on_each_other_still_need_a_folder(tmp_path):
    on_ranks(2, needs_a_folder, stacked("mixtral", tmp_path / "m"))


def test_results_of_two_ranks_are_found_by_three_and_by_one(tmp_path):
    folder = stacked("mixtral", tmp_path / "m")
    on_ranks(2, loaded, folder, "factors", tmp_path / "prepared")
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prepared").iterdir()}
    assert len(files) == 4 * 5
    on_ranks(3, loaded, folder, "factors", tmp_path / "prepared")
    loaded(folder, "factors", tmp_path / "prepared")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prepared").iterdir()} == files
