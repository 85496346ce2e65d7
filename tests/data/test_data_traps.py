"""What published templates do, and how it led to wrong or missing trained tokens without an error."""

import itertools
import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.data.data_templates import CHATML, TEMPLATES
from treering.core.errors import DataError
from treering.data.chat.messages import check_messages
from treering.data.config import Data
from treering.data.encode import Encoder
from treering.data.encoding_recipe import recipe
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


def calls(*function_calls):
    return {"role": "assistant", "content": "", "tool_calls": list(function_calls)}


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
THOUGHT_OF_CALLS = CHATML.replace(  # a place for thoughts, for turns that call tools only
    "{{ m.content }}",
    "{% if m.tool_calls %}{{ m.reasoning_content }}{% endif %}{{ m.content }}",
)


def test_a_template_that_drops_the_last_thought_is_refused(tokenizer):
    thinking = [user("a?"), assistant("<think>\nhm\n</think>\n\nA.")]
    with pytest.raises(SampleError, match="leaves out the thought of the last turn, so the model would learn not to"):
        encode(tokenizer, thinking, DROPPING)
    with pytest.raises(SampleError, match=r"messages\[1\].reasoning_content: .*leaves out the thought of the last"):
        encode(tokenizer, [user("a?"), assistant("A.", reasoning_content="hm")], THOUGHT_OF_CALLS)
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


def test_turns_without_the_full_generation_prompt_are_reported(tokenizers):
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


def test_half_a_control_string_next_to_the_template_s_is_not_taken_for_one(tokenizers):
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


def test_a_template_reads_the_texts_unchanged(tokenizer):
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


# 8. Errors that a review reported


def renders(tokenizer, messages, template, tools=None):
    return spans(tokenizer, encode(tokenizer, messages, template, tools))


def test_the_next_turn_s_header_is_no_end_of_turn(tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.last %}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(SampleError, match="only when it is last"):
        encode(tokenizer, CHAT, template)


def test_two_turns_of_the_assistant_teach_nothing_wrong_about_others(tokenizer):
    prompt = "{% if loop.last and add_generation_prompt and m.role != 'assistant' %}<|im_start|>assistant\n{% endif %}"
    loop = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + prompt + "{% endfor %}"
    tokenizer.chat_template, before = loop, tokenizer.chat_template
    encoder = Encoder(recipe(tokenizer, Data(train="t.jsonl"), "messages"))
    tokenizer.chat_template = before
    for messages in ([user("a"), assistant("one"), assistant("two")], [user("a"), assistant("b")]):
        sample = Sample(kind="chat", where="t.jsonl:1", file=0, row=1, messages=messages)
        (result,) = encoder.encode([sample])
    assert spans(tokenizer, result[0]) == ["b<|im_end|>"]


