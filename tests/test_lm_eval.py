"""What lm-evaluation-harness says itself: the same prompts, the same numbers, our model under its own evaluation."""

import json
import sys
from pathlib import Path

import exams
import jax
import lm_eval
import numpy as np
import pytest
import transformers
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from distil_jax.errors import UserError
from distil_jax.eval import benchmarks, lm_eval_model, records, tasks
from distil_jax.eval.encoding import Encoder, Request
from distil_jax.eval.scoring import Scorer
from distil_jax.models import load_pretrained
from distil_jax.sharding import mesh_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

YAML = {
    **{name: f"mmlu/default/{name}.yaml" for name in tasks.GROUPS["mmlu_medical"]},
    "medmcqa": "medmcqa/medmcqa.yaml",
    "medqa_4options": "medqa/medqa.yaml",
    "pubmedqa": "pubmedqa/pubmedqa.yaml",
    "headqa_en": "headqa/headqa_en.yaml",
    "careqa_en": "careqa/careqa_en.yaml",
}
ASKED = {"mmlu_anatomy": 2, "medqa_4options": 5, "headqa_en": 0, "pubmedqa": 0}
LONGEST = 512  # tokens of the models' context: five examples of medqa_4options are longer, so some requests are cut


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return exams.write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=["llama", "gemma"])
def directory(request, tmp_path_factory):
    return exams.random_model(tmp_path_factory.mktemp(request.param), request.param, max_positions=LONGEST)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return exams.random_model(tmp_path_factory.mktemp("llama"), "llama", max_positions=LONGEST)


def theirs(name: str, data: Path, cache: Path, shots: int) -> ConfigurableTask:
    """The harness's own task, made from its yaml, on our files."""
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / YAML[name])
    config.pop("tag", None)
    task = tasks.TASKS[name]
    splits = {s: records.files(task, s, data) for s in ("train", "validation", "dev", "test") if has(task, s, data)}
    kind = {".parquet": "parquet"}.get(next(iter(splits.values()))[0].suffix, "json")
    config |= {"dataset_path": kind, "dataset_name": None, "num_fewshot": shots}
    config["dataset_kwargs"] = {
        "data_files": {s: [str(f) for f in found] for s, found in splits.items()},
        "cache_dir": str(cache),
    }
    made = ConfigurableTask(config=config)
    made.set_fewshot_seed(1234)  # as its evaluator does
    return made


def has(task, split, data):
    try:
        return bool(records.files(task, split, data))
    except UserError:
        return False


@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompts_and_choices_are_byte_for_byte_the_harness_s(name, data, tmp_path):
    for shots in (0, 5):
        task = theirs(name, data, tmp_path, shots)
        task.build_all_requests()
        (exam,) = benchmarks.exams([name], data, [shots])
        assert exam.pairs == [instance.args for instance in task.instances]
        golds = [task.doc_to_target(doc) for doc in task.eval_docs]
        assert [item.gold for item in exam.items] == [
            gold if isinstance(gold, int) else task.doc_to_choice(None).index(gold) for gold in golds
        ]


def test_the_hub_s_names_are_the_harness_s():
    for name, file in YAML.items():
        config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
        task = tasks.TASKS[name]
        assert (task.hub, task.config) == (config["dataset_path"], config.get("dataset_name", ""))
        assert task.split == config["test_split"]
        assert task.shots_split == (config.get("fewshot_split") or config.get("training_split") or task.split)
    group = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "benchmarks" / "multimedqa" / "multimedqa.yaml")
    assert sorted(tasks.GROUPS["multimedqa"]) == sorted(t if isinstance(t, str) else t["task"] for t in group["task"])


def test_the_native_path_and_torch_say_the_same(directory, data):
    """Log-likelihoods within 1e-3 and the same choice for every item, with shared examples, choices of several tokens,
    a sliding window shorter than the examples, and requests that are longer than the context."""
    found = [exam for name, shots in ASKED.items() for exam in benchmarks.exams([name], data, [shots])]
    pairs = [pair for exam in found for pair in exam.pairs]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model, params = load_pretrained(directory)
    scorer = Scorer(model, params)
    ours = scorer(Encoder(tokenizer).requests(pairs))
    lm = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=16)
    want = lm.loglikelihood(instances(pairs), disable_tqdm=True)
    np.testing.assert_allclose([s.nats for s in ours], [nats for nats, _ in want], atol=1e-3)
    assert [s.greedy for s in ours] == [greedy for _, greedy in want]
    place = 0
    for exam in found:
        for item in exam.items:
            span = slice(place, place := place + len(item.choices))
            assert np.argmax([s.nats for s in ours[span]]) == np.argmax([nats for nats, _ in want[span]])
    assert scorer.work.cut > 0 and any(shape[0] for shape in scorer.work.shapes)  # some cut, some with a beginning


