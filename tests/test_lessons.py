"""The lessons: each console block is played, each excerpt is looked up, in the scripts as they are.

The first tests are about the player itself: a text that is wrong must not pass.
"""

from __future__ import annotations

import re
import textwrap
from contextlib import closing
from pathlib import Path

import pytest

from tools import ROOT, TIMEOUT, environment
from tools.broker import Broker, Cluster, Secure, Service, remains
from tools.lesson import README, LessonError, blocks, lessons, steps, without_docker
from tools.player import NeedsDocker, Player, play

EXCERPTS = ("python", "yaml", "bash")  # in the scripts
LANGUAGES = ("console", *EXCERPTS, "mermaid", "text")  # played, looked up, drawn, not read

GOOD = """\
# A lesson

```console
# one
$ echo first; printf 'no end of line'
first
no end of line
$ cat
```

```console
# two
$ for i in 1 2 3; do echo line $i; done
…
line 3
$ sleep 60 &
[1] …
```

```console
# one
^C
$ echo again
again
$ cat <<END
> a line
> END
a line
```

```console
# two
$ kill -9 %1
[1]+  Killed                  sleep 60
$ cat /dev/null
```
"""


def play_text(text: str, folder: Path, timeout: float = TIMEOUT) -> None:
    """Play a lesson with this text in a folder of its own."""
    document = folder / "README.md"
    document.write_text(text)
    with Player(environment(), folder, timeout=timeout) as player:
        player.play(steps(document))


def test_a_lesson_that_is_true_passes(tmp_path: Path) -> None:
    """Commands, output, Ctrl+C, background jobs, two terminals: all as the text says."""
    play_text(GOOD, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "where", "why"),
    [
        pytest.param("\nagain", "\nagian", "line 24", "what came is\nagain", id="changed word"),
        pytest.param("first\nno", "no", "line 6", "what came is\nfirst", id="missing line"),
        pytest.param("line 3\n", "line 3\nline 4\n", "line 16", "did not come", id="extra line"),
        pytest.param("no end of line\n$", "$", "line 6", "not show\nno end", id="untold output"),
        pytest.param(
            "a line\n```", "```", "line 27", "not show\na line", id="untold output at the end"
        ),
        pytest.param("^C\n", "", "line 8", "did not end", id="not at the prompt"),
        pytest.param("cat /dev/null", "cat", "line 35", "did not end", id="not at its end"),
        pytest.param("$ cat\n", "$ exit\n", "line 22", "not show\nexit", id="closed"),
        pytest.param("$ cat\n", "$ echo\n\n", "line 23", "could stop", id="nothing to interrupt"),
        pytest.param("# two\n$ kill", "$ kill", "line 31", "# NAME", id="no name"),
    ],
)
def test_a_lesson_that_is_wrong_fails(
    tmp_path: Path, old: str, new: str, where: str, why: str
) -> None:
    """A text that differs from what happens fails, and the failure says where and how."""
    assert GOOD.count(old) == 1
    timeout = TIMEOUT if "came" in why else 3
    with pytest.raises(LessonError, match=rf"README.md, {where}\b(.|\n)*{re.escape(why)}"):
        play_text(GOOD.replace(old, new), tmp_path, timeout)


def test_a_block_can_be_left_out_with_a_reason(tmp_path: Path) -> None:
    """A block after the comment `<!-- not run: REASON -->` is not played."""
    block = "```console\n# one\n$ echo one\nanother\n```\n"
    play_text(f"<!-- not run: it is wrong -->\n{block}", tmp_path)
    with pytest.raises(LessonError):
        play_text(f"<!-- not run: -->\n{block}", tmp_path)


def has_excerpt(script: str, excerpt: str) -> bool:
    """Tell whether the lines of an excerpt stand in a script, in one piece, maybe indented."""
    indented = (textwrap.indent(excerpt, " " * n) for n in range(0, 24, 4))
    return any(f"\n{lines}" in f"\n{script}" for lines in indented)


def test_an_excerpt_is_looked_up_in_one_piece() -> None:
    """An excerpt may leave off indentation, but no line and no character."""
    script = "def f():\n    a = 1\n\n    if a:\n        b = 2\n"
    assert has_excerpt(script, "a = 1\n\nif a:\n    b = 2\n")
    assert not has_excerpt(script, "a = 1\nif a:\n    b = 2\n")
    assert not has_excerpt(script, "if a:\n  b = 2\n")
    assert not has_excerpt(script, "b = 3\n")
    assert not has_excerpt(script, "= 2\n")


def test_what_to_type_without_docker_is_in_the_readme() -> None:
    """The README says what a reader types who has no Docker. The lessons need no more than this."""
    docker = "docker compose exec rabbitmq rabbitmqctl"
    assert without_docker(f"$ {docker} -q status | grep x") == "$ rabbitmqctl -q status | grep x"
    assert without_docker("$ docker compose restart rabbitmq").startswith("$ rabbitmqctl stop")


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


