"""Operations of templates that cost more than the lengths of their inputs are charged for what they really cost."""

import json
import subprocess
import sys

import pytest

from tests.data.test_hostile_templates import BOUND, CHILD, TURNS
from tests.ranks import PATIENCE

GROWTH = "it repeats or grows without end"
TOKENS, DATE = "it has more than 16,384 tokens", "it writes a date with a format of more than 1,000 characters"
LOOP = "{% for i in range(99999) %}"
MANY_PARTS = "{% set c = (messages[0].content ~ ' ') * 2000 %}" + LOOP
REFUSED = {
    # Searches from the end compare n · m characters, and hold the interpreter's lock meanwhile.
    **{
        name: (f"{{{{ ('a'*2000000).{name}('ab'+'a'*1000000) }}}}", GROWTH)
        for name in ("rfind", "rindex", "rsplit", "rpartition")
    },
    # Many fields of a width that is not large.
    "format of a mapping": ("{{ ('%(a)9999d'*300000) % {'a': 1} }}", GROWTH),
    "precision": ("{{ ('%(a).9999f'*300000) % {'a': 1} }}", GROWTH),
    "format method": ("{{ ('{0:9999}'*300000).format(1) }}", GROWTH),
    "format filter": ("{{ ('%(a)9999d'*300000)|format(a=1) }}", GROWTH),
    # A text between lines or values.
    "wrapstring": ("{{ ('a '*1000000)|wordwrap(1, wrapstring='x'*10000) }}", GROWTH),
    "indent": ("{{ ('a\n'*20000)|indent('x'*200000) }}", GROWTH),
    "json's indent": ("{{ range(99999)|list|tojson(indent='x'*100000) }}", GROWTH),
    "json's separators": ("{{ range(99999)|list|tojson(separators=('x'*100000, ':')) }}", GROWTH),
    # Quadratic in a text.
    "wrapped word": ("{{ ('a'*1000000)|wordwrap(1) }}", GROWTH),
    "dashes": ("{{ ('a' ~ '-'*100000)|wordwrap }}", GROWTH),
    "tags": ("{{ ('<>'*500000)|striptags }}", GROWTH),
    "sum of lists": ("{{ range(40000)|map('string')|map('list')|sum(start=[])|length }}", GROWTH),
    # An item for each character.
    "sort": ("{{ ('abcdef'*1000000)|sort|length }}", GROWTH),
    "list": ("{{ ('abcdef'*1000000)|list|length }}", GROWTH),
    "title": ("{{ ('ab '*1300000)|title|length }}", GROWTH),
    "words": ("{{ ('ab '*2600000)|striptags|length }}", GROWTH),
    "wrapped words": ("{{ ('ab '*2600000)|wordwrap|length }}", GROWTH),
    "lines": ("{{ ('ab\n'*2600000)|indent|length }}", GROWTH),
    "count": ("{% set r = range(99999) %}" + LOOP + "{% set x = r.count('a') %}{% endfor %}", GROWTH),
    # Traced texts of many parts.
    "reversed": (MANY_PARTS + "{% set x = c[::-1] %}{% endfor %}", GROWTH),
    "split": (MANY_PARTS + "{% set x = c.split() %}{% endfor %}", GROWTH),
    "replaced": (MANY_PARTS + "{% set x = c.replace('h', 'x') %}{% endfor %}", GROWTH),
    "parts": ("{{ messages[0].content * 1500000 }}", GROWTH),
    "bytes": ("{{ (2).to_bytes(500000) * 60000 }}", "access to attribute 'to_bytes' of 'int' object is unsafe."),
    "date": ("{{ strftime_now('%9999d'*100000) }}", DATE),
    # Python's compiler needs up to 30 µs and 4 KiB a token.
    "expressions": ("{{a}}" * 50_000, TOKENS),
    "sums": ("{{a+a*a}}" * 25_000, TOKENS),
    "statements": ("{% if a %}{% endif %}" * 11_000, TOKENS),
    "items": ("{{ [" + "1," * 100_000 + "] }}", TOKENS),
}
ORDINARY = {
    "ordinary rsplit": ("{{ ('words and '*20000).rsplit(' ', 1)|length }}", "2"),
    "ordinary format": ("{{ '%5d|%-8s' % (3, 'a') }}{{ '{:>6.2f}'.format(1.5) }}", "    3|a         1.50"),
    "ordinary wordwrap": ("{{ 'a bc def'|wordwrap(4, wrapstring='/') }}", "a bc/def"),
    "ordinary indent": ("{{ 'a\nb'|indent('> ', first=true) }}", "> a\n> b"),
    "ordinary json": ("{{ {'a': [1]}|tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
    "ordinary sum": ("{{ [[1], [2, 3]]|sum(start=[]) }}{{ range(5)|sum }}", "[1, 2, 3]10"),
    "ordinary tags": ("{{ 'a <b>c</b>'|striptags }}", "a c"),
    "ordinary long": ("{% if messages %}{{ 'x' }}{% endif %}" * 1_000, "x" * 99),
}


@pytest.fixture(scope="module")
def child():
    """What became of each, and the MiB of a process that rendered all, which had no more than one GiB."""
    templates = {name: source for name, (source, _) in (REFUSED | ORDINARY).items()}
    given = json.dumps([TURNS, templates])
    code = CHILD.replace("RLIMIT_AS", f"RLIMIT_CPU, ({BOUND * 4}, {BOUND * 4})); resource.setrlimit(resource.RLIMIT_AS")
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", REFUSED)
def test_what_costs_more_than_its_length_is_refused_by_name(child, name):
    kind, text, seconds = child[0][name]
    assert kind == "DataError" and text.endswith(f" is refused: {REFUSED[name][1]}"), text
    assert seconds < BOUND


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_uses_of_the_same_operations_are_rendered(child, name):
    assert child[0][name][:2] == ["rendered", ORDINARY[name][1]]


def test_memory_stays_small(child):
    assert child[1] < 400