def instances(pairs):
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def test_odd_requests_are_tokenised_as_the_harness_does(llama):
    """No context, spaces at its end, a text that begins with the special token already, special tokens asked for."""
    bos = transformers.AutoTokenizer.from_pretrained(llama).bos_token
    pairs = [("", "heart"), ("the ", "heart"), ("the\n\n", " vein"), (bos + "the", " heart"), ("", bos + "the heart")]
    for add_bos in (None, False):
        lm = HFLM(pretrained=str(llama), device="cpu", dtype="float32", add_bos_token=add_bos)
        encoder = Encoder(transformers.AutoTokenizer.from_pretrained(llama), add_bos)
        seen = []
        lm._loglikelihood_tokens = lambda requests, seen=seen, **_: seen.extend(requests) or []
        lm.loglikelihood(instances(pairs), disable_tqdm=True)
        assert encoder.requests(pairs) == [Request(tuple(context), tuple(cont)) for _, context, cont in seen]


@pytest.fixture(scope="module")
def both(llama):
    """(our model in the harness, the harness's torch model), of one directory."""
    ours = lm_eval.api.registry.get_model("distil_jax").create_from_arg_string(
        f"path={llama},dtype=float32,batch_size=4", {"device": "cpu", "max_batch_size": None}
    )
    return ours, HFLM(pretrained=str(llama), device="cpu", dtype="float32", batch_size=4)


def test_the_harness_evaluates_our_model(both, data, tmp_path, monkeypatch):
    """Its own evaluation on local tasks: the same results as with its torch model, and as ours."""
    # It asks the machine for its drivers and packages, which takes longer than all else.
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    results = []
    for lm in both:
        chosen = [theirs(name, data, tmp_path, 3) for name in ("mmlu_virology", "headqa_en")]
        manager = TaskManager(include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=lm, tasks=chosen, num_fewshot=3, task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
        )
        results.append({name: {k: v for k, v in r.items() if "acc" in k} for name, r in found["results"].items()})
    assert results[0] == results[1] and set(results[0]) == {"mmlu_virology", "headqa_en"}
    native = benchmarks.answer(
        benchmarks.exams(["mmlu_virology", "headqa_en"], data, [3]), both[0].model, both[0].params, both[0].tokenizer
    )
    for result in native:
        for metric in ("acc", "acc_norm"):
            if f"{metric},none" in results[0][result.task]:
                assert result.right[metric].mean() == results[0][result.task][f"{metric},none"]


def test_rolling_likelihood_and_generation_are_those_of_torch(both):
    words = " ".join(exams.WORDS)
    texts = [words, words * 12, "vein"]  # the second is longer than the context
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    ours, want = (lm.loglikelihood_rolling(rolling, disable_tqdm=True) for lm in both)
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-3)
    how = {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    free = {"until": [], "max_gen_toks": 8}
    asked = [Instance("generate_until", {}, (text, how), i) for i, text in enumerate(("the heart", "vein of the", "a"))]
    asked += [Instance("generate_until", {}, (text, free), i) for i, text in enumerate(("fever", words * 12))]
    ours, want = (lm.generate_until(asked, disable_tqdm=True) for lm in both)
    assert ours == want and any(ours)


def test_the_harness_s_command_knows_our_model(llama, tmp_path, monkeypatch):
    """`python -m distil_jax.eval.lm_eval_model` is `lm_eval` that knows the model: arguments in, results file out."""
    yaml = tmp_path / "tasks" / "ward.yaml"
    yaml.parent.mkdir()
    rows = [{"q": f"the {w}", "gold": i % 2} for i, w in enumerate(("heart", "vein", "drug"))]
    file = exams.write(tmp_path / "ward.jsonl", rows)
    yaml.write_text(
        f"task: ward\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {file}}}\n  cache_dir: {tmp_path}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: gold\n'
        'doc_to_choice: ["yes", "no"]\n'
    )
    arguments = ["--model", "distil_jax", "--model_args", f"path={llama},dtype=float32", "--tasks", str(yaml)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--output_path", str(tmp_path / "out")])
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    lm_eval_model.main()
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["ward"]["acc,none"] <= 1


@pytest.mark.parametrize("arguments", ["", "path=a,pretrained=b", "path=a,peft=c"])
def test_arguments_that_are_wrong_are_told(arguments):
    with pytest.raises(UserError, match="model_args of distil_jax"):
        lm_eval.api.registry.get_model("distil_jax").create_from_arg_string(arguments, {"device": "cpu"})


def test_eight_devices_say_what_one_says(llama, data):
    """Rows over data and fsdp, parameters over fsdp and tensor."""
    pairs = [pair for exam in benchmarks.exams(["mmlu_virology", "headqa_en"], data, [2]) for pair in exam.pairs]
    requests = Encoder(transformers.AutoTokenizer.from_pretrained(llama)).requests(pairs)
    alone = Scorer(*load_pretrained(llama))(requests)
    mesh = mesh_of("data:2,fsdp:2,tensor:2")
    with jax.set_mesh(mesh):
        spread = Scorer(*load_pretrained(llama, mesh=mesh), mesh=mesh)(requests)
    np.testing.assert_allclose([s.nats for s in spread], [s.nats for s in alone], atol=1e-4)
    assert [s.greedy for s in spread] == [s.greedy for s in alone]
