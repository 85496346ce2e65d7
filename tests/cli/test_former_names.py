"""A renamed setting: its former name is read from files with a notice, and refused everywhere else."""

from dataclasses import dataclass, field, replace

import pytest

from treering.cli.parsing import ConfigErrors, json_schema, read_text, to_yaml, validate
from treering.core.errors import ConfigError
from treering.core.settings import FORMERLY, former_names, refuse_former_names, with_current_names


@refuse_former_names
@dataclass(frozen=True, kw_only=True)
class Part:
    """A section with a setting that had two other names before."""

    damping: float = field(default=0.01, metadata={FORMERLY: ("soften", "soft")})
    size: int = 1

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ConfigError("damping is negative", field="damping")


@dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part = field(default_factory=Part, metadata={FORMERLY: ("piece",)})
    parts: tuple[Part, ...] = ()


def read(text: str, *settings: str) -> tuple[Whole, list[str]]:
    notices: list[str] = []
    return validate(Whole, read_text(text, name="run.yaml"), settings, notices.append), notices


def problem(text: str, *settings: str) -> str:
    with pytest.raises(ConfigErrors) as caught:
        read(text, *settings)
    return str(caught.value)


NOTICE = "soften is now called damping; the former name is read for one more version"


def test_a_former_name_is_read_with_one_notice():
    assert read("part:\n  soften: 0.5\n") == (Whole(part=Part(damping=0.5)), [f"run.yaml:2: {NOTICE}"])
    assert read("parts: [{size: 2}, {soft: 3}]\n")[0].parts == (Part(size=2), Part(damping=3))
    assert read("part: {damping: 0.5}\n")[1] == []


def test_a_former_name_of_a_section_is_read_with_what_it_contains():
    config, notices = read("piece:\n  soften: 0.5\n")
    assert config == Whole(part=Part(damping=0.5))
    assert [line.split(":")[1] for line in notices] == ["1", "2"]
    assert "run.yaml:3: part.damping" in problem("piece:\n  size: 1\n  soften: -1\n")


def test_a_former_name_on_the_command_line_wins_over_the_file():
    where = "--set part.soften"
    assert read("part: {damping: 1}\n", "part.soften=2") == (Whole(part=Part(damping=2)), [f"{where}: {NOTICE}"])
    assert read("part: {soften: 1}\n", "part.damping=2")[0] == Whole(part=Part(damping=2))
    assert read("parts: []", "parts.0.soften=2")[0].parts == (Part(damping=2),)
    assert read("", "part={soften: 2}") == (Whole(part=Part(damping=2)), [f"--set part: {NOTICE}"])


@pytest.mark.parametrize("text", ["{soften: 1, damping: 1}", "{damping: 1, soften: 1}", "{soft: 1, soften: 1}"])
def test_both_names_are_refused(text):
    message = problem(f"part: {text}\n")
    assert "is now called damping, and damping is given too" in message or "1 problem" not in message
    assert "run.yaml:1: part.sof" in message and "leave sof" in message


def test_both_names_are_one_problem_among_the_others():
    message = problem("part:\n  soften: 1\n  damping: 1\n  sise: 3\nparts: [{size: x}]\n")
    assert "run.yaml: 3 problems" in message
    assert message.index("run.yaml:2: part.soften") < message.index("run.yaml:4") < message.index("run.yaml:5")


def test_a_notice_is_logged_if_nobody_takes_it(caplog):
    validate(Whole, read_text("part: {soften: 1}\n", name="run.yaml"))
    assert caplog.messages == [f"run.yaml:1: {NOTICE}"]


def test_nothing_is_written_with_a_former_name():
    assert "soft" not in to_yaml(Whole()) + str(json_schema(Whole))


def test_the_constructor_names_the_setting_of_today():
    with pytest.raises(ConfigError, match="soften is now called damping") as caught:
        Part(soften=1)
    assert caught.value.field == "damping"
    with pytest.raises(TypeError, match="softly"):
        Part(softly=1)
    assert replace(Part(damping=2), size=3) == Part(damping=2, size=3)


def test_text_of_an_earlier_version_is_compared_by_the_names_of_today():
    assert former_names(Part) == {"soften": "damping", "soft": "damping"}
    assert with_current_names(Part, "Part(soften=0.01, size=1)") == repr(Part())
    assert with_current_names(Part, "Part(size=1, soften=0.01)") == "Part(size=1, damping=0.01)"
    assert with_current_names(Part, "Parts(soften=0.01)") == "Parts(soften=0.01)"
    assert with_current_names(Part, repr(Part())) == repr(Part())
