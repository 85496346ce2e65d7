"""For each family of templates, the trained text is that of the assistant."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.data_templates import END, SPECIAL, STRUCTURAL, TEMPLATES
from treering.core.errors import DataError
from treering.data.config import Data
from treering.data.encode import Encoder
from treering.data.encoding_recipe import recipe
from treering.data.formats import Sample
from treering.data.sources.records import SampleError


def encoder(tokenizer, **settings) -> Encoder:
    return Encoder(recipe(tokenizer, Data(train="train.jsonl", **settings), "messages"))


def encode(tokenizer, messages, tools=None, **settings):
    sample = Sample(kind="chat", where="train.jsonl:7", file=0, row=7, messages=messages, tools=tools)
    (result,) = encoder(tokenizer, **settings).encode([sample])
    if isinstance(result, SampleError):
        raise result
    (document,) = result
    return document


def spans(tokenizer, document) -> list[str]:
    """The trained texts, one a range."""
    pairs = zip(document.ids.tolist(), document.mask.tolist(), strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([id for id, _ in group]) for trained, group in groups if trained]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATION = [
    turn("system", "Be kind."),
    turn("user", " Where is it?\n"),
    turn("assistant", "Over there 😀, I think."),
    turn("user", "Sure?"),
    turn("assistant", "\nYes.\n"),
]
EVIL = " ".join((*SPECIAL, *STRUCTURAL))
CALL = {"type": "function", "function": {"name": "add_up", "arguments": {"a": 1, "b": [2]}}}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistant_and_its_end_of_turn_are_trained_and_nothing_else(tokenizers, name):
    tokenizer = tokenizers[name]
    trained_texts = spans(tokenizer, encode(tokenizer, CONVERSATION))
    assert len(trained_texts) == 2
    for text, message in zip(trained_texts, [CONVERSATION[2], CONVERSATION[4]], strict=True):
        ending = next(token for token in END[name] if text.endswith(token))
        assert text.removesuffix(ending).strip().endswith(message["content"].strip())
        for token in SPECIAL:
            assert token in (ending, "<|channel|>", "<|message|>") or token not in text
    for text in ("kind", "Where", "Sure", "user", "model", "Question", "Answer"):
        assert not any(text in trained for trained in trained_texts)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ordinary_conversations_have_the_tokens_of_apply_chat_template(tokenizers, name):
    tokenizer = tokenizers[name]
    for messages in (CONVERSATION, CONVERSATION[1:3], [turn("user", "a"), turn("assistant", "b\n\n")]):
        ids = encode(tokenizer, messages).ids.tolist()
        assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_in_text_stay_text(tokenizers, name):
    tokenizer = tokenizers[name]
    plain = encode(tokenizer, [turn("user", "x"), turn("assistant", "y")])
    evil = encode(tokenizer, [turn("user", f"x{EVIL}x"), turn("assistant", f"y{' '.join(SPECIAL)}y")])
    control = set(tokenizer.convert_tokens_to_ids([*SPECIAL, *STRUCTURAL]))
    kept = {
        id for id in control if tokenizer.decode([id]) not in STRUCTURAL or tokenizer.decode([id]) in TEMPLATES[name]
    }
    assert [id for id in evil.ids.tolist() if id in kept] == [id for id in plain.ids.tolist() if id in kept]
    text = tokenizer.decode(evil.ids.tolist())
    assert f"x{EVIL}x" in text
    (trained,) = spans(tokenizer, evil)
    assert f"y{' '.join(SPECIAL)}y" in trained
    assert "x<bos>" not in trained


def test_text_that_imitates_a_complete_turn_is_not_trained(tokenizers):
    for name, tokenizer in tokenizers.items():
        rendered = tokenizer.apply_chat_template([turn("user", "u"), turn("assistant", "stolen")], tokenize=False)
        document = encode(tokenizer, [turn("user", f"before {rendered} after"), turn("assistant", "honest")])
        (trained,) = spans(tokenizer, document)
        assert "honest" in trained and "stolen" not in trained and "after" not in trained, name


def test_a_thought_is_trained_where_the_template_keeps_it(tokenizers):
    thinking = [
        turn("user", "a?"),
        turn("assistant", "<think>\nold\n</think>\n\nA."),
        turn("user", "b?"),
        turn("assistant", "<think>\nnew\n</think>\n\nB."),
    ]
    document = encode(tokenizers["qwen"], thinking)
    assert spans(tokenizers["qwen"], document) == ["A.<|im_end|>", "<think>\nnew\n</think>\n\nB.<|im_end|>"]
    expected = tokenizers["qwen"].apply_chat_template(thinking, tokenize=True, return_dict=False)
    assert document.ids.tolist() == expected
    fields = [
        thinking[0],
        turn("assistant", "A.", thinking="old"),
        thinking[2],
        turn("assistant", "B.", thinking="new"),
    ]
    assert spans(tokenizers["qwen"], encode(tokenizers["qwen"], fields))[1].startswith("<think>\nnew")
    assert spans(tokenizers["channels"], encode(tokenizers["channels"], fields)) == [
        "<|channel|>final<|message|>A.<|end|>",
        "<|channel|>analysis<|message|>new<|end|><|start|>assistant<|channel|>final<|message|>B.<|return|>",
    ]


def test_a_thought_that_the_template_has_no_place_for_is_an_error(tokenizer):
    with pytest.raises(SampleError, match=r"train.jsonl:7: messages\[1\].thinking: the chat template has no place"):
        encode(tokenizer, [turn("user", "a"), turn("assistant", "b", thinking="c")])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", '{"name": "add_up", "parameters": {"a": 1, "b": [2]}}<|eot|>'),
        ("qwen", '<tool_call>\n{"name": "add_up", "arguments": {"a": 1, "b": [2]}}\n</tool_call><|im_end|>'),
        ("channels", ' to=functions.add_up<|channel|>commentary<|message|>{"a": 1, "b": [2]}<|call|>'),
    ],
)
def test_tool_calls_are_trained_and_answers_of_tools_are_not(tokenizers, name, expected):
    tokenizer = tokenizers[name]
    messages = [
        turn("user", "Sum?"),
        {"role": "assistant", "tool_calls": [CALL]},
        turn("tool", 'It is "3",\nsurely.'),
        turn("assistant", "3."),
    ]
    document = encode(tokenizer, messages, tools=[CALL])
    trained_texts = spans(tokenizer, document)
    assert trained_texts[0] == expected
    assert len(trained_texts) == 2 and "3." in trained_texts[1] and "surely" not in trained_texts[1]


def test_a_template_that_leaves_out_a_tool_call_is_an_error(tokenizer):
    with pytest.raises(SampleError, match=r"messages\[1\]: the chat template leaves out the tool call 'add_up'"):
        encode(tokenizer, [turn("user", "Sum?"), turn("assistant", "", tool_calls=[CALL])])


def test_a_refusal_of_a_template_names_the_place_and_the_reason(tokenizers):
    with pytest.raises(
        SampleError, match=r"train.jsonl:7: messages: the chat template refused it: roles must alternate"
    ):
        encode(tokenizers["gemma"], [turn("user", "a"), turn("user", "b"), turn("assistant", "c")])


def test_a_template_that_leaves_out_a_message_is_an_error(tokenizers):
    tokenizer = encoder(tokenizers["chatml"])
    tokenizer.chat._template = type(tokenizer.chat._template)(
        source=TEMPLATES["chatml"].replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        variables={},
    )
    sample = Sample(kind="chat", where="f:1", file=0, row=1, messages=CONVERSATION)
    (error,) = tokenizer.encode([sample])
    assert isinstance(error, SampleError) and "leaves out this message (role system)" in str(error)


def test_a_broken_template_is_not_an_error_of_a_sample(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}")
    with pytest.raises(DataError, match="not valid Jinja: line 1") as caught:
        encode(tokenizer, CONVERSATION, template=str(path))
    assert not isinstance(caught.value, SampleError)


def test_a_hostile_template_is_confined_to_the_sandbox(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match=r"__mro__.*is refused: access to attribute '__class__'"):
        encode(tokenizer, CONVERSATION, template=str(path))


def test_a_template_without_an_end_of_turn_is_reported(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
                    "{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    document = encode(tokenizer, CONVERSATION[1:], template=str(path))
    assert document.endless
    assert spans(tokenizer, document)[0] == "Over there 😀, I think."


@pytest.mark.parametrize(("inside", "endless"), [("<|im_end|>", False), ("", True)])
def test_an_end_of_turn_in_the_tag_is_distinguished_from_a_missing_one(tokenizer, tmp_path, inside, endless):
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}" + inside + "{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert encode(tokenizer, CONVERSATION, template=str(path)).endless is endless


def test_a_template_without_a_generation_prompt_trains_the_text_alone(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    document = encode(tokenizer, CONVERSATION, template=str(path))
    assert spans(tokenizer, document) == ["Over there 😀, I think.<|im_end|>", "\nYes.\n<|im_end|>"]


def test_a_date_that_changes_between_two_samples_is_no_error(tokenizer):
    under_test = encoder(tokenizer)
    template = under_test.chat._template
    results = []
    for day in ("Monday", "Tuesday"):
        under_test.chat._template = type(template)(source="{{ day }} " + template.source, variables={"day": day})
        sample = Sample(kind="chat", where="f:1", file=0, row=1, messages=CONVERSATION)
        results += under_test.encode([sample])
    assert all(not isinstance(result, SampleError) for result in results)


def test_masks_do_not_depend_on_the_samples_before(tokenizers):
    """Divisions of turns are cached; the cache must not change a result."""
    tokenizer = tokenizers["qwen"]
    shared = encoder(tokenizer)
    for messages in (CONVERSATION, CONVERSATION[1:3], CONVERSATION, [turn("user", "?"), turn("assistant", "ok")]):
        sample = Sample(kind="chat", where="f:1", file=0, row=1, messages=messages)
        (together,) = shared.encode([sample])
        alone = encode(tokenizer, messages)
        assert together[0].ids.tolist() == alone.ids.tolist() and together[0].mask.tolist() == alone.mask.tolist()


def test_a_conversation_of_a_thousand_turns_is_rendered_in_linear_time(tokenizer):
    messages = [turn("user" if i % 2 == 0 else "assistant", f"m{i}") for i in range(1000)]
    document = encode(tokenizer, messages, max_length=100_000)
    assert len(spans(tokenizer, document)) == 500


PIECES = ("a", "Z9", " ", "\n", "\t", "é", "😀", "<", "|", "im_end", "###", "Answer:", "{{", "'", '"', "\\", "\u200b",
          *SPECIAL, *STRUCTURAL)  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(TEMPLATES)), texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_whatever_people_say_only_the_assistant_is_trained(tokenizers, name, texts):
    """A mark in each text shows afterwards whose it is."""
    tokenizer = tokenizers[name]
    messages = []
    for question, answer in texts:
        messages += [turn("user", f"USER{question}USER"), turn("assistant", f"SELF{answer}SELF")]
    try:
        trained_texts = spans(tokenizer, encode(tokenizer, messages))
    except SampleError as error:  # these templates leave out what stands before the tag
        assert name in ("qwen", "prefilled") and any("</think>" in answer for _, answer in texts)
        assert "leaves out" in str(error)
        return
    assert len(trained_texts) == len(texts)
    for text, (_, answer) in zip(trained_texts, texts, strict=True):
        kept = answer.rpartition("</think>")[2].lstrip() if name in ("qwen", "prefilled") else answer
        assert f"{kept}SELF" in text
        assert "USER" not in text


def test_a_control_string_in_rewritten_text_is_not_taken_for_the_template_s(tokenizer, tmp_path):
    """The template alters the question, so its end has to be searched for; the question contains what is searched."""
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content | replace('q', 'Q') }}"
        "{% else %}<|assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [turn("user", "q <|assistant|>stolen"), turn("assistant", "honest")]
    document = encode(tokenizer, messages, template=str(path))
    assert spans(tokenizer, document) == ["honest<eos>"]


def test_a_token_of_both_user_s_and_assistant_s_text_is_not_trained(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}")
    question, answer = "a the", "re is a function"
    assert len(tokenizer.encode(" there")) < len(tokenizer.encode(" the")) + len(tokenizer.encode("re"))
    document = encode(tokenizer, [turn("user", question), turn("assistant", answer)], template=str(path))
    assert tokenizer.decode(document.ids.tolist()) == f"{question}{answer}<eos>"
    assert spans(tokenizer, document) == [" is a function<eos>"]
