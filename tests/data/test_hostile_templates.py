"""Templates that would run without end, fill the memory or escape are refused in limited time, in any thread."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.data.data_templates import TEMPLATES
from tests.ranks import PATIENCE
from treering.core.errors import DataError
from treering.data.chat.conversation import trace
from treering.data.chat.template import Template

# name → template. Written as expressions where the text would be long.
REFUSED = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nest": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "mul": "{{ 'a' * 10**10 }}",
    "dbl": (
        "{% set ns=namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "dblp": (
        "{% set ns=namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "dag": (
        "{% set ns=namespace(s=['a']) %}{% for i in range(60) %}"
        "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s|tojson }}"
    ),
    "dagns": (
        "{% set ns=namespace(s=namespace(a=1)) %}{% for i in range(60) %}"
        "{% set ns.s = namespace(a=ns.s, b=ns.s) %}{% endfor %}{{ ns.s }}"
    ),
    "pow": "{{ 10**10**10 }}",
    "center": "{{ 'a'|center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(9999999999) }}",
    "fmt": "{{ '%9999999999d' % 1 }}",
    "fmt2": "{{ '{:>9999999999}'.format(1) }}",
    "fmt3": "{{ '{:{}}'.format(1, 9999999999) }}",
    "fmt5": "{{ '%*d'|format(9999999999, 1) }}",
    "replace": "{% set x='a'*100000 %}{{ x.replace('a', x) }}",
    "replacef": "{% set x='a'*100000 %}{{ x|replace('a', x) }}",
    "join": "{% set x='a'*1000000 %}{{ x.join(range(99999)|map('string')|list) }}",
    "joinmap": "{% set x='a'*1000000 %}{{ range(99999)|map('replace', '', x)|join('') }}",
    "rec": "{% macro f(n) %}{{ f(n+1) }}{{ f(n+1) }}{% endmacro %}{{ f(0) }}",
    "rec2": "{% macro f(n) %}{% if n < 200 %}{{ f(n+1) }}{{ f(n+1) }}{% endif %}{% endmacro %}{{ f(0) }}",
    "recloop": "{% for m in [[1]] recursive %}{{ loop(m) if false else loop([[1],[1]]) }}{% endfor %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cyc": "{{ cycler.__init__.__globals__ }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "slice": "{{ 'a'|slice(10**8)|list }}",
    "batch": "{{ 'a'|batch(10**9,'x')|list }}",
    "round": "{{ 1.5|round(10**8,'ceil') }}",
    "indent": "{{ ('a\n'*10000)|indent(10**6) }}",
    "expand": "{{ ('\t'*10000).expandtabs(10**7) }}",
    "translate": "{% set x='a'*100000 %}{{ x.translate({97: x}) }}",
    "bytes": "{{ 'a'.encode() * 10**10 }}",
    "tobytes": "{{ (2).to_bytes(10**10) }}",
    "tojsonindent": "{{ range(10000)|list|tojson(indent=10**8) }}",
    "slicecopy": "{% set a='x'*10000000 %}{% for i in range(99999) %}{% set b=a[::-1] %}{% endfor %}",
    "in": (
        "{% set a='x'*1000000 %}{% set b='x'*500000~'y' %}"
        "{% for i in range(99999) %}{% if b in a %}{% endif %}{% endfor %}"
    ),
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deepif": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "long": "x" * (2 << 20),
    "manyadd": "{{ " + "+".join(["1"] * 5000) + " }}",
    "not": "{{ " + "not " * 5000 + "1 }}",
    "fold": "{{ ('a'|center(100)|replace('a','b'*10))|center(10**9) }}",
    "content": "{% for m in messages %}{{ m.content * 10**9 }}{% endfor %}",
    "gen": (
        "{% for i in range(99999) %}{% generation %}"
        "{% for j in range(9999) %}{% endfor %}{% endgeneration %}{% endfor %}"
    ),
    "sum2": ("{% set ns=namespace(l=[1]) %}{% for i in range(99999) %}{% set ns.l = ns.l + ns.l %}{% endfor %}"),
    "dictfk": "{{ dict.fromkeys(range(99999), 'a'*100000) }}",
    "int": "{{ ('9'*4000)|int * ('9'*4000)|int }}",
    "json": (
        "{% set ns=namespace(s='\"'*1000) %}"
        "{% for i in range(50) %}{% set ns.s = ns.s|tojson %}{% endfor %}{{ ns.s|length }}"
    ),
    "caller": (
        "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 40 + "x" + "{% endcall %}" * 40
    ),
    "filterblock": "{% filter center(10**9) %}a{% endfilter %}",
    "loopadd": (
        "{% set ns=namespace(s='') %}{% for i in range(99999) %}"
        "{% set ns.s = ns.s + 'abcdefghijklmnop'*10 %}{% endfor %}"
    ),
    "splitj": "{% set x='a'*1000000 %}{% for i in range(99999) %}{% set y = x.split('a') %}{% endfor %}",
    "truncate": "{{ ('a '*1000000)|truncate(10**6) }}",
    "joiner": "{% set j = joiner('a'*1000000) %}{% for i in range(99999) %}{{ j() }}{% endfor %}",
    "cycler": "{% set c=cycler('a'*1000000) %}{% for i in range(99999) %}{{ c.next() }}{% endfor %}",
}
HARMLESS = {
    "attrf": "{{ ''|attr('__class__') }}",
    "selfenv": "{{ self._TemplateReference__context }}",
    "mapattr": "{{ [''] | map(attribute='__class__')|list }}",
    "fmtattr": "{{ '{0.__class__}'.format(messages) }}",
    "env": "{{ environment }}{{ charge }}",
    "wordwrap": "{{ ('a '*1000000)|wordwrap(1) }}",
    "caps": (
        "{% set ns=namespace(s='ΐ'*100000) %}"
        "{% for i in range(50) %}{% set ns.s = ns.s.upper() %}{% endfor %}{{ ns.s|length }}"
    ),
    "esc": (
        "{% set ns=namespace(s='&'*1000) %}{% for i in range(50) %}"
        "{% set ns.s = ns.s|string|forceescape|string %}{% endfor %}{{ ns.s|length }}"
    ),
    "strftime": "{{ strftime_now('%0999999999d') }}",
    "striptags": "{{ ('<'*200000)|striptags|length }}",
    "count": "{{ ('ab'*1000000).count('a'*500000) }}",
}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
BOUND = 60  # seconds of the processor for one template; alone on a machine it is below 2
CHILD = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from treering.data.chat.conversation import trace
from treering.data.chat.template import Template
turns, templates = json.load(sys.stdin)
turns = trace(turns, None).messages
results = {}
for name, source in templates.items():
    began = time.process_time()
    try:
        text = Template(source=source, variables={}).render(turns, None, "chat.jsonl:1").text
        kind, text = "rendered", text[:99]
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    results[name] = kind, text, time.process_time() - began
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
json.dump([results, int(peak) >> 10], sys.stdout)
"""


