"""Generation tags: a tag that is compiled in place writes, and marks, what transformers' does."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from treering.data.chat.conversation import trace
from treering.data.chat.template import RenderedText, Template
from treering.data.sources.records import SampleError

MESSAGES = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": " one two "},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "three"},
]
LOOP = (
    "{% set x = 'outer' %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<{% generation %}BODY{% endgeneration %}>{% else %}[{{ m.content }}]{% endif %}{{ x }}{% endfor %}{{ x }}"
)


def ours(template: str) -> RenderedText:
    return Template(source=template, variables={}).render(trace(MESSAGES, None).messages, None, "t.jsonl:1")


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content }}",
        "{{ m.content | trim }}{{ '\n' }}",
        "{{ m.content ~ loop.index }}",
        "{% set x = m.content %}{{ x }}{{ x | upper }}",
        "{% if x %}{% set x = 'inner' %}{% endif %}{{ x }}{{ m.content }}",
        "{% set y %}({{ m.content }}){% endset %}{{ y }}{{ y }}",
        "{% for word in m.content.split() %}{{ loop.index }}{{ word }}{% endfor %}",
        "{% for x in m.content.split() %}{% if x == 'two' %}{% break %}{% endif %}{{ x }}{% endfor %}{{ x }}",
        "{% macro say(x) %}{{ x }}!{% endmacro %}{{ say(m.content) }}",
        "{% filter trim %}{{ m.content }}{% endfilter %}",
        "{% with x = m.content %}{{ x }}{% endwith %}{{ x }}",
        "{{ caller is defined }}{{ kwargs is defined }}{{ varargs is defined }}{{ m.content }}",
        "",
    ],
)
def test_a_tag_has_the_text_and_the_range_that_transformers_gives_it(body):
    template = LOOP.replace("BODY", body)
    (text,), (ranges,) = render_jinja_template([MESSAGES], chat_template=template, return_assistant_tokens_mask=True)
    rendered = ours(template)
    assert rendered.text == text
    assert rendered.tags == [tuple(range) for range in ranges]


@pytest.mark.parametrize("wrapped", ["{% filter safe %}BODY{% endfilter %}", "{% set y %}BODY{% endset %}{{ y }}"])
def test_a_tag_whose_text_is_collected_first_is_where_it_is_written(wrapped):
    tag = "{% generation %}{{ m.content }}{% endgeneration %}"
    rendered = ours("{% for m in messages %}<" + wrapped.replace("BODY", tag) + ">{% endfor %}")
    assert [rendered.text[slice(*tag)] for tag in rendered.tags] == [m["content"] for m in MESSAGES]


def test_a_tag_inside_of_a_tag_is_refused():
    inner = "{% generation %}{{ m.content }}{% endgeneration %}"
    with pytest.raises(SampleError, match="generation tag"):
        ours(LOOP.replace("BODY", inner))


def test_a_tag_that_leaves_the_loop_is_refused_as_jinja_refuses_it():
    with pytest.raises(SampleError, match="loop"):
        ours(LOOP.replace("BODY", "{{ m.content }}{% break %}"))