CLUSTER = ROOT / "cluster" / "README.md"
SECURITY = ROOT / "security" / "README.md"
PROJECTS: dict[Path, type[Cluster | Secure]] = {CLUSTER: Cluster, SECURITY: Secure}
SERVICE = ROOT / "service" / "README.md"
SERVICE_IN_CONTAINERS = "In containers"  # the section that needs them
each_lesson = pytest.mark.parametrize("document", lessons(), ids=name)
each_document = pytest.mark.parametrize("document", [README, *lessons()], ids=name)


def test_each_lesson_is_in_the_readme() -> None:
    """The README links to each lesson. So each is played, and the demo plays a part of it."""
    assert sorted(lessons()) == sorted(ROOT.glob("[a-z]*/*.md"))


@pytest.mark.parametrize(
    "document", [d for d in [README, *lessons()] if d not in PROJECTS], ids=name
)
def test_what_the_terminals_show_is_what_happens(document: Path, broker: Broker) -> None:
    """Each console block of a document, played in real terminals, shows what the text shows."""
    story = steps(document)
    assert story
    if document == SERVICE:
        apart = steps(document, SERVICE_IN_CONTAINERS)
        story = [step for step in story if step not in apart]
    try:
        play(story, broker, timeout=60)
    except NeedsDocker as error:
        pytest.skip(str(error))


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("containers")
@pytest.mark.parametrize("document", [*PROJECTS, SERVICE], ids=name)
def test_a_lesson_starts_and_removes_its_own_rabbitmq(document: Path) -> None:
    """Lessons 9 and 12, and the part of lesson 11 that is about containers, are played from their
    first command to their last one, which removes the containers with their data."""
    section = SERVICE_IN_CONTAINERS if document == SERVICE else None
    with closing(PROJECTS.get(document, Service)()) as broker:
        play(steps(document, section), broker, timeout=60)
        assert not any(remains(broker.settings["COMPOSE_PROJECT_NAME"]))


def test_the_addresses_of_the_cluster_are_those_of_its_nodes() -> None:
    """The line that a reader types in lesson 9 has the ports that the nodes have by default."""
    compose_file = CLUSTER.with_name("docker-compose.yml").read_text()
    ports = re.findall(r"RABBIT\d_PORT:-(\d+)", compose_file)
    line = "export AMQP_URL=" + ",".join(f"amqp://localhost:{port}" for port in ports)
    assert len(ports) == 3
    assert f"\n{line}\n" in CLUSTER.read_text()


@each_lesson
def test_what_the_excerpts_show_is_in_the_scripts(document: Path) -> None:
    """Each block of Python, YAML or bash stands, line for line, in a file of its folder."""
    folder = document.parent
    patterns = ("*.py", "*/*.py", "*.yml", "*.sh")
    scripts = [path.read_text() for pattern in patterns for path in folder.glob(pattern)]
    excerpts = [block for block in blocks(document) if block.language in EXCERPTS]
    assert excerpts
    for block in excerpts:
        assert block.source.strip()
        assert any(has_excerpt(script, block.source) for script in scripts), block


@each_document
def test_each_block_of_a_lesson_is_of_a_known_kind(document: Path) -> None:
    """It is played in a terminal, looked up in the scripts, a diagram, or plain text."""
    for block in blocks(document):
        assert block.language in LANGUAGES, block


def anchors(document: Path) -> set[str]:
    """Return what a link to a heading of a document may end with, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_each_link_to_a_file_finds_it(document: Path) -> None:
    """A link to a file of this project finds the file, and the heading if it names one."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", document.read_text("utf-8"))
    assert links
    for path, anchor in links:
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_figures_in_lessons_are_those_of_the_bench() -> None:
    """The table of lesson 7, and how many times as long something takes. After a new run of the
    bench, this test says which figures the lessons need."""
    bench = "tools/bench/README.md"
    text = (ROOT / bench).read_text(encoding="utf-8")
    medians = dict(re.findall(r"^\| (.+?) +\| +([\d,.]+) \|", text, re.MULTILINE))
    confirms, rpc = (
        (ROOT / name / "README.md").read_text(encoding="utf-8")
        for name in ("publisher_confirms", "rpc")
    )
    rows = re.findall(r"^\| ([^|]+) \| ([\d,.]+) \|$", confirms, re.MULTILINE)
    assert len(rows) == 6
    assert dict(rows).items() <= medians.items()

    one = "one at a time"
    for lesson, table, fast, slow in (
        (confirms, "working-what", "classic queue: --prefetch 100", "classic queue: --prefetch 1"),
        (rpc, "rpc-cheap-calls", one, f"{one}, a callback queue for each call"),
    ):
        times = float(medians[fast].replace(",", "")) / float(medians[slow].replace(",", ""))
        link = f"[about {times:.0f} times as long](../{bench}#{table}"
        assert link in " ".join(lesson.split())


@each_lesson
def test_the_demo_plays_a_part_of_each_lesson(document: Path) -> None:
    """Each lesson has a section for the demo. It needs no Docker, but for those that
    start a RabbitMQ of their own."""
    story = steps(document, "Run it")
    assert story
    docker = any("docker" in step.text for step in story)
    assert docker == (document in PROJECTS)
