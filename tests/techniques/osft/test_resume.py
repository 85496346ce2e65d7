"""A run with bases goes on, on as many ranks or others, without decomposing anything again."""

import shutil

import pytest

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy_run import job
from treering.train.checkpoints.files import read

FORMS = {
    "update": tr.OSFT(protect="weights", ratio=0.4, keep_initial=True),
    "one_sided": tr.OSFT(protect="weights", ratio=0.4, form="one_sided"),
    "factors": tr.OSFT(protect="weights", ratio=0.4, form="factors"),
}


def trained(root, output, form):
    import treering.techniques.osft.protection.decompose as decompose
    from treering.techniques.osft.forward_factors import factored
    from treering.techniques.osft.protection import operators
    from treering.train import train

    counted, plain = [], decompose.svd

    def counting(W):
        counted.append(1)
        return plain(W)

    operators.svd = factored.svd = counting
    train(job(root, output, techniques=(FORMS[form], tr.Shard()), train={"steps": 8}))
    operators.svd = factored.svd = plain
    return len(counted)


def tensors(root, output):
    return {n: t.read() for n, t in read(root / output / "checkpoints" / "step-8").tensors.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_of_two_ranks_is_gone_on_with(form, tmp_path):
    job(tmp_path)  # makes the toys before several ranks look for them
    assert sum(on_ranks(2, trained, tmp_path, "whole", form)) == 14
    for ranks, tolerance in ((2, 0.0), (3, 1e-4), (1, 1e-4)):
        cut = f"cut-{ranks}"
        shutil.copytree(tmp_path / "whole", tmp_path / cut)
        shutil.rmtree(tmp_path / cut / "checkpoints" / "step-8")
        if form != "update":  # whose operators are in no checkpoint
            shutil.rmtree(tmp_path / cut / "prepared")

        assert sum(on_ranks(ranks, trained, tmp_path, cut, form)) == 0

        assert "resumes after step 5" in (tmp_path / cut / "metrics.jsonl").read_text()
        assert_all_same(tensors(tmp_path, cut), tensors(tmp_path, "whole"), tolerance)
