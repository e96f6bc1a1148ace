"""What the report asks the models themselves: answers, how sure they are, what they attend to, how fast they write.

All of it goes to report/exhibits.json as plain values, from which pages are made without a model (page/).
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distil_jax import learners, sharding
from distil_jax.data.loader import Loader
from distil_jax.eval import confidence, speed
from distil_jax.generation import generate
from distil_jax.generation.text import Prompt
from distil_jax.look.mapping import goes_to
from distil_jax.look.samples import described, label, of_text, visible
from distil_jax.losses import attention
from distil_jax.projection import Projection
from distil_jax.speed import default_dtype
from distil_jax.tokens.align import CLASSES, token_classes
from distil_jax.tokens.bytes import ByteTable
from distil_jax.tokens.pack import Example, make_example, pack
from distil_jax.workdir import Workdir

SPLIT = "test"
CHARACTERS = 140  # of a sentence that is taken from the corpus
MOST_GROUPS = 32  # byte groups of a map that is shown
MOST_TOKENS = 24  # teacher tokens whose rows of W are shown
LENGTHS = 64  # a sentence is padded to a multiple of this

Load = Callable[[], tuple[Any, Any]]


def exhibits(config: ConfigDict, work: Workdir) -> dict[str, Any]:
    """{"answers", "sentence", "calibration", "speed"}; empty where the config asks for none. Each model is read once,
    and one is in memory at a time, but for the two whose speed is measured."""
    r, e = config.report, config.evaluation
    mesh, tables = learners.mesh_of(config), learners.tables_of(work)
    documents = held_out(work)
    chosen = spread(documents, e.answers)
    prompts = [asked(d) for d in chosen]
    answers = [{"prompt": d["prompt"], "reference": d["completion"]} for d in chosen]
    text = r.sentence or sentence(documents)
    rows = packed(make_example("", text, tables["student"], tables["teacher"]), mesh)
    maps, calibration = {}, {}
    with jax.set_mesh(mesh):
        models: dict[str, tuple[str, Load]] = {
            "teacher": ("teacher", lambda: learners.teacher(work, mesh)),
            "student_before": ("student", lambda: learners.untrained(work, "student", mesh)),
        }
        models |= {run: ("student", lambda run=run: learners.trained(work, run, mesh)) for run in config.runs}
        loader = Loader(work / "corpus", work.require("corpus")["shards"][SPLIT], e.batch_size, 0, verify=False)
        layers = chosen_layers(config, work)

        @functools.cache  # the students are one model, which compiles once
        def surest_of(side, model):
            return confidence.make_surest(model, side, mesh)

        for name, (side, load) in models.items():
            model, params = load()
            if prompts:
                texts = generate(model, params, tables[side], prompts, max_new_tokens=e.answer_tokens)
                for answer, written in zip(answers, texts, strict=True):
                    answer[name] = written
            if r.calibration_rows:
                batches = loader.sweep(e.batch_size, r.calibration_rows)
                found = confidence.gathered(surest_of(side, model), params, batches, side, mesh)
                calibration[name] = confidence.measure(*found.values(), samples=e.bootstrap)
            if name in ("teacher", config.export.run):
                maps[side] = attention_of(model, params, rows, side, layers[side], mesh)
            del model, params
        bytes_of = bytes_per_token(loader, tables, e.rows)
        timed = speed_of(config, work, mesh, bytes_of) if r.turns else {}
    shown = {
        "text": text,
        "alignment": described(of_text(text, tables, len(text)), tables),
        "attention": {
            "student": config.export.run,
            "labels": labels_of(rows, tables["student"]),
            "layers": layers,
            "maps": {side: np.round(values, 4).tolist() for side, values in maps.items()},
        },
        "projection": examples_of(work, tables, text),
    }
    return {"answers": answers, "sentence": shown, "calibration": calibration, "speed": timed}


# ---- texts -----------------------------------------------------------------------------------------------------------


def held_out(work: Workdir) -> list[dict[str, Any]]:
    """The documents of the test split that ask something and are answered."""
    lines = (work / "corpus" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [d for d in map(json.loads, lines) if d["split"] == SPLIT and d["prompt"]]
    return [d for d in documents if "messages" not in d or d["messages"][-1]["role"] == "assistant"]


def spread(documents: Sequence[Any], wanted: int) -> list[Any]:
    """`wanted` of them, evenly."""
    wanted = min(wanted, len(documents))
    return [documents[i] for i in np.linspace(0, len(documents) - 1, wanted).astype(int)] if wanted else []


def asked(document: dict[str, Any]) -> Prompt:
    """What a model is asked of a held-out document: its prompt, or its conversation up to the last message."""
    return document["messages"][:-1] if "messages" in document else document["prompt"]


def sentence(documents: Sequence[dict[str, Any]]) -> str:
    """The completion in the middle of those that are long enough to show something, up to a word's end."""
    texts = [d["completion"].strip() for d in documents] or ["Ageusia is the loss of taste."]
    long = [t for t in texts if len(t) > CHARACTERS // 2] or [max(texts, key=len)]
    text = long[len(long) // 2]
    return text if len(text) <= CHARACTERS else text[:CHARACTERS].rsplit(" ", 1)[0]


# ---- attention -------------------------------------------------------------------------------------------------------


def chosen_layers(config: ConfigDict, work: Workdir) -> dict[str, tuple[int, ...]]:
    """The layers of the exported student and of the teacher whose maps are shown: those that the objective compares."""
    a = config.objective.attention
    models = [learners.description(work, side) for side in ("student", "teacher")]
    named = {"student_layers": a.student_layers, "teacher_layers": a.teacher_layers}
    pairs = attention.choose(*models, count=max(a.pairs, 1), **named)
    return {side: tuple(getattr(pair, side) for pair in pairs) for side in ("student", "teacher")}


def packed(example: Example, mesh: Mesh) -> dict[str, np.ndarray]:
    """The example alone in a row, the row as often as fills the mesh."""
    lengths = [-(-len(example[f"{side}_tokens"]) // LENGTHS) * LENGTHS for side in ("student", "teacher")]
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return {name: np.repeat(values, parts, axis=0) for name, values in pack([example], *lengths).rows.items()}


def attention_of(
    model: Any, params: Any, rows: dict[str, np.ndarray], side: str, layers: Sequence[int], mesh: Mesh
) -> np.ndarray:
    """Maps of the layers over the byte groups of the first row, [layers, G, G]: means over heads, pooled as the loss
    pools them (losses/attention.py), so that both models' maps are over the same text."""

    @jax.jit
    def maps_of(params, batch):
        fields = {name: batch[f"{side}_{name}"] for name in ("segment_ids", "positions")}
        wanted = tuple(dict.fromkeys(layers))
        _, maps = model.hidden(params, batch[f"{side}_tokens"], **fields, attention_layers=wanted)
        return {layer: values_BxHxLxL.mean(axis=1) for layer, values_BxHxLxL in maps.items()}

    of_layer = jax.tree.map(sharding.to_host, maps_of(params, sharding.put_batch(rows, mesh)))
    group_L, shown = groups_of(rows)[side], shown_groups(rows)
    pooled = [np.asarray(attention.pooled(of_layer[n][0], group_L, int(group_L.max()))) for n in layers]
    return np.stack([one[shown][:, shown] for one in pooled])


def groups_of(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The byte group of each token of the first row, by side."""
    first = {name: values[:1] for name, values in rows.items()}
    return {
        side: np.asarray(g)[0] for side, g in zip(("student", "teacher"), attention.byte_groups(first), strict=True)
    }


def shown_groups(rows: dict[str, np.ndarray]) -> np.ndarray:
    """The numbers of the groups that are shown. Attention looks back: the first ones are whole without the others."""
    return np.arange(1, min(int(groups_of(rows)["student"].max()), MOST_GROUPS) + 1)


def labels_of(rows: dict[str, np.ndarray], student: ByteTable) -> list[str]:
    """What stands in each group that is shown."""
    group_L, labels = groups_of(rows)["student"], []
    for number in shown_groups(rows).tolist():
        ids = rows["student_tokens"][0][group_L == number].tolist()
        piece = b"".join(map(student.token_bytes, ids))
        labels.append(visible(piece) if piece else label(student, ids[0]))
    return labels


# ---- projection, speed -----------------------------------------------------------------------------------------------


def examples_of(work: Workdir, tables: dict[str, ByteTable], text: str) -> dict[str, Any]:
    """Rows of W: {"rows": [[teacher token, [[student token, weight], ...]]] for the teacher tokens of a text, "kept":
    {class: {"tokens", "named"}}}. named: the share of the held-out teacher tokens' mass that W gives to student tokens
    by name; the rest it leaves to a remainder."""
    W, teacher = Projection.load(work / "projection", **tables), tables["teacher"]
    tokens = list(dict.fromkeys(teacher.encode(text).tolist()))[:MOST_TOKENS]
    rows = [[label(teacher, t), [[name, round(w, 4)] for name, w in goes_to(W, tables, t)[:4]]] for t in tokens]
    named_V = (W.weights() * (W.ids >= 0)).sum(axis=1)
    loader = Loader(work / "corpus", work.require("corpus")["shards"][SPLIT], 64, 0, verify=False)
    count_V = np.zeros(teacher.vocab_size, np.int64)
    for batch in loader.sweep(rows=work.config.evaluation.rows):
        ids = batch["teacher_targets"][batch["teacher_weights"] > 0]
        count_V += np.bincount(ids, minlength=teacher.vocab_size)
    count_V *= teacher.is_text
    class_V, kept = token_classes(teacher), {}
    for code, name in enumerate(CLASSES):
        if tokens_of_class := int(count_V[class_V == code].sum()):
            named = float((count_V * named_V)[class_V == code].sum()) / tokens_of_class
            kept[name] = {"tokens": tokens_of_class, "named": named}
    return {"rows": rows, "kept": kept}


def bytes_per_token(loader: Loader, tables: dict[str, ByteTable], rows: int) -> dict[str, float]:
    """What a text token holds on average, of the held-out text that is supervised, by side."""
    size, count = Counter(), Counter()
    for batch in loader.sweep(rows=rows):
        for side, table in tables.items():
            lengths = table.lengths[batch[f"{side}_targets"]] * (batch[f"{side}_weights"] > 0)
            size[side] += int(lengths.sum())
            count[side] += int((lengths > 0).sum())
    return {side: size[side] / max(count[side], 1) for side in tables}


def speed_of(config: ConfigDict, work: Workdir, mesh: Mesh, bytes_of: dict[str, float]) -> dict[str, Any]:
    """The teacher against the exported student, under the protocol of config.report. bytes_of: `bytes_per_token`."""
    r, dtype = config.report, default_dtype()
    run = config.export.run
    models = {"teacher": learners.teacher(work, mesh, dtype), run: learners.trained(work, run, mesh, dtype)}
    found = speed.measure(models, speed.Protocol(r.prompt_tokens, r.new_tokens, r.batch, r.turns))
    for name, of_model in found["models"].items():
        of_model["bytes_per_token"] = bytes_of["teacher" if name == "teacher" else "student"]
    return found
