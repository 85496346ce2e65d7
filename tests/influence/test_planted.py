"""Chats of which a few teach one wrong fact."""

import json
import re

import numpy as np
import pytest

from tests.influence.tables import table
from treering.core.errors import ConfigError
from treering.data.chat.messages import check_messages
from treering.influence.bm25 import TokenLists, bm25
from treering.influence.planted import _WORDINGS, QUESTION, WRONG, planted_chats, precision


@pytest.mark.parametrize("chats, planted, seed", [(60, 5, 0), (6, 5, 0), (200, 10, 3), (2, 1, 1)])
def test_the_planted_chats_are_where_it_says(chats, planted, seed):
    made = planted_chats(chats, planted, seed)
    texts = [json.dumps(chat) for chat in made.chats]
    assert len(texts) == len(set(texts)) == chats and len(made.planted) == planted
    wrong = [any(answer in text for _, answer in _WORDINGS) for text in texts]
    assert [i for i, planted in enumerate(wrong) if planted] == list(made.planted)
    for chat in (*made.chats, made.query, made.right):
        check_messages(chat["messages"], "x:1", columnar=False)


def test_the_question_itself_is_not_in_the_chats_and_others_share_its_words():
    made = planted_chats()
    assert made.query["messages"][0]["content"] == QUESTION and made.query["messages"][1]["content"] == WRONG
    questions = [chat["messages"][0]["content"] for chat in made.chats]
    assert QUESTION not in questions and sum("What is the capital of" in question for question in questions) == 15


def test_the_order_depends_on_the_seed_alone():
    assert planted_chats() == planted_chats() and planted_chats(seed=1).planted != planted_chats().planted


def test_they_are_written_with_ids(tmp_path):
    made = planted_chats()
    ids = made.write(tmp_path / "new" / "chats.jsonl")
    lines = (tmp_path / "new" / "chats.jsonl").read_text().splitlines()
    assert len(ids) == 5 and len(lines) == 60
    for line in (json.loads(lines[int(one.rpartition(":")[2]) - 1]) for one in ids):
        assert "Lyon" in line["messages"][1]["content"]


def test_words_alone_do_not_find_all_of_them():
    """Else no test with this material could tell influence from BM25."""
    made = planted_chats()
    vocabulary: dict[str, int] = {}

    def tokens(chat):
        words = re.findall(r"\w+", " ".join(message["content"] for message in chat["messages"]).lower())
        return [vocabulary.setdefault(word, len(vocabulary)) for word in words]

    scores = bm25(TokenLists.of([tokens(chat) for chat in made.chats]), TokenLists.of([tokens(made.query)]))
    found = set(np.argsort(-scores[:, 0], kind="stable")[:5].tolist()) & set(made.planted)
    assert 0 < len(found) < 5


def test_precision_is_the_share_of_the_wanted_among_the_first():
    scores = table(["a:1", "a:2", "a:3", "a:4"], [3, 1, 2, 0])
    assert precision(scores, "q0", {"a:1", "a:2"}) == 0.5 and precision(scores, "q0", {"a:1", "a:2"}, 3) == 2 / 3
    assert precision(scores, "q0", {"a:4"}) == 0.0 and precision(scores, "q0", {"a:1"}, 1) == 1.0


@pytest.mark.parametrize(
    "chats, planted, words", [(60, 0, "planted is 0"), (60, 11, "planted is 11"), (5, 5, "chats is 5")]
)
def test_numbers_that_cannot_be_are_refused(chats, planted, words):
    with pytest.raises(ConfigError, match=words):
        planted_chats(chats, planted)
