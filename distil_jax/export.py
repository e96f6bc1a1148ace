"""Stage 5: the student as a Hugging Face directory that is fit to publish, checked by reading it back.

    distil-jax export --config configs/tiny.py [--config.export.push_to=owner/Name]

Writes export/NAME/ from the run that config.export.run names: config.json, generation_config.json, safetensors, the
student's tokenizer and chat template, README.md (the model card), NOTICE and the licence texts that the student and the
teacher demand (docs/export.md).
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import distil_jax
from distil_jax import duties, hosts, learners, licences, manifest, readback
from distil_jax.card import card
from distil_jax.duties import Duties
from distil_jax.errors import UserError
from distil_jax.eval import comparison
from distil_jax.models import hub
from distil_jax.push import push
from distil_jax.tokens.bytes import ByteTable
from distil_jax.workdir import Workdir, names_of

GENERATION_CONFIG = "generation_config.json"


def main(config: ConfigDict) -> dict[str, Any]:
    """Exports the student unless that is done, says what came of it, and pushes it if config.export.push_to says where;
    returns the manifest."""
    facts = make(config)
    if hosts.is_first_process():
        print(describe(facts), flush=True)
    publish(config, facts)
    return facts


def make(config: ConfigDict) -> dict[str, Any]:
    """The stage without its words: exports unless that is done; returns the manifest."""
    work = Workdir(config)
    if found := work.done("export"):
        return found
    run = config.export.run
    done = {name: work.require(name) for name in ("corpus", "projection", run, "evaluate")}
    owed = duties_of(config)
    name = config.export.name
    if name:
        owed.check_name(name, "config.export.name")
    else:
        name = owed.named(work.root.resolve().name)
    if name in ("key", manifest.NAME):
        raise UserError(f"{work / 'export'} keeps a file called {name}: choose another config.export.name")
    answers = comparison.read(work / "evaluate", config.runs)
    stage = work.begin("export")
    mesh = learners.mesh_of(config)
    tokenizer = learners.hf_tokenizer(work, "student")
    with jax.set_mesh(mesh):
        model, params = learners.trained(work, run, mesh)
        checks = export_model(
            model,
            params,
            stage.folder / name,
            tokenizer=tokenizer,
            documents=readback.read_documents(work / "corpus" / "documents.jsonl"),
            dtype=config.export.dtype,
            files=owed.files,
            write_card=lambda checks: card(name, config, done, owed, checks, answers),
            generation_config=generation_config_of(work, tokenizer),
            mesh=mesh,
        )
    return stage.finish(
        path=str(stage.folder / name),
        name=name,
        bytes=sum(file.stat().st_size for file in (stage.folder / name).iterdir()),
        checks=checks,
        licences={o.role: {"model": o.name, "licences": list(o.licences)} for o in owed.origins},
        missing=list(owed.missing),
    )


def duties_of(config: ConfigDict) -> Duties:
    """What the licences of the config's student and teacher demand."""
    origins = []
    for role in ("student", "teacher"):
        path, stated = config[role].path, config[role].licence
        found = licences.origin(role, path, stated, hub.resolve(path) if path else None)
        origins += [found] if found else []
    given = [Path(name) for name in names_of(config.export.licence_files)]
    return duties.gather(origins, given, made_by=f"distil_jax {distil_jax.__version__}")


def export_model(
    model: Any,
    params: Any,
    directory: str | os.PathLike,
    *,
    tokenizer: Any,
    documents: Sequence[tuple[str, str]],
    dtype: str,
    files: Mapping[str, bytes],
    write_card: Callable[[Mapping[str, Any]], str],
    generation_config: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Writes a model as a Hugging Face directory, checks it, and only then gives it its name; returns what
    `readback.compare` found.

    tokenizer: as transformers loads it. documents: held-out (prompt, completion) pairs to compare on. dtype: of the
    stored weights. files: name -> content, put beside the weights. write_card: README.md from the checks.
    generation_config: the student's own, kept but for the special ids.
    Everything, card and licences included, is written into a hidden folder beside `directory` and renamed once. After
    a failure, an interruption or a full disk that folder is gone and `directory` is as it was before. In a run of
    several processes all must call it; the first one writes. Raises UserError if the directory does not read back, or
    `dtype` cannot hold the model.
    """
    target = Path(directory).absolute()
    partial = target.with_name(f".{target.name}.partial")
    first = hosts.is_first_process()
    readback.check_finite(params, dtype)
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        hub.save_pretrained(
            model, params, partial, tokenizer=tokenizer, dtype=dtype, generation_config=generation_config
        )
        checks = readback.compare(
            model, params, partial, tokenizer=tokenizer, documents=documents, dtype=dtype, mesh=mesh
        )
        if first:
            for name, content in files.items():
                (partial / name).write_bytes(content)
            (partial / "README.md").write_text(write_card(checks), encoding="utf-8")
            _flush(partial)
            manifest.replace_folder(partial, target)
        hosts.barrier(f"exported {target}")
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return checks


def _flush(folder: Path) -> None:
    """Asks the disk to hold what was written, so that a full or failing one is found out before the rename. The weights
    get the mode of the other files: safetensors makes them for their owner alone."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.iterdir():
        file.chmod(mode)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """The generation_config.json of a model directory, if it has one."""
    file = directory / GENERATION_CONFIG
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def generation_config_of(work: Workdir, tokenizer: Any) -> dict[str, Any] | None:
    """The student's own, if it has one. Where the corpus holds conversations the end of a turn stops generation too."""
    student = work.config.student.path
    found = read_generation_config(hub.resolve(student)) if student else None
    if not learners.has_conversations(work):
        return found
    found = found or {}
    stated = found.get("eos_token_id")
    ends = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id]
    ends.append(ByteTable.from_tokenizer(tokenizer).roles["end_of_turn"])
    return found | {"eos_token_id": [i for i in dict.fromkeys(ends) if i is not None]}


def publish(config: ConfigDict, facts: Mapping[str, Any]) -> str | None:
    """Pushes a finished export where config.export.push_to says, if it says so; returns the URL of the commit.

    Raises UserError, one line, if it may not be published or the hub does not take it. The export stays.
    """
    repo, private = config.export.push_to, config.export.private
    if not repo or not hosts.is_first_process():
        return None
    duties_of(config).check_name(repo.rpartition("/")[2], "config.export.push_to")
    url = push(Path(facts["path"]), repo, private=private, missing=facts["missing"])
    print(f"pushed to {repo}: {url}", flush=True)
    return url


def describe(facts: Mapping[str, Any]) -> str:
    """A finished export in a few lines for the terminal."""
    checks = facts["checks"]
    lines = [
        f"export: {facts['path']}, {facts['bytes'] / 1e6:,.1f} MB, {checks['dtype']}",
        f"checked: {checks['parameters']:,} weights bit for bit, {checks['ids']:,} ids of {checks['texts']:,} texts",
    ]
    if checks["documents"]:
        change = checks["bits_per_byte_stored"] - checks["bits_per_byte_trained"]
        lines[-1] += f", logits within {checks['largest_logit_difference']:.1e}, {change:+.1e} bits per byte"
    if facts["missing"]:
        lines += ["not ready to publish; missing:", *(f"  - {what}" for what in facts["missing"])]
    else:
        lines.append("ready to publish, as far as its licences ask for files, notices and a name")
    return "\n".join(lines)


if __name__ == "__main__":
    from distil_jax.cli import stage_main

    sys.exit(stage_main(main))
