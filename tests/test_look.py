"""`distil-jax inspect` shows every token once, over the bytes that it stands for, and what the models really expect."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_pack import BARE, NO_BOS, STUDENT, TEACHER
from test_run import PROJECT, SMALL
from transformers import AutoTokenizer

import distil_jax as dj
from distil_jax import cli, export, learners, prepare
from distil_jax.config import load_config
from distil_jax.generation.text import Codec
from distil_jax.look import samples, terminal
from distil_jax.look.samples import visible
from distil_jax.models import hub
from distil_jax.projection import Projection
from distil_jax.tokens import chat
from distil_jax.tokens.align import NONE, ROLES, ROOT
from distil_jax.tokens.pack import make_example, make_examples, pack, unpack
from distil_jax.workdir import Workdir

SMALL_TABLES = {"student": STUDENT, "teacher": TEACHER}


def drawn(text: str, tables) -> list[str]:
    console = Console(width=60, record=True, color_system=None, file=open("/dev/null", "w"))
    terminal.show(samples.of_text(text, tables, 1000), tables, console)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_tokens_stand_over_their_bytes():
    assert drawn("abc 1234", SMALL_TABLES)[1:5] == [
        "student [bos]┃ab│c┃␣┃123  ┃4┃[eos]┃",
        "teacher [bos]┃abc ┃␣┃1│2│3┃4┃[eos]┃",
        "role    n    ┃R │I┃R┃C    ┃R┃R    ┃",
        "7 student and 8 teacher tokens; supervised 85.7%; aligned: root 57.1%, interior 14.3%, crossing 14.3%, "
        "none 14.3%; rendered 100.0% of 8 characters",
    ]
    # Each vocabulary has the bytes of é as two tokens, and one side has no bos and no eos.
    assert drawn("é", {"student": STUDENT, "teacher": BARE})[1:4] == [
        "student [bos]┃<0xC3>┃<0xA9>┃[eos]┃",
        "teacher      ┃<0xC3>┃<0xA9>┃     ┃",
        "role    n    ┃R     ┃R     ┃N    ┃",
    ]


def test_long_texts_go_on_in_the_next_line_and_stop_where_asked():
    lines = drawn("ab1" * 30, SMALL_TABLES)
    assert max(map(len, lines[1:-2])) <= 60 and sum(line.startswith("student ") for line in lines) > 1
    assert "".join(re.findall("[^┃│ ]", "".join(line[8:] for line in lines if line.startswith("student ")))) == (
        "[bos]" + "ab1" * 30 + "[eos]"
    )
    cut = samples.of_text("é1" * 30, SMALL_TABLES, 10)
    assert (cut.shown, cut.characters, cut.shares()["rendered"]) == (10, 60, 10 / 60)


def tables_strategy():
    return st.sampled_from([(s, t) for s in (STUDENT, TEACHER, NO_BOS, BARE) for t in (STUDENT, TEACHER, NO_BOS, BARE)])


def check_groups(example, student, teacher) -> None:
    """Every token once and in order; what is tied covers the same bytes, column by column."""
    groups = samples.grouped(example, student, teacher)
    for side in ("student", "teacher"):
        shown = [token.index for group in groups for token in getattr(group, side)]
        assert shown == list(range(len(example[f"{side}_tokens"])))
    for group in groups:
        tied = {int(example["role"][token.index]) != NONE for token in group.student}
        assert len(tied) <= 1
        if tied == {True}:
            cover = []
            for table, side in ((student, "student"), (teacher, "teacher")):
                columns = {}
                for token in getattr(group, side):
                    piece = table.token_bytes(int(example[f"{side}_tokens"][token.index]))
                    assert len(piece) in (token.end - token.start, 0)
                    columns |= dict(zip(range(token.start, token.end), piece, strict=False))
                cover.append(columns)
            assert cover[0] and cover[0].items() <= cover[1].items() or cover == [{}, {}]


@settings(deadline=None, max_examples=150)
@given(st.text("abc123 é\n", min_size=4, max_size=30), tables_strategy())
def test_every_token_is_shown_once_over_the_same_bytes(text, tables):
    example = make_example("", text, *tables)
    check_groups(example, *tables)
    # As it comes back out of a packed row, where the first token has lost its place.
    check_groups(unpack(pack([example], 64, 64).rows)[0], *tables)


def test_nothing_that_is_shown_is_invisible_or_steers_the_terminal():
    assert visible(b"a b\n\t") == "a␣b⏎⇥"
    assert visible("é".encode()[:1]) == "<0xC3>" and visible(b"\xff\x80") == "<0xFF><0x80>"
    assert visible(b"\x1b[31m\x07\r\x7f") == "<0x1B>[31m<0x07><0x0D><0x7F>"
    assert visible("\u202e\u200b\u00a0\u2028\x9b".encode()) == "<U+202E><U+200B><U+00A0><U+2028><U+009B>"
    assert visible("\u0301x\ufe0f".encode()) == "◌\u0301x<U+FE0F>"


# ---- the command -----------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The tokens of a page: classes, what is written, and what shows on hover."""

    def __init__(self, text: str):
        super().__init__()
        self.tokens: list[dict] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag != "span":
            return
        kinds = dict(attrs).get("class", "").split()
        self.open.append(kinds[0])
        if kinds[0] == "token" and ("student" in kinds or "teacher" in kinds):
            self.tokens.append({"kinds": kinds[1:], "text": "", "more": ""})

    def handle_endtag(self, tag):
        if tag == "span":
            self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] == ["more"]:
            self.tokens[-1]["more"] += data
        elif self.open[-2:] == ["group", "token"]:
            self.tokens[-1]["text"] += data

    def of(self, side: str) -> list[dict]:
        return [token for token in self.tokens if side in token["kinds"]]


