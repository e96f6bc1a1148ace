"""What an export must carry so that it may be published: texts, notices, a name.

No agreement's text is part of this package. Texts are copied from the models' own directories or from files that the
user names; one that is nowhere to be found makes an export unfit to publish, which `Duties.missing` says.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distil_jax.errors import UserError
from distil_jax.licences import (
    AGREEMENTS,
    LICENCES,
    NOTICES,
    OVERVIEW,
    Licence,
    Origin,
    plain,
    read_text,
    squeezed,
    texts_in,
)  # fmt: skip


@dataclass(frozen=True)
class Duties:
    """What an export must carry. files: name -> content, to be written beside the weights. missing: what keeps it from
    being published, each in one line; empty if nothing does."""

    origins: tuple[Origin, ...]
    files: Mapping[str, bytes]
    missing: tuple[str, ...]

    @property
    def licences(self) -> list[Licence]:
        """Of all origins, the student's first, each once."""
        return [LICENCES[key] for key in dict.fromkeys(key for o in self.origins for key in o.licences)]

    @property
    def prefix(self) -> str:
        """What the name must begin with: "Llama 3" is a "Llama" too, so the longest."""
        return max((licence.prefix for licence in self.licences), key=len, default="")

    def metadata(self) -> dict[str, Any]:
        """`license`, `license_name`, `license_link` and `base_model` for the card's front matter."""
        facts: dict[str, Any] = {}
        licences = self.licences
        if len(licences) == 1 and licences[0].hub_id != "other" and all(o.licences for o in self.origins):
            facts["license"] = licences[0].hub_id
        elif self.origins:
            known = "-and-".join(licence.key for licence in licences)
            unknown = any(not o.licences for o in self.origins)
            names = [known] * bool(known) + ["unknown"] * unknown
            facts |= {"license": "other", "license_name": "-and-".join(names), "license_link": "LICENSE.md"}
        if student := next((o for o in self.origins if o.role == "student" and o.hub_id), None):
            facts["base_model"] = student.hub_id
        return facts

    def check_name(self, name: str, key: str) -> None:
        """Raises UserError unless `name`, which the config key `key` gave, may be the name of this export."""
        if not _valid(name):
            raise UserError(
                f"{key} is {name!r}: the hub takes at most 96 letters, digits, '-', '_' and '.', no '--' or '..'"
            )
        if not _begins(name, self.prefix):
            licence = next(x for x in self.licences if x.prefix == self.prefix)
            whose = next(o for o in self.origins if licence.key in o.licences)
            raise UserError(
                f"{key} is {name!r}, but section {licence.name_section} of the {licence.title} (of the {whose.role}, "
                f'{whose.name}) asks for a name that begins with "{self.prefix}": call it {self.named(name)}'
            )

    def named(self, wish: str) -> str:
        """A name that may be used, as near to `wish` as the hub and the licences allow."""
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", wish)
        name = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", name)).strip("-.")[:80].rstrip("-.") or "distilled"
        return name if _begins(name, self.prefix) else f"{self.prefix.replace(' ', '-')}-{name}"


