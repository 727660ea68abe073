"""Whether what a command line names exists: `CHECKS[program](words, monkeypatch, synopsis)` fails if it does not.

In a synopsis some words stand for what a reader puts in, so files are not read.
"""

import argparse
import importlib.util
import re
import runpy
import sys

import pytest
from commands import ROOT

from memzoo.cli import build_parser
from memzoo.training.adapt.settings import load_adapt_config
from memzoo.training.config import load_config


def check_memzoo(words, monkeypatch, synopsis):
    parser = build_parser()
    if len(words) == 1:
        assert words[0] in parser._subparsers._group_actions[0].choices
        return
    args, rest = parser.parse_known_args(words)
    assert all("=" in word and hasattr(args, "overrides") for word in rest), rest
    if getattr(args, "config", None) and not synopsis:
        (load_adapt_config if args.command == "adapt" else load_config)(args.config, [*args.overrides, *rest])


def check_python(words, monkeypatch, synopsis):
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
        return
    assert (ROOT / words[0]).is_file(), words[0]
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str((ROOT / words[0]).parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except ImportError as error:
        pytest.skip(str(error))
    except SystemExit as stopped:
        assert stopped.code == 0, words


def check_torchrun(words, monkeypatch, synopsis):
    from torch.distributed.run import parse_args

    args = parse_args(words)
    if args.module:
        assert args.training_script == "memzoo"
        check_memzoo(args.training_script_args, monkeypatch, synopsis)
    else:
        check_python([args.training_script, *args.training_script_args], monkeypatch, synopsis)


def check_make(words, monkeypatch, synopsis):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert words[0] in targets


def check_pip(words, monkeypatch, synopsis):
    """What is installed is an extra of ours, or a package whose version is pinned for the tests."""
    package = words[-1]
    if extra := re.fullmatch(r"memzoo\[([\w-]+)\]", package):
        assert f'"{extra[1]}": [' in (ROOT / "setup.py").read_text()
    else:
        assert re.search(rf"^{package}==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE), package


def check_other(words, monkeypatch, synopsis):
    """A program of a package that memzoo needs: the module of its command is there."""
    modules = {
        "launch": "accelerate.commands.launch",
        "auth": "huggingface_hub.cli.auth",
        "serve": "transformers.cli.serve",
    }
    assert importlib.util.find_spec(modules[words[0]])


CHECKS = {"memzoo": check_memzoo, "python": check_python, "torchrun": check_torchrun, "make": check_make}
CHECKS |= {"pip": check_pip, "accelerate": check_other, "hf": check_other, "transformers": check_other}
