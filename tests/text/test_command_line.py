"""One dialect for the commands beside svl: --name value, or name=value as in Hydra."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svl.core import SvlError
from svl.text.command_line import CommandLineParser, run_command


@pytest.fixture
def parser():
    parser = CommandLineParser("tool", description="What it does.")
    parser.add_argument("--out-file", metavar="FILE")
    parser.add_argument("--number", type=float, default=1.0)
    parser.add_argument("--yes", action="store_true")
    parser.add_argument("names", nargs="*")
    return parser


@pytest.mark.parametrize(
    "words",
    [
        ["--out-file", "x", "--yes", "A"], ["--out_file", "x", "--yes", "A"], ["--out-file=x", "A", "--yes"],
        ["out_file=x", "yes=true", "A"], ["out-file=x", "A", "yes=true"], ["A", "--yes=true", "--out_file=x"],
    ],
)  # fmt: skip
def test_every_way_to_write_options(words, parser):
    args = parser.parse_args(words)
    assert (args.out_file, args.number, args.yes, args.names) == ("x", 1.0, True, ["A"])


@pytest.mark.parametrize(
    ("word", "value"),
    [("out_file=", ""), ("out_file=a=b", "a=b"), ("out_file=a b\nc", "a b\nc"), ("out_file=--yes", "--yes")],
)
def test_values_are_taken_as_they_are(word, value, parser):
    assert parser.parse_args([word]).out_file == value


def test_switches_can_be_set_off(parser):
    assert not parser.parse_args(["yes=false"]).yes
    assert not parser.parse_args([]).yes


def test_paths_are_no_options(parser):
    words = ["outputs/run/ratio=0.1,seed=0", "./ratio=0.1", "a-b_c"]
    assert parser.parse_args(words).names == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out_fil=x"], "there is no setting 'out_fil' (did you mean 'out_file'?); known: out_file, number, yes"),
        (["--out-fil", "x"], "there is no setting 'out-fil' (did you mean 'out_file'?)"),
        (["yes=perhaps"], "yes is 'perhaps', but must be one of: true, false"),
        (["number=many"], "argument --number: invalid float value: 'many'; see tool --help"),
        (["--out-file"], "argument --out-file: expected one argument; see tool --help"),
        (["-x"], "unrecognized arguments: -x"),
    ],
)
def test_mistakes_are_svl_errors(words, message, parser):
    with pytest.raises(SvlError) as caught:
        parser.parse_args(words)
    assert message in str(caught.value)


def test_subcommands_have_options_of_their_own():
    parser = CommandLineParser("tool")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls").add_argument("--stage")
    compare = commands.add_parser("compare")
    compare.add_argument("pair", nargs=2)
    assert vars(parser.parse_args(["ls", "stage=run"])) == {"command": "ls", "stage": "run"}
    assert parser.parse_args(["compare", "A", "B"]).pair == ["A", "B"]
    for words in (["compare", "A", "B", "stage=run"], ["compare", "A"], ["ls", "out=x"], ["lss"], []):
        with pytest.raises(SvlError):
            parser.parse_args(words)


def test_help_lists_all_and_says_how_options_can_be_written(parser, capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for text in ("What it does.", "--out-file FILE", "--number", "--yes", "names", "name=value"):
        assert text in printed


@given(st.lists(st.text(max_size=10) | st.sampled_from(["--yes", "yes=true", "--", "-h=", "=", "out_file=x"])))
def test_any_words_are_options_or_one_error(words):
    parser = CommandLineParser("tool", add_help=False)
    parser.add_argument("--out-file")
    parser.add_argument("--yes", action="store_true")
    parser.add_argument("names", nargs="*")
    try:
        args = parser.parse_args(words)
    except SvlError:
        return
    assert {type(args.yes), type(args.names)} == {bool, list}


# ------------------------------------------------------------------------------------------------- exit codes


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


def test_exit_codes(capsys):
    assert run_command("tool", lambda: None) == 0
    assert capsys.readouterr() == ("", "")
    assert run_command("tool", raising(SvlError("no\x1b[31m such\nthing"))) == 1
    assert capsys.readouterr() == ("", "tool: error: no\\x1b[31m such thing\n")
    assert run_command("tool", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.startswith("tool: interrupted")
    with pytest.raises(ZeroDivisionError):
        run_command("tool", raising(ZeroDivisionError()))


def test_a_reader_that_has_had_enough_is_no_error(capfd):
    assert run_command("tool", raising(BrokenPipeError())) == 0
    sys.stdout.flush()
    assert capfd.readouterr().err == ""
