"""What published templates do that trained the wrong tokens, or lost some, without a word."""

import itertools
import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.data.data_templates import CHATML, TEMPLATES
from treering.data.chat.messages import check_messages
from treering.data.config import Data
from treering.data.encode import Encoder, recipe
from treering.data.formats import Sample
from treering.data.sources.records import SampleError


def encode(tokenizer, messages, template=None, tools=None):
    tokenizer.chat_template, before = template or tokenizer.chat_template, tokenizer.chat_template
    try:
        encoder = Encoder(recipe(tokenizer, Data(train="t.jsonl", max_length=10_000), "messages"))
    finally:
        tokenizer.chat_template = before
    checked = check_messages(json.loads(json.dumps(messages)), "t.jsonl:1", columnar=False)
    (result,) = encoder.encode([Sample(kind="chat", where="t.jsonl:1", file=0, row=1, messages=checked, tools=tools)])
    if isinstance(result, SampleError):
        raise result
    return result[0]


def spans(tokenizer, document):
    pairs = zip(document.ids.tolist(), document.mask.tolist(), strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([id for id, _ in group]) for trained, group in groups if trained]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(arguments, name="add_up"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made):
    return {"role": "assistant", "content": "", "tool_calls": list(made)}


ANSWERS = [{"role": "tool", "content": "3"}, assistant("It is 3.")]


# 1. Calls that are left out


def test_a_second_call_of_the_same_tool_that_the_template_leaves_out_is_refused(tokenizers):
    both = calls(call({"a": 1}), call({"a": 2}))
    for name in ("channels", "llama"):
        with pytest.raises(SampleError, match=r"tool_calls\[1\].*leaves out the tool call 'add_up'"):
            encode(tokenizers[name], [user("Sum?"), both, *ANSWERS])
    document = encode(tokenizers["qwen"], [user("Sum?"), both, *ANSWERS])
    assert spans(tokenizers["qwen"], document)[0].count('"add_up"') == 2


def test_an_argument_that_the_template_leaves_out_is_refused(tokenizers):
    template = TEMPLATES["qwen"].replace("call.function.arguments | tojson", "call.function.arguments.a | tojson")
    encode(tokenizers["qwen"], [user("Sum?"), calls(call({"a": "one"})), *ANSWERS], template.replace(".a |", " |"))
    with pytest.raises(SampleError, match=r"arguments.*leaves out .* of a tool call"):
        encode(tokenizers["qwen"], [user("Sum?"), calls(call({"a": "one", "b": "two"})), *ANSWERS], template)


# 2. Thoughts that are left out

DROPPING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') }}")
BESIDE = CHATML.replace(  # a place for thoughts, for turns that call tools only
    "{{ m.content }}",
    "{% if m.tool_calls %}{{ m.reasoning_content }}{% endif %}{{ m.content }}",
)


def test_a_template_that_drops_the_last_thought_is_refused(tokenizer):
    thinking = [user("a?"), assistant("<think>\nhm\n</think>\n\nA.")]
    with pytest.raises(SampleError, match="leaves out the thought of the last turn, so the model would learn not to"):
        encode(tokenizer, thinking, DROPPING)
    with pytest.raises(SampleError, match=r"messages\[1\].reasoning_content: .*leaves out the thought of the last"):
        encode(tokenizer, [user("a?"), assistant("A.", reasoning_content="hm")], BESIDE)
    assert spans(tokenizer, encode(tokenizer, [user("a?"), assistant("A.")], DROPPING)) == ["A.<|im_end|>"]
    empty = [user("a?"), assistant("<think>\n\n</think>\n\nA.")]  # nothing was thought, so nothing is lost
    assert spans(tokenizer, encode(tokenizer, empty, DROPPING)) == ["A.<|im_end|>"]


def test_thoughts_of_earlier_turns_that_a_template_drops_are_counted(tokenizers):
    chat = [user("a?"), assistant("<think>\no\n</think>\nA."), user("b?"), assistant("B.", reasoning_content="n")]
    document = encode(tokenizers["qwen"], chat)
    assert document.thoughts == 1
    assert encode(tokenizers["qwen"], chat[2:]).thoughts == 0


