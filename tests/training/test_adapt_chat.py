"""Conversations: exactly the assistant's words and the end of its turn carry a loss, whatever the template."""

import json

import pytest

from memzoo.training.adapt.chat import ChatExamples, encode_conversation, read_conversations
from memzoo.training.config import ConfigError

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen3's: the thinking of a turn is only there while the turn is the last
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Mistral's: nothing opens the assistant's turn
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "Hello: ü!"},
    {"role": "user", "content": "Hello: ü!"},
    {"role": "assistant", "content": "Bye"},
]


def said_by_assistant(messages, tokenizer):
    """The pieces of text that carry a loss."""
    ids, said = encode_conversation(messages, tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    pieces, before = [], False
    for token, now in zip(ids, said):
        if now and not before:
            pieces.append([])
        if now:
            pieces[-1].append(token)
        before = now
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("template", [{}, {"template": MARKED}], ids=["unmarked", "marked"])
def test_the_loss_is_on_every_word_of_the_assistant_and_the_end_of_its_turns(template, make_tokenizer):
    assert said_by_assistant(TALK, make_tokenizer(**template)) == ["Hello: ü!<|im_end|>", "Bye<|im_end|>"]


def test_a_template_that_opens_no_turn(make_tokenizer):
    assert said_by_assistant(TALK[1:], make_tokenizer(INST)) == [" Hello: ü!<|im_end|>", " Bye<|im_end|>"]


def test_a_turn_that_the_template_rewrites_later_is_left_out(make_tokenizer):
    tokenizer = make_tokenizer(THINKING)
    assert said_by_assistant(TALK[:3], tokenizer) == ["<think></think>Hello: ü!<|im_end|>"]
    assert said_by_assistant(TALK, tokenizer) == ["<think></think>Bye<|im_end|>"]


def test_conversations_without_the_assistant_are_dropped_and_long_ones_cut(make_tokenizer):
    tokenizer = make_tokenizer()
    opening = len(encode_conversation(TALK[:3], tokenizer)[0])
    data = ChatExamples([TALK, TALK[:2], TALK[:3]], tokenizer, max_length=opening)
    assert (len(data), data.dropped, data.cut) == (2, 1, 1)
    assert data[0]["input_ids"].tolist() == data[1]["input_ids"].tolist()
    assert data[0]["labels"].tolist() == data[1]["labels"].tolist()
    chosen = data[0]["labels"] >= 0
    assert (data[0]["labels"][chosen] == data[0]["input_ids"][chosen]).all()
    words = tokenizer.apply_chat_template(TALK[:2], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert not chosen[: len(words)].any()
    with pytest.raises(ConfigError, match=r"none of the 1 conversations has .* assistant within .* 20 tokens"):
        ChatExamples([TALK], tokenizer, max_length=20)


def test_tokenizers_and_templates_that_cannot_do_it_are_refused(make_tokenizer):
    with pytest.raises(ConfigError, match=r"no.* chat template, .*base.chat_template|tokenizer has none"):
        ChatExamples([TALK], make_tokenizer(template=None))
    from memzoo import MaruTokenizer

    with pytest.raises(ConfigError, match="MaruTokenizer does not say where"):
        ChatExamples([TALK], MaruTokenizer())
    strict = make_tokenizer("{{ raise_exception('only users may speak') }}")
    with pytest.raises(ConfigError, match="refuses conversation 1: only users may speak"):
        ChatExamples([TALK], strict)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no conversation"),
        ('{"messages": [}', "line 1 of .*: Expecting value"),
        ('\n{"text": "a"}', "line 2 of .*: no conversation"),
        (json.dumps({"messages": [{"role": "user", "content": None}]}), "line 1 .* needs a `role` and a `content`"),
    ],
)
def test_files_are_checked_line_by_line(tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(ConfigError, match=message):
        read_conversations(tmp_path / "a.jsonl")


def test_a_file_of_conversations_is_read_in_order(tmp_path):
    rows = [TALK, TALK[:3]]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"messages": row}) for row in rows))
    assert read_conversations(tmp_path / "a.jsonl") == rows
    with pytest.raises(ConfigError, match="is not a file"):
        read_conversations(tmp_path / "b.jsonl")
