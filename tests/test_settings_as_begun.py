"""A run that resumes keeps the defaults with which it began."""

import pytest

import treering as tr
from treering.core.settings import as_begun

OLD = repr(tr.OSFT(form="update")).replace(", precision='bfloat16'", "")  # as it was before there was a precision


def test_defaults_that_have_changed_are_those_of_the_run():
    assert as_begun(tr.OSFT(), OLD) == tr.OSFT(form="update", precision="float32")
    assert as_begun(tr.OSFT(), repr(tr.OSFT())).chosen_form == "merged"


def test_what_the_user_wrote_stays():
    written = tr.OSFT(form="one_sided", ratio=0.5)
    assert as_begun(written, OLD).form == "one_sided"
    assert as_begun(written, OLD).ratio == 0.5


ODD = ["", "OSFT(", "OSFT(form=)", "OSFT(form=3)", "OSFT(form=__import__('os'))", "OSFT(" * 9999]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_other_texts_change_nothing(text):
    assert as_begun(tr.OSFT(precision="float32"), text) == tr.OSFT(precision="float32")
