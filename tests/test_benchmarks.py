"""Benchmarks natively: known models score what they must, chance lies in its interval, bad files are told."""

import dataclasses
import json
from collections import Counter

import datasets
import exams
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

from distil_jax import cli
from distil_jax.errors import UserError
from distil_jax.eval import answers, benchmarks, prompts, questions, records, stage_tasks, tasks
from distil_jax.eval.encoding import Encoder, Request
from distil_jax.eval.scoring import Row, Scorer, beginnings, bucket, shared_bucket
from distil_jax.models import load_pretrained, save_pretrained

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return exams.write_all(tmp_path_factory.mktemp("data"), items=60)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return exams.random_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def model(directory):
    """(model, parameters, tokenizer)"""
    return *load_pretrained(directory), transformers.AutoTokenizer.from_pretrained(directory)


def preferring(model, params, token: int):
    """Parameters that make one token the likeliest everywhere: blocks add nothing, and what every input has in common
    points at that token's row of the head."""
    zero = jax.tree.map(jnp.zeros_like, params["layers"])
    D = model.config.hidden_size
    embedding = jnp.ones_like(params["embedding"])
    head = jnp.zeros_like(params["lm_head"]).at[token].set(1.0)
    norm = {"scale": jnp.ones(D)}
    return params | {"layers": zero, "embedding": embedding, "lm_head": head, "final_norm": norm}


def letter(tokenizer, text: str) -> int:
    (request,) = Encoder(tokenizer).requests([("Answer:", f" {text}")])
    assert len(request.continuation) == 1
    return request.continuation[0]


def test_a_model_that_prefers_a_letter_scores_the_share_of_that_letter(model, data):
    loaded, params, tokenizer = model
    for name, place in (("A", 0), ("C", 2)):
        found = benchmarks.exams(["mmlu_virology", "medmcqa"], data, [0], limit=20)
        results = benchmarks.answer(found, loaded, preferring(loaded, params, letter(tokenizer, name)), tokenizer)
        for result, exam in zip(results, found, strict=True):
            golds = np.array([item.gold for item in exam.items])
            assert result.right["acc"].mean() == result.right["acc_norm"].mean() == (golds == place).mean()
            np.testing.assert_array_equal(result.answers.chosen(), place)
            assert result.right["exact_match"].mean() == (golds == place).mean()  # the letter is what it writes