def test_any_other_text_that_a_template_drops_is_refused(tokenizer):
    template = CHATML.replace("{{ m.content }}", "{{ m.content.split('---')[0] }}")
    with pytest.raises(SampleError, match="leaves out '---secret' of this message"):
        encode(tokenizer, [user("open---secret"), assistant("A.")], template)
    with pytest.raises(SampleError, match="leaves out '---secret' of this message"):
        encode(tokenizer, [user("open"), assistant("A.---secret")], template)


# 3. Arguments as a string of JSON, as OpenAI's clients write them

OPENAI = [user("Sum?"), calls(call('{"a": 1, "b": [2]}')), *ANSWERS]
STRINGS = TEMPLATES["qwen"].replace("{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}")
ITEMS = TEMPLATES["qwen"].replace(
    "{{ call.function.arguments | tojson }}",
    "{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
)
PRINTED = TEMPLATES["qwen"].replace("{{ call.function.arguments | tojson }}", "{{ call.function.arguments }}")


@pytest.mark.parametrize("given", ['{"a": 1, "b": [2]}', {"a": 1, "b": [2]}])
@pytest.mark.parametrize(
    ("template", "written"),
    [
        (TEMPLATES["qwen"], '"arguments": {"a": 1, "b": [2]}}'),
        (STRINGS, '"arguments": {"a": 1, "b": [2]}}'),
        (PRINTED, '"arguments": {"a": 1, "b": [2]}}'),
        (ITEMS, '"arguments": a=1;b=[2];}'),
    ],
    ids=["objects", "strings", "printed", "items"],
)
def test_arguments_are_written_once_whatever_the_template_expects(tokenizers, given, template, written):
    tokenizer = tokenizers["qwen"]
    document = encode(tokenizer, [OPENAI[0], calls(call(given)), *ANSWERS], template)
    assert written in spans(tokenizer, document)[0]


def test_no_content_beside_a_call_is_written_as_the_template_tests_for_it(tokenizers):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}<|im_start|>assistant\n"
        "{{ m.tool_calls[0].function.name }}<|im_end|>\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ '' + m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for message in (calls(call({})), {"role": "assistant", "content": None, "tool_calls": [call("")]}):
        document = encode(tokenizers["chatml"], [user("Sum?"), message, *ANSWERS], template)
        assert spans(tokenizers["chatml"], document)[0] == "add_up<|im_end|>"


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "1", '{"a": NaN}', '{"a": 1, "a": 2}', 7])
def test_arguments_that_are_no_object_are_refused_by_place(arguments):
    messages = [user("Sum?"), calls(call(arguments)), *ANSWERS]
    with pytest.raises(SampleError, match=r"messages\[1\].tool_calls\[0\].function.arguments: (is a string|must be)"):
        check_messages(messages, "t.jsonl:1", columnar=False)


# 4. A generation prompt that cannot be switched off

ALWAYS = (
    "{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{{ '<|head|>assistant<|/head|>\n\n' }}"
)
BY_INDEX = ALWAYS.replace("for m in messages", "for i in range(messages | length)").replace("m.", "messages[i].")
CHAT = [user("a?"), assistant("A."), user("b?"), assistant("B.")]


def test_a_generation_prompt_that_is_always_written_is_not_trained(tokenizer):
    document = encode(tokenizer, CHAT, ALWAYS)
    assert spans(tokenizer, document) == ["A.<|eot|>", "B.<|eot|>"]


def test_a_prompt_that_is_always_written_by_a_template_without_a_loop_over_messages_is_refused(tokenizer):
    with pytest.raises(SampleError, match="behind each conversation, which looks like the beginning of a next turn"):
        encode(tokenizer, CHAT, BY_INDEX)


def test_what_is_written_behind_every_conversation_is_not_trained(tokenizer):
    template = CHATML.replace("{% if add", "<|im_start|>system\nGo on.<|im_end|>\n{% if add")
    assert spans(tokenizer, encode(tokenizer, CHAT, template)) == ["A.<|im_end|>", "B.<|im_end|>"]


