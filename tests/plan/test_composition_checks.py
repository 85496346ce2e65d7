"""What is asked of the techniques of a run together: a technique must serve every axis of the mesh."""

from dataclasses import dataclass

import pytest

import treering as tr
from tests.zoo import build
from treering.core import topology
from treering.core.topology import AXES
from treering.plan.conflicts import check_composition
from treering.technique import Claim


@dataclass(frozen=True)
class Axis:
    ranks: int

    def size(self) -> int:
        return self.ranks


class Mesh(dict[str, Axis]):
    """As much of a mesh as the check looks at."""


def mesh(*, expert: int = 1, **sizes: int) -> Mesh:
    ranks = Mesh({name: Axis(sizes.get(name, 1)) for name in AXES})
    if expert > 1:
        setattr(ranks, topology._VIEW, {"expert": Axis(expert)})
    return ranks


SPLIT = Claim(fqn="", aspect="attention", setting="toy")
SUM = Claim(fqn="w", aspect="sharding", setting="shard")


def test_a_mesh_whose_every_axis_is_served_is_accepted():
    check_composition([tr.Full()], [[]], mesh())
    check_composition([tr.Full()], [[SUM]], mesh(replicate=2, shard=2))
    check_composition([tr.Full()], [[SPLIT, SUM]], mesh(sequence=2))


@pytest.mark.parametrize(
    ("axes", "claims", "message"),
    [
        ({"shard": 2}, [], "no technique sums their gradients"),
        ({"replicate": 2}, [SPLIT], "no technique sums their gradients"),
        ({"sequence": 2}, [SUM], "no technique splits the sequence"),
        ({"sequence": 2}, [SPLIT], "no technique sums their gradients: add shard"),
        ({"sequence": 2, "expert": 2}, [SPLIT], "no technique sums their gradients: add shard"),
    ],
)
def test_an_axis_that_no_technique_serves_is_refused(axes, claims, message):
    with pytest.raises(tr.PlanError, match=message):
        check_composition([tr.Full()], [claims], mesh(**axes))


def test_experts_need_a_technique_that_assigns_them_in_a_frozen_run_too():
    check_composition([tr.Full()], [[SUM]], mesh(shard=2, expert=2))
    with pytest.raises(tr.PlanError, match="expert=2, and no technique assigns experts to ranks: add shard"):
        check_composition([], [[]], mesh(shard=2, expert=2), frozen=True)


def test_the_auxiliary_loss_of_a_router_is_refused_of_a_folder_and_of_a_live_model(tmp_path):
    model = build("qwen3_moe")
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path)
    for given in (str(tmp_path), model):
        with pytest.raises(tr.PlanError, match="Set output_router_logits to false"):
            tr.compose(given, [tr.LoRA(rank=2)])