CONFIG = """
import importlib.util

def get_config():
    spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    c = tiny.get_config().unlock()
    c.update_from_flattened_dict({values!r})
    return c.lock()
"""


def config_in(folder: Path, **values) -> str:
    """The tiny recipe, small, as a config file with a work folder beside it: quicker than many flags."""
    values = {"workdir": str(folder / "work")} | values
    (folder / "config.py").write_text(
        CONFIG.format(tiny=str(PROJECT / "configs" / "tiny.py"), values=SMALL | {k: str(v) for k, v in values.items()})
    )
    return str(folder / "config.py")


def loaded(path: str):
    return load_config(["--config", path])[0]


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """Random models as Hugging Face directories with tokenizers of their own, the prepared corpus of conversations for
    them (the project's own docs, asked for by their headings), and W as built."""
    folder = tmp_path_factory.mktemp("look")
    texts = [p for file in sorted((PROJECT / "docs").glob("*.md")) for p in file.read_text().split("\n\n") if p.strip()]
    texts = [text[:300] for text in texts if "\u2581" not in text]  # Gemma's space does not round-trip
    chats = folder / "chats.jsonl"
    with chats.open("w") as file:
        for n, text in enumerate(texts):
            messages = [{"role": "user", "content": f"Paragraph {n}?"}, {"role": "assistant", "content": text}]
            system = [{"role": "system", "content": "Write <b>it</b> & <eos> down."}] * (n % 3 == 0)
            file.write(json.dumps({"messages": system + messages}) + "\n")
    (folder / "made").mkdir()
    made = Workdir(loaded(config_in(folder / "made")))
    rng = np.random.default_rng(0)
    for side in ("teacher", "student"):
        prepare.train_tokenizer(made.config, side, texts, made / "tokenizers" / side)
        model = learners.description(made, side)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), "float32"), model.abstract_params()
        )
        tokenizer = AutoTokenizer.from_pretrained(made / "tokenizers" / side)
        hub.save_pretrained(model, params, folder / side, tokenizer=tokenizer)
    paths = {f"{side}.path": folder / side for side in ("teacher", "student")}
    path = config_in(folder, **paths, **{"data.files": chats})
    prepare.main(loaded(path))
    work = Workdir(loaded(path))
    stage = work.begin("projection")
    Projection.build(**learners.tables_of(work), corpus=texts, k=8).save(stage.folder)
    stage.finish()
    return path


def look(path: str, *arguments) -> int:
    return cli.main(["inspect", "--config", path, *map(str, arguments)])


