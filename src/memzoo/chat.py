"""`memzoo chat`: turns of one conversation, remembered in the model's cache and nowhere else."""

import sys
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase, TextStreamer

from memzoo.session import Session

HELP = "/save DIR  /load DIR  /reset  /stats  /help  /quit"


def chat(session: Session, plain: bool, sampling: dict) -> None:
    """Reads lines from stdin until /quit or its end. Errors of a command are said and the conversation goes on."""
    interactive = sys.stdin.isatty()
    as_turn = plain_turn if plain or session.tokenizer.chat_template is None else template_turn
    print(f"{session.model.config.model_type}, {session.seen_tokens:,} tokens in memory. {HELP}")
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        try:
            if command.startswith("/"):
                print(run_command(session, command, argument.strip()))
            elif line.strip():
                streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
                session.reply(as_turn(session.tokenizer, line), streamer, **sampling)
        except KeyboardInterrupt:
            print("\n(stopped)")
        except (ValueError, OSError) as error:
            print(f"error: {error}")


def run_command(session: Session, command: str, argument: str) -> str:
    """Carries out /save, /load, /reset, /stats or /help; returns what to say."""
    actions: dict[str, Callable[[str], None]] = {"/save": session.save, "/load": session.load}
    if command in actions:
        if not argument:
            return f"{command} needs a folder: {command} DIR"
        actions[command](argument)
        return f"{command[1:]}: {argument}, {session.seen_tokens:,} tokens"
    if command == "/reset":
        session.reset()
        return "memory is empty"
    if command == "/stats":
        size = f", {session.cache.nbytes:,} bytes of memory" if hasattr(session.cache, "nbytes") else ""
        return f"{session.seen_tokens:,} tokens read and written{size}"
    return HELP if command == "/help" else f"no command {command}; {HELP}"


def plain_turn(tokenizer: PreTrainedTokenizerBase, line: str) -> str:
    """The line as it is: the model goes on with the text."""
    return line + "\n"


def template_turn(tokenizer: PreTrainedTokenizerBase, line: str) -> str:
    """One user turn in the tokenizer's chat template, without repeating the turns that the memory already holds."""
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turn = {"role": "user", "content": line}
    head = str(tokenizer.apply_chat_template(before, tokenize=False))
    whole = str(tokenizer.apply_chat_template([*before, turn], tokenize=False, add_generation_prompt=True))
    if whole.startswith(head):
        return whole.removeprefix(head)
    return str(tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))