def test_turns_without_the_whole_generation_prompt_are_reported(tokenizers):
    assert encode(tokenizers["prefilled"], CHAT).unprompted
    assert not encode(tokenizers["chatml"], CHAT).unprompted


# 5. Control strings inside of arguments


@pytest.mark.parametrize("name", ["qwen", "channels", "llama"])
def test_a_control_string_in_an_argument_ends_nothing(tokenizers, name):
    tokenizer = tokenizers[name]
    ending = {"qwen": "<|im_end|>", "channels": "<|call|>", "llama": "<|eot|>"}[name]
    document = encode(tokenizer, [user("Sum?"), calls(call({"a": f"x{ending}y</tool_call>"})), *ANSWERS])
    first = spans(tokenizer, document)[0]
    assert f"x{ending}y</tool_call>" in first and first.endswith("}" + "\n</tool_call>" * (name == "qwen") + ending)
    harmless = encode(tokenizer, [user("Sum?"), calls(call({"a": "x"})), *ANSWERS])
    token = tokenizer.convert_tokens_to_ids(ending)
    assert document.ids.tolist().count(token) == harmless.ids.tolist().count(token)


def test_half_a_control_string_beside_the_template_s_is_not_taken_for_one(tokenizers):
    for name, tokenizer in tokenizers.items():
        plain = encode(tokenizer, [user("x"), assistant("y")])
        for half in ("<|im_", "<", "<|", "</", "<|im_start|"):
            document = encode(tokenizer, [user(f"x{half}"), assistant(f"y{half}")])
            special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
            kept = [[i for i in d.ids.tolist() if i in special] for d in (document, plain)]
            assert kept[0] == kept[1], (name, half)
            assert f"y{half}" in spans(tokenizer, document)[0]


# 6. Templates that look into the texts

GUARDED = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if '<|im_start|>' in m.content %}{{ raise_exception('no markup, please') }}{% endif %}",
)
ASKING = CHATML.replace("{{ m.role }}", "{{ 'tool' if m.content.startswith('<tool_response>') else m.role }}")


def test_a_template_sees_the_texts_as_they_are(tokenizer):
    with pytest.raises(SampleError, match="no markup, please"):
        encode(tokenizer, [user("a<|im_start|>b"), assistant("A.")], GUARDED)
    document = encode(tokenizer, [user("<tool_response>1</tool_response>"), assistant("A.")], ASKING)
    assert tokenizer.decode(document.ids.tolist()).startswith("<|im_start|>tool\n<tool_response>1</tool_response>")


# 7. Tokenizers that put a space before every text


@pytest.fixture(scope="module")
def spaced():
    """One token a character, with `▁` before every text, as Llama 2's tokenizer."""
    letters = "▁abcdefghijklmnopqrstuvwxyz():=+0123456789\n.?<>|_"
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[], unk_token="?"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("def f", "(x):"), ("def f(x):", " return x"), ("a\n", "\nb"), ("2+2=", "4"), ("x", "<eos>y"), ("", "abc")],
)
def test_no_space_comes_between_a_prompt_and_its_completion(spaced, prompt, completion):
    encoder = Encoder(recipe(spaced, Data(train="t.jsonl"), "prompt"))
    sample = Sample(kind="completion", where="t.jsonl:1", file=0, row=1, prompt=prompt, text=completion)
    ((document,),) = encoder.encode([sample])
    assert spaced.decode(document.ids.tolist()) == f"{prompt}{completion}<eos>"
    trained = spaced.convert_ids_to_tokens(document.ids[document.mask].tolist())
    assert "".join(trained).replace("▁", " ").removesuffix("<eos>").endswith(completion.strip())
    if prompt:
        alone = spaced.encode(prompt, add_special_tokens=False)
        assert document.ids[: len(alone)].tolist() == alone  # as the prompt is tokenised at inference
        assert document.mask.tolist().index(True) == len(alone)
