"""The page of finished work folders: whole without a model, safe whatever its data say, and several runs in one."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distil_jax import cli, manifest
from distil_jax.errors import UserError
from distil_jax.eval import answers, comparison
from distil_jax.eval.answers import Answers
from distil_jax.page import elements
from distil_jax.page.command import write
from distil_jax.page.figures import Plots, bars
from distil_jax.page.record import Record

PROJECT = Path(__file__).resolve().parent.parent
HOSTILE = (
    "</style></title><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<!-- ]]> --> <![CDATA[",
    "$\\frac{1 & \\undefined $ $$",
    "\u202eevil \ue000 \x00\x1b[31m \u2028",
    "javascript:alert(1) url(http://x.invalid/) }; @import 'x'",
    "&lt;script&gt; &#60;b&#62; {{7*7}} %s {0}",
)


class Words:
    """Texts for every place of a folder that a user fills: plain, or hostile, each with a number of its own."""

    def __init__(self, hostile: bool):
        self.hostile, self.made = hostile, []

    def __call__(self, word: str) -> str:
        if not self.hostile:
            return word
        mark = f"mark{len(self.made)}x"
        # The mark comes first: labels in plots are short.
        text = f"{mark}{HOSTILE[len(self.made) % len(HOSTILE)]}"
        self.made.append(mark)
        return text


def interval(value, width=0.1):
    return [value - width, value + width]


def in_a_path(word: str) -> str:
    """The word as the name of a file in a folder, which the page leaves out."""
    return f"/a/folder/{word.replace('/', '_')}"


def folder_of(root: Path, words: Words, *, distilled=1.75, tasks=True) -> Path:
    """A small finished work folder, as the stages leave it."""
    models = {"teacher": 1.6, "student_before": 3.5, "control": 1.8, "distilled": distilled}

    def measures(bits):
        found = {"parameters": 1000, "bits_per_byte": bits, "bits_per_byte_interval": interval(bits)}
        for name in ("token_accuracy", "agreement_with_teacher"):
            found |= {name: 0.25, f"{name}_interval": [0.2, 0.3]}
        return found | {"by_class": {"word": {"bits_per_byte": bits, "accuracy": 0.2}}}

    def gain(other):
        value = models[other] - models["distilled"]
        return {"bits_per_byte": value, "interval": interval(value, 0.01)}

    differences = {f"{other} - distilled": gain(other) for other in ("control", "teacher", "student_before")}
    given = {}
    for n, model in enumerate(models if tasks else ()):
        rng = np.random.default_rng(n)
        if n == 0:
            names = [words("mmlu_anatomy"), words("mmlu_virology")]
            names += ["medmcqa_none_of_the_above", "medmcqa_none_of_the_above_control"]
        given[model] = [
            Answers(
                name,
                0,
                tuple(f"q{i}" for i in range(30)),
                rng.integers(0, 3, 30),
                np.log(rng.dirichlet([1] * 3, 30)),
                np.ones((30, 3), np.int64),
            )  # fmt: skip
            for name in names
        ]
        gold = given["teacher"][0].gold_I
        given[model] = [Answers(a.task, 0, a.ids, gold, a.loglikelihood_IxC, a.bytes_IxC) for a in given[model]]
    root.mkdir(parents=True)
    (root / "evaluate" / "answers").mkdir(parents=True)
    for model, of_model in given.items():
        answers.save(root / "evaluate" / "answers" / f"{model}.json", model, of_model)
    specialty, source = words("cardiology"), in_a_path(words("notes.jsonl"))
    kept = {"positions": 9, "kl_to_teacher": 0.5, "kl_to_teacher_interval": [0.4, 0.6]}
    kept |= {"agreement_with_teacher": 0.25, "agreement_with_teacher_interval": [0.2, 0.3]}
    retention = kept | {"by_class": {"word": kept}, "by_specialty": {specialty: kept}}
    manifest.write(
        root / "evaluate", "k", documents=3, bytes=9, models={}, differences=differences,
        retention=dict.fromkeys(("student_before", "control", "distilled"), retention),
        bits_per_byte_by_specialty={specialty: models},
        differences_by_specialty={specialty: {"control - distilled": gain("control")}},
    )  # fmt: skip
    ip = {"ip_kl": 0.95, "ip_kl_interval": [0.94, 0.96], "ip_bpb": 0.9, "ip_bpb_interval": [0.8, 1.0], "positions": 10}
    fitted = ip | {"lost": {"projected": 0.05, "pieces": 0.0, "tail": 0.1}, "by_class": {"word": ip}}
    (root / "projection").mkdir()
    manifest.write(root / "projection", "k", fitted=fitted, shuffled=ip, sorted_match={"ip_kl": 0.1})
    (root / "corpus").mkdir()
    manifest.write(
        root / "corpus", "k",
        provenance={"source": words("HPO"), words("note"): "x", "licences": {words("HPO: CC-BY"): 12}},
        sources={"train": {source: 10, "test": 1}, "test": {source: 2}}, rows={"train": 9, "test": 2},
        quarantined={words("too long"): 3}, quarantined_by_source={in_a_path(words("notes")): {"too long": 3}},
        mended={words("quotes"): 1},
        contamination={in_a_path(words("notes")): {words("mmlu_anatomy"): {"rows": 2, "examples": []}}},
    )  # fmt: skip
    for run in ("teacher", "control", "distilled"):
        (root / run).mkdir()
        lines = [{"step": n, "time": n, "loss": 3 / (n + 1), "ce": float(n), "temperature": 1.0, "gradient_norm": 0.5,
                  "learning_rate": 0.1, "ce/odd": 1.0} for n in range(4)]  # fmt: skip
        lines[2]["loss"] = "nan"
        (root / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (root / run / "timing.jsonl").write_text('{"step": 2, "time": 1, "tokens_per_second": 900.0}\n')
    token = {"side": "student", "start": 0, "end": 1, "text": words("dose"), "classes": ["student", "learned", "root"]}
    its = token | {"side": "teacher", "text": words("dose"), "classes": ["teacher", "learned"]}
    told = {
        "answers": [{"prompt": words("What is it?"), "reference": words("That."), "teacher": words("This."),
                     "student_before": words("Eh."), "control": words("No."), "distilled": words("Yes.")}],
        "sentence": {
            "text": "dose",
            "alignment": [{"columns": 1, "tokens": [token, its]}],
            "attention": {"student": "distilled", "labels": [words("dose"), words("of")],
                          "layers": {"student": [0], "teacher": [1]},
                          "maps": {side: [[[1.0, 0.0], [0.5, 0.5]]] for side in ("student", "teacher")}},
            "projection": {"rows": [[words("dose"), [[words("dos"), 0.9]]]],
                           "kept": {"word": {"tokens": 5, "named": 0.9}}},
        },
        "calibration": {model: {"tokens": 10, "accuracy": 0.5, "confidence": 0.6, "ece": 0.1,
                                "ece_interval": [0.0, 0.2],
                                "curve": [[4, 0.2, 0.1, 0.0, 0.3], [6, 0.8, 0.9, 0.8, 1.0]]} for model in models},
        "speed": {"protocol": {"prompt_tokens": 8, "new_tokens": 4, "batch": 1, "turns": 2, "warm_up": 1},
                  "device": words("1 x cpu"), "against": "teacher", "models": {
                      name: {"parameters": 10, "dtype": "float32",
                             "tokens_per_second": {"prefill": 5.0, "decode": 4.0, "whole": 3.0}}
                      for name in ("teacher", words("distilled"))}, "ratios": {}},
        "config": {"seed": 0, "data.benchmarks": words("anatomy.jsonl"), "workdir": words("work/mine"),
                   f"variants.distilled.{words('note')}": words("hot"), "student.training.steps": int(distilled * 100)},
    }  # fmt: skip
    (root / "report").mkdir()
    (root / "report" / "exhibits.json").write_text(json.dumps(told))
    summary = {name: measures(bits) for name, bits in models.items()}
    summary |= {"variants": {}, "runs": ["control", "distilled"], "differences": differences, "seed": 0}
    summary["difference"] = differences["control - distilled"] | {
        "of": "control - distilled",
        "verdict": words("better"),
    }
    summary["seconds_of_the_teacher"] = {words("training it"): 2.0}
    summary["seconds_per_step"] = {"control": 0.1, "distilled": 0.2}
    summary |= {"alignment": {"root": 0.9, "interior": 0.1, "crossing": 0.0}, "seconds": {"total": 3.0}}
    summary |= {"peak_memory_bytes": 5, "versions": {words("jax"): words("0.10")}}
    summary["benchmarks"] = comparison.compared(given, ["distilled"], 50) if tasks else {}
    (root / "summary.json").write_text(json.dumps(summary))
    return root


class Seen(html.parser.HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.comments = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.comments += 1

    def unknown_decl(self, data):
        self.comments += 1


# All that a page of ours is made of; what is not here cannot act.
TAGS = set(
    "html head meta title style body h1 h2 h3 p nav a main section div table tr th td figure figcaption svg g path "
    "text use defs line image clippath rect span details summary pre b ul li".split()
)
LOADING = ("src", "href", "xlink:href", "action", "formaction", "srcset", "data", "poster", "background")


def check_is_inert(page: str) -> Seen:
    seen = Seen(page)
    assert {tag for tag, _ in seen.tags} <= TAGS
    for tag, attributes in seen.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in LOADING:
                assert re.fullmatch(r"#[A-Za-z0-9]+|data:image/png;base64,[A-Za-z0-9+/=\s]*", value), (tag, name, value)
            elif name == "style":
                assert "url(" not in value.replace("url(#", "") and "import" not in value, value
    policy = next(a["content"] for tag, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy
    assert seen.comments == 0
    return seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("finished") / "work", Words(False))


def test_no_text_of_a_user_acts_on_the_page_and_all_of_it_is_shown(tmp_path):
    words = Words(True)
    name = "<img src=x onerror=alert(1)>$_{"
    folder = folder_of(tmp_path / name, words)
    write([folder], tmp_path / "page" / "index.html")
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    seen = check_is_inert(page)
    assert page.count("<style>") == 1 and "<script" not in page and "\u202e" not in page and "\x00" not in page
    assert name in seen.text
    hidden = [mark for mark in words.made if mark not in seen.text]
    assert hidden == [] and len(words.made) > 30
    for text in HOSTILE[:4]:  # what the reader reads is what was there
        assert text in seen.text, text


def test_a_page_holds_everything_that_was_promised(finished, tmp_path):
    out = tmp_path / "index.html"
    write([finished], out)
    page = out.read_text(encoding="utf-8")
    seen = check_is_inert(page)
    sections = [a["id"] for tag, a in seen.tags if tag == "section"]
    wanted = (
        "results specialties benchmarks reliability training speed projection alignment attention answers data settings"
    )
    assert sections == wanted.split()
    for said in ("control - distilled: +0.0500", "Research only", "p (exact)", "mean by size over all tasks", "Brier"):
        assert said.replace("p (exact)", "(exact)") in seen.text, said
    assert "was not searched for the questions of" in seen.text and "mmlu_virology" in seen.text
    assert "2 rows of notes held questions of mmlu_anatomy" in seen.text
    plots = sorted(p.stem for p in (tmp_path / "plots").glob("*.png"))
    for curve in ("loss", "ce", "temperature", "learning_rate", "gradient_norm", "tokens_per_second"):
        assert f"curve_{curve}" in plots
    for other in ("reliability", "reliability_of_tasks", "abstention", "specialties", "information", "bits_per_byte"):
        assert other in plots
    assert all((tmp_path / "plots" / f"{p}.png").read_bytes()[:4] == b"\x89PNG" for p in plots)
    assert page.count("<figure") == len(plots)
    # Every colour of a plot is one of the page's, which has another value in the dark.
    drawn = page[page.index("<main>") :]
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", drawn)) == set()
    assert "prefers-color-scheme: dark" in page and "http" not in re.sub(r"http-equiv|https?_", "", page)


def test_several_runs_stand_beside_each_other(finished, tmp_path, capsys):
    other = folder_of(tmp_path / "other", Words(False), distilled=1.7, tasks=False)
    out = tmp_path / "both.html"
    assert cli.main(["report", str(finished), str(other), "--out", str(out)]) == 0
    assert f"report: {out}" in capsys.readouterr().out
    seen = check_is_inert(out.read_text(encoding="utf-8"))
    for name, bits in (("work", "1.7500"), ("other", "1.7000")):
        assert f"{name}: student, distilled" in seen.text and bits in seen.text
        assert f"{name}: control - distilled" in seen.text
    differing = seen.text[seen.text.index("Keys that differ") :]
    assert "student.training.steps" in differing[:200] and "175" in differing[:200] and "170" in differing[:200]
    assert len({text for text in ("work: teacher", "other: teacher") if text in seen.text}) == 2


def test_one_folder_is_written_where_its_page_belongs(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "copied"))
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report" / "index.html").is_file() and (folder / "report" / "plots" / "curve_loss.png").is_file()


def test_a_page_needs_no_model(finished, tmp_path):
    """Neither JAX's devices nor a tokenizer: a page of big runs is made on any machine."""
    code = (
        "import sys; from distil_jax.page.command import main; "
        f"main([{str(finished)!r}, '--out', {str(tmp_path / 'x.html')!r}]); "
        "sys.exit(len({'flax', 'transformers', 'tokenizers', 'grain', 'orbax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=60).returncode == 0


def test_what_cannot_be_reported_is_one_line_that_says_what_to_do(finished, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    without = Path(shutil.copytree(finished, tmp_path / "without"))
    (without / "report" / "exhibits.json").unlink()
    broken = Path(shutil.copytree(finished, tmp_path / "broken"))
    (broken / "summary.json").write_text("[1, 2")
    out = ["--out", str(tmp_path / "x.html")]
    for arguments, said in (
        ([str(tmp_path / "empty")], "summary.json: "),
        ([str(without)], "exhibits.json"),
        ([str(broken)], "cannot be read"),
        ([str(finished), str(without)], "several folders need --out"),
        ([str(finished), str(finished), *out], "given twice"),
        ([str(finished), "--out", str(tmp_path / "broken" / "summary.json" / "page.html")], "cannot be written"),
        ([], "required: DIR"),
    ):
        assert cli.main(["report", *arguments]) == 2, arguments
        told = capsys.readouterr().err
        assert said in told and told.startswith("error: ") and told.count("\n") == 1, told


def test_answers_of_models_to_other_items_are_refused(finished, tmp_path):
    record = Record.read(finished)
    given = dict(record.answers)
    first = given["control"][0]
    given["control"] = [Answers(first.task, 0, first.ids[::-1], first.gold_I, first.loglikelihood_IxC, first.bytes_IxC)]
    with pytest.raises(UserError, match="the same files"):
        comparison.compared(given, ["distilled"], 10)


def test_texts_show_what_they_hold():
    assert elements.plain("a\u202eb\x00\ud800\u2028") == "a<U+202E>b<U+0000><U+D800><U+2028>"
    assert elements.plain("line\n\ttwo \U0001f469\u200d\u2695 ü") == "line\n\ttwo \U0001f469\u200d\u2695 ü"
    assert elements.text("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert elements.plain("x" * 50, 10) == "x" * 10 + "…"


def test_plots_of_hostile_names_are_drawn_and_kept_apart(tmp_path):
    plots = Plots(tmp_path)
    names = ["$\\frac{1$ <b>", "../../etc/passwd", "語 \u0301"]
    drawn = [plots.draw(f"of {name}", lambda axes: bars(axes, names, [1, 2, 3], above=True), "c") for name in names * 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in plots.written) and len(drawn) == 6
    assert all("$\\frac{1$ &lt;b&gt;" in one for one in drawn)


def test_what_was_not_asked_leaves_no_section(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "less"))
    told = json.loads((folder / "report" / "exhibits.json").read_text())
    (folder / "report" / "exhibits.json").write_text(json.dumps(told | {"answers": [], "calibration": {}, "speed": {}}))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"benchmarks": {}}))
    shutil.rmtree(folder / "evaluate" / "answers")
    write([folder], tmp_path / "less.html")
    seen = check_is_inert((tmp_path / "less.html").read_text(encoding="utf-8"))
    left = [a["id"] for tag, a in seen.tags if tag == "section"]
    assert left == "results specialties training projection alignment attention data settings".split()