def test_a_model_that_learned_the_answers_scores_all_of_them(model, data):
    """A few dozen steps on eight questions with their answers, then the same questions."""
    loaded, params, tokenizer = model
    (exam,) = benchmarks.exams(["medmcqa"], data, [0], limit=8)
    right = [(item.context, " " + item.choices[item.gold]) for item in exam.items]
    requests = Encoder(tokenizer).requests(right)
    longest = max(len(r.context) for r in requests)
    tokens = np.zeros((8, longest), np.int32)
    for row, r in enumerate(requests):
        tokens[row, : len(r.context)] = r.context
    last = jnp.array([len(r.context) - 1 for r in requests])
    labels = jnp.array([r.continuation[0] for r in requests])
    optimizer = optax.adam(1e-2)

    def loss(params):
        hidden = jnp.take_along_axis(loaded.hidden(params, tokens), last[:, None, None], axis=1)[:, 0]
        logits = hidden @ params["lm_head"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def update(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, change), state, value

    state, start = optimizer.init(params), loss(params)
    assert benchmarks.answer([exam], loaded, params, tokenizer)[0].right["acc"].mean() < 1
    for _ in range(60):
        params, state, value = update(params, state)
    assert value < 0.05 < start
    (result,) = benchmarks.answer([exam], loaded, params, tokenizer)
    assert result.right["acc"].mean() == result.right["exact_match"].mean() == 1.0


def test_a_random_model_scores_chance_within_the_interval(model, data):
    """480 items whose answers have nothing to do with their questions. Its own interval holds one quarter."""
    loaded, params, tokenizer = model
    found = benchmarks.exams(["mmlu_medical"], data, [0])
    results = benchmarks.answer(found, loaded, params, tokenizer)
    made = benchmarks.summary(results, ["mmlu_medical"], 500)
    (group,) = made["groups"]
    assert group["items"] == 480 and group["chance"] == 0.25
    for kind in ("macro", "by_size"):
        low, high = group[f"acc_{kind}_interval"]
        assert low <= 0.25 <= high and 0.06 < high - low < 0.1  # 3.92 sqrt(p (1 - p) / 480) is 0.077
    assert group["acc_macro"] == pytest.approx(np.mean([t["acc"] for t in made["tasks"]]))


def test_a_mean_by_size_counts_items_and_a_macro_mean_tasks():
    def result(task, right):
        values = {m: np.array(right, float) for m in ("acc", "acc_norm", "acc_bytes", "exact_match")}
        nothing = answers.Answers(task, 0, (), np.zeros(0, int), np.zeros((0, 4)), np.zeros((0, 4), int))
        return benchmarks.Result(task, 0, values, 0.25, nothing)

    results = [result("mmlu_anatomy", [1, 1, 1, 1, 1, 1]), result("mmlu_virology", [0, 0])]
    (group,) = benchmarks.summary(results, ["mmlu_medical"], 100)["groups"]
    assert group["acc_macro"] == 0.5 and group["acc_by_size"] == 0.75
    assert group["acc_macro_interval"] == [0.5, 0.5]


def test_what_contexts_begin_with_is_found_and_no_more_is_shared():
    few_shot, other = tuple(range(100, 400)), tuple(range(500, 700))
    rows = [Row(few_shot + (i, i + 1, 7)) for i in range(20)] + [Row(other + (i, 8)) for i in range(20)]
    rows += [Row((1, 2, i)) for i in range(20)]  # three tokens in common: not worth a pass
    groups = {shared: members for shared, members in beginnings(rows)}
    assert set(groups) == {300, 200, 0} and {len(m) for m in groups.values()} == {20}
    assert sorted(r.context for m in groups.values() for r in m) == sorted(r.context for r in rows)
    # A context that is another's beginning keeps a token of its own; one alone shares nothing.
    assert beginnings([Row(few_shot), Row((*few_shot, 1))])[0][0] == 299
    assert beginnings([Row(few_shot)]) == [(0, [Row(few_shot)])] and beginnings([]) == []


def test_few_shapes_and_little_padding():
    sizes = [bucket(n, 64) for n in range(1, 4097)]
    assert len(set(sizes)) == 13 and all(size >= n for n, size in enumerate(sizes, 1))
    assert max(size / n for n, size in enumerate(sizes, 1) if n > 64) < 1.52
    assert [shared_bucket(n) for n in (1, 256, 257, 700)] == [256, 256, 512, 1024]


def test_a_continuation_does_not_see_another_and_order_does_not_matter(model):
    """Each request alone, all together, and all the other way round."""
    loaded, params, _ = model
    rng = np.random.default_rng(0)
    ids = lambda n: tuple(int(i) for i in rng.integers(5, 330, n))  # noqa: E731
    begin = ids(300)
    requests = [Request(begin + ids(1 + i % 3), ids(1 + i % 4)) for i in range(6)]
    requests += [Request(requests[0].context, ids(n)) for n in (1, 3, 3)] + [Request(ids(2), ids(5)), requests[3]]
    scorer = Scorer(loaded, params)
    together = [s.nats for s in scorer(requests)]
    np.testing.assert_allclose(together, [s.nats for s in scorer(requests[::-1])][::-1], atol=1e-4)
    logits = loaded.apply(params, jnp.array([(r.context + r.continuation + (0,) * 320)[:320] for r in requests]))
    log_probs = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
    for n, r in enumerate(requests):
        places = len(r.context) - 1 + np.arange(len(r.continuation))
        assert together[n] == pytest.approx(log_probs[n, places, list(r.continuation)].sum(), abs=1e-3)
    with pytest.raises(UserError, match="longer than the model's"):
        scorer([Request((1,), ids(1025))])


def test_half_precision_chooses_nearly_as_float32(model, data, directory):
    loaded, params, tokenizer = model
    found = benchmarks.exams(["medmcqa"], data, [0])
    half = benchmarks.answer(found, *load_pretrained(directory, dtype="bfloat16"), tokenizer)[0].answers
    full = benchmarks.answer(found, loaded, params, tokenizer)[0].answers
    assert (half.chosen() == full.chosen()).mean() > 0.9
    assert np.abs(half.loglikelihood_IxC - full.loglikelihood_IxC).max() > 0  # it is another computation


# ---- files -----------------------------------------------------------------------------------------------------------


def own_rows():
    return [
        {"question": "the heart?", "choices": ["yes", "β no"], "answer": 1},
        {"question": "the vein? ", "choices": ["a", "b", "c"], "answer": "C"},
        {"question": "fever", "choices": ["a", "b"], "answer": "a"},
    ]


def test_a_file_of_one_s_own_is_a_task(tmp_path, model):
    file = exams.write(tmp_path / "ward.jsonl", own_rows())
    (exam,) = benchmarks.exams([str(file)], None, [0])
    assert exam.task.name == "ward" and [item.gold for item in exam.items] == [1, 2, 0]
    assert exam.pairs[0] == ("Question: the heart?\nA. yes\nB. β no\nAnswer:", " A")
    description = "About the ward.\\n\\n"
    task = 'name = "answers"\nfile = "ward.jsonl"\nformat = "answers"\nshots_file = "ward.jsonl"\n'
    (tmp_path / "task.toml").write_text(task + f'description = "{description}"\n')
    (exam,) = benchmarks.exams([str(tmp_path / "task.toml")], None, [2])
    shown = "About the ward.\n\nQuestion: the heart?\nAnswer: β no\n\nQuestion: the vein?\nAnswer: c\n\n"
    assert exam.pairs[-1] == (shown + "Question: fever\nAnswer:", " b")
    (result,) = benchmarks.answer([exam], *model)
    assert result.answers.bytes_IxC[0].tolist() == [3, 5, 0]
    assert result.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert np.isneginf(result.answers.loglikelihood_IxC[0, 2])
    csv = tmp_path / "ward.csv"
    csv.write_text('question,choices,answer\nthe heart?,"[""yes"", ""no""]",B\n')
    assert benchmarks.exams([str(csv)], None, [0])[0].items[0].gold == 1


def test_a_free_answer_matches_exactly_or_not(tmp_path, model):
    """The answers are what the model writes, but for one."""
    loaded, params, tokenizer = model
    rows = [{"question": w, "answer": "?"} for w in ("heart", "vein", "drug")]
    file, task = tmp_path / "free.jsonl", tmp_path / "free.json"
    task.write_text(json.dumps({"file": "free.jsonl", "format": "generate", "max_new_tokens": 6}))
    exams.write(file, rows)
    (first,) = benchmarks.answer(benchmarks.exams([str(task)], None, [0]), loaded, params, tokenizer)
    texts = [text for _, text in first.written]
    assert first.answers is None and len(set(texts)) > 1 and not any("\n" in text for text in texts)
    known = [row | {"answer": [text, "or this"]} for row, text in zip(rows, texts, strict=True)]
    exams.write(file, known[:2] + rows[2:])
    (second,) = benchmarks.answer(benchmarks.exams([str(task)], None, [0]), loaded, params, tokenizer)
    assert second.right["exact_match"].tolist() == [1, 1, 0]
    assert second.facts(50)["exact_match"] == pytest.approx(2 / 3)
    benchmarks.keep(tmp_path, "m", [second])
    kept = [json.loads(line) for line in (tmp_path / "written" / "m.jsonl").read_text().splitlines()]
    assert [row["text"] for row in kept] == texts and [row["right"] for row in kept] == [True, True, False]


PUBMED = "bigbio/pubmed_qa/pubmed_qa_labeled_fold0_source/test.jsonl"


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("medmcqa/data/validation-00000-of-00001.parquet", {"opc": ...}, r"validation-.*, row 1: no column 'opc'"),
        ("medmcqa/data/validation-00000-of-00001.parquet", {"cop": -1}, r"row 1: the answer is choice -1 of 4"),
        ("headqa/en/test.jsonl", {"answers": "none"}, r"test.jsonl, row 1: not an item of headqa_en"),
        ("headqa/en/test.jsonl", {"ra": None}, r"test.jsonl, row 1: not an item of headqa_en.*number of a choice"),
        (PUBMED, {"final_decision": "perhaps"}, "row 1: not an item"),
    ],
)
def test_a_bad_row_is_told_with_file_row_and_column(file, change, said, tmp_path):
    exams.write_all(tmp_path)
    name = {"medmcqa": "medmcqa", "headqa": "headqa_en", "bigbio": "pubmedqa"}[file.split("/")[0]]
    row = dict(records.load(tasks.TASKS[name], tasks.TASKS[name].split, tmp_path, 1)[0])
    row |= change
    exams.write(tmp_path / file, [{k: v for k, v in row.items() if v is not ...}])
    with pytest.raises(UserError, match=said):
        benchmarks.exams([name], tmp_path, [0])


