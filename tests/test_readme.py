"""The README's kernel and its commands, as they stand there."""

import json
import re
from pathlib import Path

from click.testing import CliRunner

from moelab.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Every ``moelab`` command line, its continuations joined."""
    shown = "".join(blocks("console") + blocks("sh")).replace("\\\n", " ")
    return re.findall(r"^(?:\$ )?\.venv/bin/moelab (.*)$", shown, re.MULTILINE)


def test_the_kernel_and_its_launch_are_asked_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (kernel,) = [block for block in blocks("python") if block.startswith("# scale.py")]
    (launch,) = blocks("json")
    Path("scale.py").write_text(kernel)
    Path("launch.json").write_text(launch)
    (command,) = [line.split() for line in commands() if line.startswith("lds ")]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["target"] for row in rows} == {"gfx950", "sm_90"}
    assert [row["num_stages"] for row in rows] == [1, 2, 3] * 2
    assert {row["status"] for row in rows} == {"ok", "out_of_lds"}
    assert all(json.loads(row["buffers"])["buffers"] for row in rows)


def test_every_command_shown_is_one_with_options_that_it_has():
    assert len(commands()) > 10
    for line in commands():
        name, *words = line.split()
        command = app.commands[name]
        if words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words[0]]
        options = {flag for parameter in command.params for flag in parameter.opts}
        before = words[: words.index("--")] if "--" in words else words
        assert {word for word in before if word.startswith("-")} <= options, line