def gather(origins: Sequence[Origin], given: Sequence[Path] = (), made_by: str = "distil_jax") -> Duties:
    """Collects the texts that must go with an export, and says which are nowhere.

    given: files with texts that the models' directories lack, known by their headings; others go along under their own
    names. made_by: for the notice of changes. Raises UserError for a given file that cannot be read as text.
    """
    theirs = {o.role: texts_in(o.directory, AGREEMENTS) if o.directory else {} for o in origins}
    mine = [(path.name, read_text(path)) for path in given]
    everywhere = [*(pair for texts in theirs.values() for pair in texts.items()), *mine]
    files: dict[str, bytes] = {}
    missing: list[str] = []
    used: set[bytes] = set()

    def ship(licence: Licence, what: str, kind: str, heading: str, url: str, texts: Sequence[tuple[str, bytes]]):
        for name, text in texts:
            if heading in plain(text)[:400]:
                files[f"{kind}-{licence.key}{Path(name).suffix or '.txt'}"] = text
                used.add(text)
                return
        missing.append(
            f"the text of {what} ({url}): save it as a plain text file and name it in config.export.licence_files"
        )

    for licence in dict.fromkeys(LICENCES[key] for o in origins for key in o.licences if key != "other"):
        ship(licence, f"the {licence.title}", "LICENSE", licence.heading, licence.url, everywhere)
        if licence.policy_heading:
            what = f"the acceptable use policy of {licence.title}"
            ship(licence, what, "USE_POLICY", licence.policy_heading, licence.policy_url, everywhere)
    for o in origins:
        if not o.licences:
            missing.append(
                f"the licence of the {o.role}, {o.name}, is not known: read it and state it in config.{o.role}.licence "
                f"({', '.join(LICENCES)})"
            )
        if "other" in o.licences:  # whatever text of its own it has
            own = [pair for pair in (*theirs[o.role].items(), *mine) if pair[1] not in used]
            if own:
                files |= {_kept_name(o.role, name): text for name, text in own}
            else:
                missing.append(
                    f"the text of the licence of the {o.role}, {o.name} (see {LICENCES['other'].url}): name the file "
                    "in config.export.licence_files"
                )
        for name, text in theirs[o.role].items():  # a text that we do not know may bind as well
            if text not in used and "other" not in o.licences:
                files[_kept_name(o.role, name)] = text
    files |= {f"LICENSE-{_plain_name(name)}": text for name, text in mine if text not in {*used, *files.values()}}
    missing += _forbidden(origins)
    if origins:
        files["NOTICE"] = _notice(origins, made_by).encode()
        files["LICENSE.md"] = _overview(origins, files).encode()
    return Duties(tuple(origins), files, tuple(missing))


def _forbidden(origins: Sequence[Origin]) -> list[str]:
    """Teachers whose outputs may not improve this student."""
    students = {key for o in origins if o.role == "student" for key in o.licences}
    return [
        f"section {licence.family_only} of the {licence.title} lets the teacher, {o.name}, improve no other language "
        "model: a student under the same licence is asked for"
        for o in origins
        if o.role == "teacher"
        for licence in (LICENCES[key] for key in o.licences)
        if licence.family_only and licence.key not in students
    ]


def _notice(origins: Sequence[Origin], made_by: str) -> str:
    """Our NOTICE: the demanded lines, what was changed, and the notices that the models came with."""
    lines = [LICENCES[key].notice for o in origins for key in o.licences if LICENCES[key].notice]
    for o in (o for o in origins if o.directory):
        name = squeezed(o.name)
        if o.role == "student":
            lines.append(
                f"Modified files: the weights (*.safetensors), config.json, generation_config.json and the tokenizer "
                f"files are not those of {name}. The weights were trained further, and all files written anew, by "
                f"{made_by}."
            )
        else:
            lines.append(f"The weights were trained by {made_by} to imitate the outputs of {name}.")
    blocks = list(dict.fromkeys(lines))
    for text in (text for o in origins if o.directory for text in texts_in(o.directory, NOTICES).values()):
        said = {squeezed(line) for block in blocks for line in block.splitlines()}
        new = [line.rstrip() for line in text.decode().splitlines() if squeezed(line) not in said - {""}]
        blocks += [block] if (block := "\n".join(new).strip()) else []
    return "\n\n".join(blocks) + "\n"


def _overview(origins: Sequence[Origin], files: Mapping[str, bytes]) -> str:
    lines = [OVERVIEW, ""]
    for o in origins:
        titles = " and ".join(LICENCES[key].title for key in o.licences) or "a licence that is not known"
        lines.append(f"- {o.role}, {squeezed(o.name)}: {titles}")
    lines += ["", "All of them bind this model. Their texts and notices, as far as they are here:", ""]
    return "\n".join([*lines, *(f"- {name}" for name in sorted(files))]) + "\n"


def _kept_name(role: str, name: str) -> str:
    """Where a text goes that has no name of ours: hub clients look for LICENSE*."""
    return f"LICENSE-of-{role}-{_plain_name(name)}"


def _plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def _valid(name: str) -> bool:
    # fullmatch with re.ASCII: the hub takes no other letters
    return bool(re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,94}\w)?", name, re.ASCII)) and ".." not in name and "--" not in name


def _begins(name: str, prefix: str) -> bool:
    joined = re.sub(r"[\s_-]", "", name)
    return joined.startswith(prefix.replace(" ", ""))
