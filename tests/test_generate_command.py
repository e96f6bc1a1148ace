"""`distil-jax generate` on a real directory: one prompt, a conversation, a file; and what it says of bad input."""

import io
import json

import jax
import pytest
from test_generation import TEMPLATE, byte_tokenizer

from distil_jax import cli
from distil_jax.generation import generate
from distil_jax.models import load_pretrained, model_from_config, save_pretrained

FIELDS = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama over bytes with a chat template; it ends an answer with id 1, <|eot_id|>."""
    model = model_from_config({"model_type": "llama", "bos_token_id": 0, "eos_token_id": 1} | FIELDS)
    path = tmp_path_factory.mktemp("models") / "talker"
    return save_pretrained(model, jax.jit(model.init)(jax.random.key(0)), path, tokenizer=byte_tokenizer(TEMPLATE))


def run(*arguments) -> int:
    return cli.main(["generate", *map(str, arguments)])


def expected(folder, prompts, **options):
    return generate(*load_pretrained(folder), byte_tokenizer(TEMPLATE), prompts, max_new_tokens=6, **options)


def test_a_prompt_is_answered_on_standard_output(folder, capsys):
    assert run(folder, "--prompt", "hello", "--raw", "--max-new-tokens", 6) == 0
    said = capsys.readouterr()
    assert said.out == expected(folder, ["hello"])[0] + "\n" and "GiB, read in" in said.err
    assert run(folder, "--prompt", "hello", "--max-new-tokens", 6, "--int8") == 0  # chat, as there is a template
    assert capsys.readouterr().out != said.out


def test_a_file_is_answered_in_its_order_with_all_it_holds(folder, tmp_path, capsys):
    conversation = [{"role": "user", "content": "second"}]
    asked = [{"id": 7, "prompt": "first " * 9}, {"messages": conversation, "topic": "é"}, {"prompt": "third"}]
    (tmp_path / "asked.jsonl").write_text("\n\n".join(map(json.dumps, asked)))
    out = tmp_path / "answered.jsonl"
    arguments = (folder, "--prompts", tmp_path / "asked.jsonl", "--raw", "--max-new-tokens", 6, "--batch-size", 2)
    assert run(*arguments, "--out", out) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    texts = expected(folder, [asked[0]["prompt"], conversation, "third"])
    assert [a["completion"] for a in answers] == texts
    assert [{k: v for k, v in a.items() if k in row} for a, row in zip(answers, asked, strict=True)] == asked
    assert all(a["tokens"] == 6 and a["stopped"] is False for a in answers)
    assert "3 of 3 prompts" in capsys.readouterr().err
    assert run(*arguments) == 0
    assert capsys.readouterr().out == out.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answered.jsonl", "asked.jsonl"]


def test_a_conversation_remembers_until_it_is_reset(folder, monkeypatch, capsys):
    turns = ["hello", "and now?", "", "/reset", "hello", "x" * 400, "/exit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(turns)))
    assert run(folder, "--max-new-tokens", 6) == 0
    said = capsys.readouterr()
    hello = expected(folder, ["hello"], chat=True)[0]
    so_far = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": hello},
        {"role": "user", "content": "and now?"},
    ]
    assert said.out == "\n".join([hello, expected(folder, [so_far])[0], hello]) + "\n"
    assert "longer than the context of 256" in said.err and "/reset starts afresh" in said.err


def test_draws_are_repeated_by_their_seed(folder, capsys):
    outs = []
    for seed in (1, 1, 2):
        options = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--seed", seed)
        assert run(folder, "--prompt", "hello", "--raw", "--max-new-tokens", 20, *options) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


BAD_ROWS = {
    '{"prompt": "fine"}\n{"prompt": ': "2: no valid JSON",
    '["prompt"]': '1: a row is an object with either "prompt" or "messages"',
    '{"prompt": "a", "messages": []}': '1: a row is an object with either "prompt" or "messages"',
    '{"prompt": 3}': '"prompt" is text',
    '{"messages": [{"role": "user"}]}': 'a message is an object with "role" and "content"',
    '{"prompt": "fine"}\n{"prompt": " "}': "2: prompt ' ' is empty",
    '{"prompt": "' + "long " * 80 + '"}': "longer than the context of 256",
    '{"messages": [{"role": "tool", "content": "x"}]}': "no tools here",
    "\n": "has no rows",
}


@pytest.mark.parametrize("rows", BAD_ROWS)
def test_a_row_that_cannot_be_answered_is_named_and_nothing_is_written(folder, tmp_path, capsys, rows):
    (tmp_path / "asked.jsonl").write_text(rows)
    status = run(folder, "--prompts", tmp_path / "asked.jsonl", "--out", tmp_path / "out.jsonl", "--max-new-tokens", 6)
    said = capsys.readouterr().err
    assert status == 2 and BAD_ROWS[rows] in said and "asked.jsonl" in said
    assert [p.name for p in tmp_path.iterdir()] == ["asked.jsonl"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((), "give one model"),
        (("MODEL", "--config", "configs/tiny.py"), "give one model"),
        (("MODEL", "--prompt", ""), "is empty"),
        (("MODEL", "--prompt", "a", "--temprature", "1"), "unrecognized arguments: --temprature"),
        (("MODEL", "--prompt", "a", "--top-p", "2"), "top_p 2.0"),
        (("MODEL", "--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("MODEL", "--prompt", "a", "--out", "x"), "--out goes with --prompts"),
        (("MODEL", "--prompts", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("MODEL", "--prompts", "nowhere.jsonl", "--batch-size", "0"), "--batch-size 0"),
        (("MODEL", "--prompt", "a", "--tensor", "3"), "do not fit 8 devices"),
        (("nowhere", "--prompt", "a"), "nowhere: no such directory"),
        (("--config", "configs/tiny.py", "--config.workdir=/nowhere/at/all", "--prompt", "a"), "no exported student"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_one_line(folder, capsys, arguments, named):
    assert run(*(folder if a == "MODEL" else a for a in arguments)) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("error:") == 1


def test_help_shows_every_argument(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    assert "--temperature" in capsys.readouterr().out
