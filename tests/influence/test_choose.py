"""Which records are removed by number, share or score, and which choices are refused."""

import pytest

from tests.influence.tables import table
from treering.core.errors import ConfigError, DataError
from treering.influence.choose import RecordChoice, choose

SCORES = table([f"a:{i}" for i in range(8)], [3, -1, 0, -2, 5, -1, 0.5, -1])


@pytest.mark.parametrize(
    "choice, rows, ties",
    [
        ({"count": 1}, [3], 0),
        ({"count": 2}, [3, 1], 2),  # three have the score −1
        ({"count": 4}, [3, 1, 5, 7], 0),
        ({"share": 0.5}, [3, 1, 5, 7], 0),
        ({"share": 0.3}, [3, 1], 2),
        ({"score": 0.0}, [3, 1, 5, 7], 0),
        ({"score": -1.0}, [3], 0),
        ({"count": 2, "action": "keep"}, [3, 7, 5, 1, 2, 6], 0),
        ({"score": 0.0, "action": "keep"}, [3, 7, 5, 1, 2], 0),
        ({"share": 0.25, "action": "keep"}, [3, 7, 5, 1, 2, 6], 0),
        ({"count": 6, "action": "keep"}, [3, 7], 2),
        ({"count": 2, "side": "helpful"}, [4, 0], 0),
        ({"score": 0.5, "side": "helpful"}, [4, 0], 0),
        ({"score": 0.5, "side": "helpful", "action": "keep"}, [4, 0, 6], 0),
    ],
)
def test_the_most_harmful_are_removed_first(choice, rows, ties):
    chosen = choose(SCORES, RecordChoice(**choice))
    assert (chosen.rows.tolist(), chosen.ties) == (rows, ties)


@pytest.mark.parametrize(
    "choice, what",
    [
        ({"count": 8}, "everything"),
        ({"count": 1000}, "everything"),
        ({"share": 0.1}, "nothing"),
        ({"score": -9.0}, "nothing"),
        ({"score": 6.0}, "everything"),
        ({"score": 5.0, "action": "keep"}, "everything"),
        ({"score": -9.0, "action": "keep"}, "nothing"),
        ({"count": 8, "action": "keep"}, "nothing"),
    ],
)
def test_to_remove_nothing_or_everything_is_refused(choice, what):
    with pytest.raises(DataError, match=f"would remove {what}: 8 records have scores from -2 to 5"):
        choose(SCORES, RecordChoice(**choice))


def test_one_query_decides():
    with pytest.raises(DataError, match="has 2 queries; name one"):
        choose(table(["a:1", "a:2"], [[1, 2], [3, 4]]), RecordChoice(count=1))


@pytest.mark.parametrize(
    "choice, words",
    [
        ({}, "none of count, share and score given"),
        ({"count": 1, "share": 0.5}, "count and share given"),
        ({"count": 0}, "count is 0"),
        ({"share": 1.0}, "share is 1.0"),
        ({"share": float("nan")}, "share is nan"),
        ({"score": float("inf")}, "score is inf"),
    ],
)
def test_choices_that_say_nothing_are_refused(choice, words):
    with pytest.raises(ConfigError, match=words):
        RecordChoice(**choice)


def test_a_choice_in_words():
    assert RecordChoice(count=5).text == "remove the 5 most harmful"
    assert RecordChoice(share=0.015, action="keep").text == "keep the 1.5 % most helpful"
    assert RecordChoice(share=0.2).text == "remove the 20 % most harmful"
    assert RecordChoice(count=5, side="helpful").text == "remove the 5 most helpful"
    assert RecordChoice(score=2, side="helpful").text == "remove those with a score above 2"
    assert RecordChoice(score=-1e-3).text == "remove those with a score below -0.001"