def test_a_prepared_corpus_is_shown_with_what_the_models_expect(brought, capsys):
    assert look(brought, "--rows", 1, "--split", "test", "--predict", "--characters", 100000) == 0
    said = capsys.readouterr().out
    work = Workdir(loaded(brought))
    file = work / "inspect" / "index.html"
    assert "the same as a page:" in said and "test, document" in said and "projection: as fitted" in said
    page = Page(file.read_text())
    tables = learners.tables_of(work)
    found = samples.of_corpus(work, "test", 1, tables, 100000)
    examples = [sample.example for sample in found]
    for side in ("student", "teacher"):
        tokens = np.concatenate([e[f"{side}_tokens"] for e in examples]).tolist()
        shown = page.of(side)
        assert [token["text"] for token in shown] == [samples.label(tables[side], token) for token in tokens]
        learned = np.concatenate([e[f"{side}_supervised"] for e in examples])
        assert ["learned" in token["kinds"] for token in shown] == learned.tolist() and learned.any()
    roles = [ROLES[role] for e in examples for role in e["role"]]
    assert [token["kinds"][-1] for token in page.of("student")] == roles and {"root", "none", "interior"} <= set(roles)

    # The expectations, from whole logits and a whole W.
    models = {side: dj.load_pretrained(work.config[side].path) for side in ("student", "teacher")}
    W = Projection.load(work / "projection", **tables)
    dense = np.zeros((len(W.ids), W.student_vocab))
    np.add.at(dense, (np.arange(len(W.ids))[:, None], W.ids), np.where(W.ids < 0, 0, W.weights()))
    shown = {side: iter(page.of(side)) for side in ("student", "teacher")}
    for e in examples:
        p = {}
        for side, (model, params) in models.items():
            logits = np.asarray(jax.jit(model.apply)(params, e[f"{side}_tokens"][None])[0], np.float64)
            p[side] = np.exp(logits - logits.max(1, keepdims=True))
            p[side] /= p[side].sum(1, keepdims=True)
        q = p["teacher"] * W.mapped
        through = (q / q.sum(1, keepdims=True)) @ dense
        for i in range(len(e["student_tokens"])):
            more = next(shown["student"])["more"]
            check_top(more, "the student expected", p["student"][i - 1] if i else None, tables["student"])
            at = e["teacher_index"][i]
            known = e["role"][i] == ROOT and at > 0
            check_top(more, "the teacher through W expected", through[at - 1] if known else None, tables["student"])
        for j in range(len(e["teacher_tokens"])):
            more = next(shown["teacher"])["more"]
            check_top(more, "the teacher expected", p["teacher"][j - 1] if j else None, tables["teacher"])


def check_top(more: str, title: str, p_V, table) -> None:
    """The five likeliest tokens of a distribution stand under `title`, with their probabilities; without one, none."""
    lines = more.split("\n")
    if p_V is None:
        assert f"{title}:" not in lines
        return
    first = lines.index(f"{title}:") + 1
    listed = [re.fullmatch(r"  (\d\.\d+)  (.*)  id (\d+)", line).groups() for line in lines[first : first + 5]]
    best = np.sort(p_V)[::-1][:5]
    assert np.allclose([float(probability) for probability, _, _ in listed], best, atol=6e-4)
    assert np.allclose([p_V[int(i)] for _, _, i in listed], best, rtol=1e-4)  # ties may stand in either order
    assert [name for _, name, _ in listed] == [samples.label(table, int(i)) for _, _, i in listed]


def test_conversations_are_learned_where_the_assistant_speaks(brought, capsys):
    assert look(brought, "--rows", 20, "--no-models") == 0
    said = capsys.readouterr().out
    assert "no-models" not in said and "student:" not in said
    work = Workdir(loaded(brought))
    share = work.require("corpus")["chat"]["train"]
    assert share["rows"] > 100 and 0.5 < share["supervised"] < 0.95
    tables = learners.tables_of(work)
    documents = {}
    for split in ("validation", "test"):
        lines = map(json.loads, (work / "corpus" / "documents.jsonl").read_text().splitlines())
        documents = {d["document"]: d for d in lines if d["split"] == split}
        found = samples.of_corpus(work, split, 20, tables, 10)
        assert found
        for e in (sample.example for sample in found):
            for side in ("student", "teacher"):
                ids = e[f"{side}_tokens"][e[f"{side}_supervised"]]
                answer = documents[e["document"]]["messages"][-1]["content"]
                assert tables[side].decode_bytes(ids).decode() == answer
                assert ids[-1] == tables[side].roles["end_of_turn"]


def test_models_trained_on_conversations_carry_the_template_and_are_asked_by_it(brought):
    work = Workdir(loaded(brought))
    for side, family in (("student", chat.LLAMA3), ("teacher", chat.GEMMA)):
        path = work.config[side].path
        assert AutoTokenizer.from_pretrained(path).chat_template is None
        tokenizer = learners.hf_tokenizer(work, side)  # what is saved beside a trained model
        assert tokenizer.chat_template == chat.jinja(family)
        table = dj.ByteTable.from_tokenizer(tokenizer)
        model = hub.load_model(path)
        ids = [
            Codec(how).encode(model, prompt, max_new_tokens=5, chat=True).tolist()
            for prompt in ("What is Ageusia?", [{"role": "user", "content": " What is Ageusia?\n"}])
            for how in (tokenizer, table)
        ]
        assert all(one == ids[0] for one in ids) and table.decode_bytes(ids[0]).count(b"What is Ageusia?") == 1
        assert table.roles["end_of_turn"] in Codec(table).stop_ids(model, chat=True)