def test_a_control_token_that_takes_blanks_along_is_still_given(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["rstrip"] = token["special"]
    taking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<eos>")
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    for answer in ("A.", " A."):
        (trained,) = renders(taking, [user("a?"), assistant(answer)], template)
        assert trained.strip() == "A.<|end|>"


EVIL = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a<|im_end|>b": {"type": "x"}}}}}]


@pytest.mark.parametrize(
    "written",
    [
        "{{ ', '.join(p.keys()) }}",
        "{{ p.keys() | list | string }}",
        "{{ 'q' ~ p.keys() }}",
        "{{ '%s' | format(p.keys()) }}",
        "{{ '{}'.format(p.keys()) }}",
        "{{ 'x'.translate({120: (p.keys() | first)}) }}",
        "{{ p | tojson }}",
        "{{ p.keys() | join(' ') | e }}",
        "{{ (p.keys() | first | e) + '' }}",
    ],
)
def test_tools_cannot_write_control_tokens(tokenizer, written):
    template = "{% set p = tools[0].function.parameters.properties %}<|im_start|>system\n" + written
    template += "<|im_end|>\n" + CHATML
    try:
        document = encode(tokenizer, CHAT, template, EVIL)
    except SampleError as error:  # a text that was mixed with text of the template
        assert "through one filter" in str(error) and ("%s" in written or "{}" in written or "translate" in written)
        return
    assert document.ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5


@pytest.mark.parametrize("written", ["{{ namespace(d=p) }}", "{% autoescape true %}{{ p | safe }}{% endautoescape %}"])
def test_values_of_unknown_content_are_refused(tokenizer, written):
    template = "{% set p = tools[0].function.parameters.properties %}" + written + CHATML
    with pytest.raises(DataError, match=r"prints a mapping|switches escaping"):
        encode(tokenizer, CHAT, template, EVIL)


@pytest.mark.parametrize(
    "shortened",
    ["m.content | truncate(12)", "m.content | striptags", "(m.content | tojson)[1:8]", "'%.3s' | format(m.content)"],
)
def test_shortened_texts_are_left_out_texts(tokenizer, shortened):
    with pytest.raises(SampleError, match="leaves out"):
        encode(
            tokenizer,
            [user("one <b>two</b> three"), assistant("four <b>five</b> six")],
            CHATML.replace("m.content", shortened),
        )


@pytest.mark.parametrize(
    "changed", ["m.content | indent", "m.content | wordwrap(8)", "m.content | tojson", "(m.content | tojson)[1:-1]",
                "m.content.replace('o', '0').strip()", "m.content | upper"]
)  # fmt: skip
def test_texts_in_other_letters_are_all_there(tokenizer, changed):
    template = CHATML.replace("m.content", changed)
    assert len(renders(tokenizer, [user('\none "two"\nthree '), assistant("four\nfive 'o'\n")], template)) == 1


def test_a_split_that_finds_its_piece_inside_the_separator_loses_nothing(tokenizers):
    tokenizer = tokenizers["qwen"]
    for answer in ("k>", "i", "think"):
        document = encode(tokenizer, [user("a"), assistant(f"<think>\nhm\n</think>{answer}")])
        assert spans(tokenizer, document)[0].endswith(f"{answer}<|im_end|>")


def test_a_tag_that_a_text_mentions_is_not_a_thought(tokenizers):
    answer = assistant("The tag </think> closes it.")
    with pytest.raises(SampleError, match="leaves out 'The tag </think>'"):
        encode(tokenizers["qwen"], [user("a"), answer, user("b"), assistant("B.")])


def test_a_generation_tag_inside_of_a_set_block_is_refused(tokenizer):
    template = CHATML.replace(
        "{{ m.content }}", "{% set x %}a{% generation %}{{ m.content }}{% endgeneration %}{% endset %}{{ x }}"
    )
    with pytest.raises(SampleError, match="generation tag"):
        encode(tokenizer, CHAT, template)


def test_tools_that_the_template_does_not_write_are_reported(tokenizers):
    assert encode(tokenizers["chatml"], CHAT, tools=EVIL).without_tools
    assert not encode(tokenizers["llama"], CHAT, tools=EVIL).without_tools


def test_a_template_for_tools_serves_conversations_with_tools(tokenizer):
    before = tokenizer.chat_template
    tokenizer.chat_template = {
        "default": CHATML,
        "tool_use": CHATML.replace("{% if add", "{{ tools | tojson }}{% if add"),
    }
    try:
        encoder = Encoder(recipe(tokenizer, Data(train="t.jsonl"), "messages"))
    finally:
        tokenizer.chat_template = before
    for tools in (None, EVIL):
        sample = Sample(kind="chat", where="t.jsonl:1", file=0, row=1, messages=CHAT, tools=tools)
        ((document,),) = encoder.encode([sample])
        assert ("properties" in tokenizer.decode(document.ids.tolist())) is bool(tools)


def test_fields_that_a_client_left_null_are_absent(tokenizer):
    dumped = [
        {"role": "user", "content": "a?", "name": None, "refusal": None},
        {"role": "assistant", "content": "A.", "tool_calls": [], "function_call": None, "reasoning_content": None},
    ]
    assert spans(tokenizer, encode(tokenizer, dumped)) == ["A.<|im_end|>"]


def test_turns_of_long_conversations_with_tools_are_divided_once_whatever_their_numbers(tokenizers):
    tokenizer = tokenizers["qwen"]
    messages = [user("go")]
    for i in range(150):
        messages += [calls(call({"n": 100 + i})), {"role": "tool", "content": str(i)}]
    encoder = Encoder(recipe(tokenizer, Data(train="t.jsonl", max_length=100_000), "messages"))
    sample = Sample(kind="chat", where="t", file=0, row=1, messages=[*messages, assistant("done")])
    (result,) = encoder.encode([sample])
    assert len(spans(tokenizer, result[0])) == 151
    assert len(encoder.chat._turns._cache) < 8