def test_what_is_not_there_is_told(tmp_path):
    for names, folder, shots, said in (
        (["mmlu_anatomi"], tmp_path, 0, "did you mean 'mmlu_anatomy'"),
        (["medmcqa"], tmp_path / "none", 0, "is no folder"),
        (["medmcqa"], tmp_path, 0, "no folder 'medmcqa'.*openlifescienceai/medmcqa"),
        ([str(tmp_path / "none.jsonl")], None, 0, "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            benchmarks.exams(names, folder, [shots])
    exams.write_all(tmp_path)
    with pytest.raises(UserError, match="12 shots, and its train split has 9 examples"):
        benchmarks.exams(["medmcqa"], tmp_path, [12])
    (tmp_path / "medqa").mkdir()
    (tmp_path / "headqa/en/test.jsonl").unlink()
    with pytest.raises(UserError, match="no test split of headqa_en"):
        benchmarks.exams(["headqa_en"], tmp_path, [0])
    own = exams.write(tmp_path / "mine.jsonl", own_rows())
    with pytest.raises(UserError, match="shots need examples"):
        benchmarks.exams([str(own)], None, [1])
    (tmp_path / "task.toml").write_text('file = "mine.jsonl"\nformatt = "letters"\n')
    with pytest.raises(UserError, match="no key 'formatt' .did you mean 'format'"):
        benchmarks.exams([str(tmp_path / "task.toml")], None, [0])


def test_items_are_known_by_their_place_and_text(tmp_path):
    """So answers pair across numbers of shots of one file, and not across files."""
    exams.write_all(tmp_path)
    task = tasks.TASKS["medmcqa"]
    rows, examples = records.read(task, tmp_path, shots=2)
    ids = [[i.id for i in prompts.items(task, rows, examples, shots)] for shots in (0, 2)]
    assert ids[0] == ids[1] and len(set(ids[0])) == len(rows)
    assert [i.id for i in prompts.items(task, rows[1:], [], 0)] != ids[0][1:]


def test_a_dataset_of_the_hub_is_read_as_its_local_files_are(tmp_path, monkeypatch):
    """Through `datasets`, which takes a folder for a repository; the hub itself is not there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    exams.write_all(tmp_path)
    task = dataclasses.replace(tasks.MEDMCQA, hub=str(tmp_path / "medmcqa"))
    local = records.read(tasks.MEDMCQA, tmp_path, limit=5, shots=2)
    of_hub = records.read(task, None, limit=5, shots=2)
    asked = [[i for i in prompts.items(task, *of, 2)] for of in (local, of_hub)]
    assert asked[0] == asked[1] and len(asked[0]) == 5
    with pytest.raises(UserError, match="cannot be had from the hub"):
        records.read(dataclasses.replace(task, hub="no/such"), None)


def test_a_corpus_that_held_the_questions_is_told():
    (line,) = stage_tasks.told("test.jsonl", {"medmcqa": {"MedMCQA": {"rows": 3, "examples": []}}})
    assert "3 rows of medmcqa held questions of MedMCQA" in line
    assert "not searched" in stage_tasks.told("", {})[0] and not stage_tasks.told("test.jsonl", {})


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_scores_directories(directory, model, data, tmp_path, capsys):
    save_pretrained(model[0], preferring(*model[:2], letter(model[2], "B")), tmp_path / "b", tokenizer=model[2])
    out = tmp_path / "out"
    arguments = [str(directory), str(tmp_path / "b"), "--tasks", "mmlu_virology,medmcqa", "--data", str(data)]
    arguments += ["--shots", "0", "--limit", "20", "--out", str(out), "--mesh", "data:4,fsdp:2", "--bootstrap", "100"]
    assert cli.main(["evaluate", *arguments]) == 0
    said = capsys.readouterr().out
    assert "mmlu_virology" in said and "all, mean of tasks" in said and "25.0%" in said
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {directory.name, "b"}
    name, found = answers.load(out / "answers" / "b.json")
    assert name == "b" and [a.task for a in found] == ["mmlu_virology", "medmcqa"]
    for a, facts in zip(found, results["b"]["tasks"], strict=True):
        assert (a.chosen() == 1).all() and facts["acc"] == a.right().mean() and facts["items"] == 20
    _, others = answers.load(out / "answers" / f"{directory.name}.json")
    answers.paired(found[0], others[0])


def test_the_command_says_what_it_needs(directory, capsys):
    for arguments, said in (
        ([str(directory)], "--tasks"),
        (["--tasks", "medmcqa"], "give models"),
        ([str(directory), "--tasks", "medmcqa", "--shots", "five"], "--shots='five'"),
        ([str(directory), "--tasks", "medmcqa", "--step", "3"], "--step goes with"),
    ):
        assert cli.main(["evaluate", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_prepare_keeps_the_questions_of_tasks_out_of_a_corpus(data, tmp_path):
    own = exams.write(tmp_path / "own.jsonl", own_rows())
    names = ["multimedqa", "mmlu_medical", "headqa_en", "careqa_en", str(own)]
    found = questions.questions(names, str(data))
    by_task = Counter(item.benchmark for item in found)
    assert by_task == dict.fromkeys(tasks.TASKS, 60) | {"own": len(own_rows())}
    (lost,) = (item for item in found if item.question == tasks.CAREQA_LOST[0])
    assert lost.benchmark == "careqa_en" and len(lost.options) == 4
    assert all(item.question.strip() and (item.options or item.benchmark == "pubmedqa") for item in found)
    read = questions.files(names, str(data))
    assert len(read) == 8 + 5 + 1 and all(file.is_file() for file in read)
    assert questions.files(names, "hub") == [own]
    for name, root, said in (
        ("mmlu_anatomie", data, "did you mean 'mmlu_anatomy'"),
        ("exam.toml", data, "is no file of questions"),
        ("medmcqa", tmp_path, "clone the dataset openlifescienceai/medmcqa there"),
        ("medmcqa", f"tfds:{tmp_path}", "has no files of theirs"),
    ):
        with pytest.raises(UserError, match=said):
            questions.questions([name], str(root))
