"""Nothing that comes from outside reaches a terminal or a log with control characters."""

import pickle

import pytest

from trainer.run.flags import parse_args
from trainer.run.logger import RunLogger
from utils.config import read_yaml
from utils.errors import UserError
from utils.text import one_line, printable

EVIL = "\x1b]0;title\x07\x9b2J\u202egnp\u2028\r"


def is_safe(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\x1b[2J\x9bb", "a [2J b"),
        ("a\r\nb\tc", "a b c"),
        ("caf\udce9.jpg", "caf\\udce9.jpg"),
        ("שלום \u202eabc", "שלום abc"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_control_characters_become_spaces(text, line):
    assert one_line(text) == line and printable(f"{text}  x\ny").endswith("  x\ny")


def test_an_error_is_one_line_and_its_steps_are_several():
    error = UserError(f"{EVIL}\n: is wrong", "\n  step 1\n  step 2")
    for message in (str(error), str(pickle.loads(pickle.dumps(error)))):
        assert is_safe(message) and message.splitlines()[1:] == ["  step 1", "  step 2"]


@pytest.mark.parametrize("flags", [[EVIL], ["--epochs", EVIL], ["--time_limit", EVIL]])
def test_mistyped_flags_are_quoted_safely(capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        parse_args(flags, "")
    assert is_safe(capsys.readouterr().err)


def test_a_log_has_no_control_characters(tmp_path, capsys):
    with RunLogger(tmp_path) as logger:
        logger.info(f"row  1\nrow  2 {EVIL}")
        logger.warning(f"skipped {EVIL}\nforged line")
        logger.log_row({"step": 1, "loss": 0.5, EVIL: 1}, EVIL)
    printed = capsys.readouterr().out
    for text in (printed, (tmp_path / "training_logs.txt").read_text(), (tmp_path / "metrics.jsonl").read_text()):
        assert is_safe(text) and "\nforged" not in text
    assert printed.startswith("row  1\nrow  2 ")


def test_an_error_in_yaml_is_quoted_safely(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [\u202egnp\u2028", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_yaml(tmp_path / "a.yaml")
    assert is_safe(str(error.value))