@pytest.fixture(scope="module")
def child():
    """What became of each, and the MiB of a process that rendered all, which had no more than one GiB."""
    given = json.dumps([TURNS, REFUSED | HARMLESS])
    done = subprocess.run([sys.executable, "-c", CHILD], input=given, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_template_is_refused_and_named(child, name):
    kind, text, seconds = child[0][name]
    assert kind == "DataError", text
    assert text.startswith("chat.jsonl:1: the chat template ") and " is refused: " in text
    assert REFUSED[name][:10] in text.encode().decode("unicode_escape")
    assert seconds < BOUND


@pytest.mark.parametrize("name", HARMLESS)
def test_a_strange_template_that_harms_nobody_shows_nothing(child, name):
    kind, text, seconds = child[0][name]
    assert kind == "rendered" or name == "fmtattr"  # which puts all messages through one filter
    assert not any(word in text for word in ("class", "object", "function", "0x"))
    assert seconds < BOUND


def test_memory_stays_small(child):
    assert child[1] < 400


def test_the_bound_holds_in_a_thread_and_again_and_again():
    template = Template(source=REFUSED["nest"], variables={})
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            with pytest.raises(DataError, match="is refused"):
                pool.submit(template.render, TURNS, None, "x:1").result()


def test_long_conversations_have_an_allowance_of_their_length():
    turns = TURNS * 20_000
    text = Template(source=TEMPLATES["chatml"], variables={}).render(turns, None, "x:1").text
    assert text.count("<|im_start|>") == 40_000


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, "é<"]}}}
CONVERSATIONS = {
    "plain": TURNS,
    "long": TURNS * 4,
    "system": [{"role": "system", "content": " be <brief> "}, *TURNS],
    "tools": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}],
    "thoughts": [TURNS[0], {"role": "assistant", "content": "ok", "reasoning": "hm"}],
}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renderings_are_those_of_transformers(name, turns, prompt):
    from transformers.utils import chat_template_utils

    if turns == "thoughts" and not hasattr(chat_template_utils, "_alias_reasoning_fields"):
        pytest.skip("this transformers does not pass `reasoning` on under the names that templates read")
    variables = {"bos_token": "<bos>", "eos_token": "<eos>"}
    template = Template(source=TEMPLATES[name], variables=variables)
    given = CONVERSATIONS[turns], [{"type": "function", "function": {"name": "f"}}]
    try:
        texts, spans = chat_template_utils.render_jinja_template(
            [given[0]],
            tools=given[1],
            chat_template=template.source,
            return_assistant_tokens_mask=template.tagged,
            add_generation_prompt=prompt,
            **variables,
        )
    except Exception:  # a template that knows no such turn
        with pytest.raises(DataError):
            template.render(*given, "x:1", prompt=prompt)
        return
    expected = texts[0], [tuple(span) for span in spans[0]] if template.tagged else []
    traced = trace(*given)
    for messages, tools in (given, (traced.messages, traced.tools)):
        rendered = template.render(messages, tools, "x:1", prompt=prompt)
        assert (rendered.text, rendered.tags) == expected