def test_an_exported_student_of_conversations_stops_at_the_end_of_a_turn(brought, tmp_path):
    work = Workdir(loaded(brought))
    tokenizer = learners.hf_tokenizer(work, "student")
    own = json.loads((Path(work.config.student.path) / "generation_config.json").read_text())
    stops = export.generation_config_of(work, tokenizer)
    model, params = dj.load_pretrained(work.config.student.path)
    folder = hub.save_pretrained(model, params, tmp_path / "out", tokenizer=tokenizer, generation_config=stops)
    roles = dj.ByteTable.from_tokenizer(folder).roles
    assert own["eos_token_id"] == roles["eos"]  # the student as it came knows of no turns
    assert hub.load_model(folder).config.eos_token_id == (roles["eos"], roles["end_of_turn"])
    assert AutoTokenizer.from_pretrained(folder).chat_template == chat.jinja(chat.LLAMA3)


def test_two_tokenizers_are_enough_for_a_text(brought, tmp_path, capsys, monkeypatch):
    """No config.json, no weights, no corpus; and nothing in the text can act on the terminal or the page."""
    for side in ("teacher", "student"):
        (tmp_path / side).mkdir()
        shutil.copy(Path(loaded(brought)[side].path) / "tokenizer.json", tmp_path / side)
    bare = config_in(tmp_path, **{f"{side}.path": tmp_path / side for side in ("teacher", "student")})
    evil = "12.5 mg </span><script>alert(1)</script>\x1b[31m & \u202e<eos> [bold]x[/bold] é🧬"
    out = tmp_path / "out" / "page.html"
    assert look(bare, "--text", evil, "--out", out) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u202e" not in said and "<0x1B>" in said
    assert "no student:" in said and "no teacher:" in said and "config.json is missing" in said
    page = out.read_text()
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page and "http" not in page
    table = dj.ByteTable.from_tokenizer(tmp_path / "student")
    tokens = [table.roles["bos"], *table.encode(evil).tolist(), table.roles["eos"]]
    assert [token["text"] for token in Page(page).of("student")] == [samples.label(table, i) for i in tokens]

    monkeypatch.setenv("FORCE_COLOR", "1")
    assert look(bare, "--text", evil, "--out", out, "--no-models") == 0
    coloured = capsys.readouterr().out
    assert "\x1b[1;4;32m" in coloured  # a root that is learned: bold, underlined, green
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).splitlines()[0] == said.splitlines()[0]
    assert "\u202e" not in coloured and set(re.findall(r"\x1b[^\[]", coloured)) == set()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--text", ""), "--text is empty"),
        (("--text", "\ud800"), "lone surrogate"),
        (("--rows", "0"), "--rows 0"),
        (("--split", "dev"), "invalid choice: 'dev'"),
        (("--predict", "--no-models"), "give one of the two"),
        (("--textt", "a"), "unrecognized arguments: --textt"),
        (("--config.seeed=1",), "did you mean '--config.seed'"),
        ((), "run `distil-jax prepare`"),
    ],
)
def test_what_cannot_be_shown_is_one_line(brought, tmp_path, capsys, arguments, named):
    other = config_in(tmp_path, **{f"{s}.path": loaded(brought)[s].path for s in ("teacher", "student")})
    assert look(other, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and named in said


def test_a_text_without_any_tokenizer_says_what_makes_them(tmp_path, capsys):
    assert look(config_in(tmp_path), "--text", "a") == 2
    assert "run `distil-jax prepare`" in capsys.readouterr().err


def test_conversation_groups_of_differing_templates(brought):
    """Templates of other lengths stand side by side, contents over each other."""
    tables = learners.tables_of(Workdir(loaded(brought)))
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "12 é"},
        {"role": "assistant", "content": "Heart."},
    ]
    for student, teacher in (("student", "teacher"), ("teacher", "student")):
        ((example,), _) = make_examples([{"messages": messages}], tables[student], tables[teacher])
        check_groups(example, tables[student], tables[teacher])
