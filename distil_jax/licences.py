"""What the licences of student and teacher demand of an export: texts, notices, a name, and what the card must say.

No agreement's text is part of this package. Texts are copied from the models' own directories or from files that the
user names; one that is nowhere to be found makes an export unfit to publish, which `Duties.missing` says.

Sources: the Llama 3, 3.1, 3.2 and 3.3 Community License Agreements, section 1.b; the Gemma Terms of Use and the Health
AI Developer Foundations Terms of Use, sections 3.1 and 3.2; the Apache License 2.0, section 4. This is bookkeeping, not
legal advice.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distil_jax.errors import UserError, nearest

OVERVIEW = "# Licences of this model"  # the first line of the LICENSE.md that we write
LARGEST_TEXT = 1_000_000  # bytes; a longer file is no licence


@dataclass(frozen=True)
class Licence:
    """A licence and its demands.

    heading, policy_heading: what the text of the agreement (of the acceptable-use policy) begins with, in lower case.
    notice: the line that a NOTICE file must carry. prefix: what the model's name must begin with, by `name_section`.
    built_with: what the card must display. restrictions: what must be passed on to whoever gets the model.
    family_only: its outputs may teach no models but those under the same licence, by that section.
    """

    key: str
    title: str
    url: str
    heading: str
    hub_id: str = "other"  # the hub's name of it, for `license:` in the card
    notice: str = ""
    policy_heading: str = ""
    policy_url: str = ""
    prefix: str = ""
    name_section: str = ""
    built_with: str = ""
    restrictions: str = ""
    family_only: str = ""


def _llama(version: str, folder: str, brand: str, prefix: str = "Llama", **more: str) -> Licence:
    title = f"{brand} {version} Community License"
    return Licence(
        key=f"llama{version}",
        title=title,
        url=f"https://www.llama.com/{folder}/license/",
        heading=f"llama {version} community license agreement",
        hub_id=f"llama{version}",
        notice=f"{brand} {version} is licensed under the {title}, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved.",
        policy_heading=f"llama {version} acceptable use policy",
        policy_url=f"https://www.llama.com/{folder}/use-policy/",
        prefix=prefix,
        name_section="1.b.i",
        built_with=more.pop("built_with", "Built with Llama"),
        restrictions=f"Use must comply with the {brand} {version} Acceptable Use Policy.",
        **more,
    )


LICENCES: dict[str, Licence] = {
    licence.key: licence
    for licence in (
        _llama("3", "llama3", "Meta Llama", "Llama 3", built_with="Built with Meta Llama 3", family_only="1.b.v"),
        _llama("3.1", "llama3_1", "Llama"),
        _llama("3.2", "llama3_2", "Llama"),
        _llama("3.3", "llama3_3", "Llama"),
        Licence(
            key="gemma",
            title="Gemma Terms of Use",
            url="https://ai.google.dev/gemma/terms",
            heading="gemma terms of use",
            hub_id="gemma",
            notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
            restrictions="The use restrictions of section 3.2 of the Gemma Terms of Use, with the Gemma Prohibited Use "
            "Policy (https://ai.google.dev/gemma/prohibited_use_policy), bind everyone who uses or passes on this "
            "model, and must be passed on with it.",
        ),
        Licence(
            key="hai-def",
            title="Health AI Developer Foundations Terms of Use",
            url="https://developers.google.com/health-ai-developer-foundations/terms",
            heading="health ai developer foundations terms of use",
            notice="HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use found at "
            "https://developers.google.com/health-ai-developer-foundations/terms",
            restrictions="The use restrictions of section 3.2 of the Health AI Developer Foundations Terms of Use "
            "(clinical use needs the authorisation of a health regulator), with the prohibited use policy "
            "(https://developers.google.com/health-ai-developer-foundations/prohibited-use-policy), bind everyone who "
            "uses or passes on this model, and must be passed on with it.",
        ),
        Licence(
            key="apache-2.0",
            title="Apache License 2.0",
            url="https://www.apache.org/licenses/LICENSE-2.0.txt",
            heading="apache license version 2.0",
            hub_id="apache-2.0",
        ),
        Licence(
            key="mit",
            title="MIT License",
            url="the page of the model",  # the copyright line is the model's own
            heading="mit license",
            hub_id="mit",
        ),
        # Stated by the user: whatever its own text says. Any LICENSE file of the model is taken for that text.
        Licence(key="other", title="its own licence", url="the page of the model", heading=""),
    )
}
# Hub ids whose licence is known. An id of another owner says nothing: its files and its card are asked.
_BY_ID = (
    (r"meta-llama/(Meta-)?Llama-3-.*", ("llama3",)),
    (r"meta-llama/(Meta-)?Llama-3\.1-.*", ("llama3.1",)),
    (r"meta-llama/Llama-3\.2-.*", ("llama3.2",)),
    (r"meta-llama/Llama-3\.3-.*", ("llama3.3",)),
    (r"m42-health/Llama3-Med42-.*", ("llama3", "other")),
    (r"google/medgemma-.*", ("hai-def",)),
    (r"google/gemma-[23]-.*", ("gemma",)),
    (r"TinyLlama/TinyLlama.*", ("apache-2.0",)),
    (r"HuggingFaceTB/SmolLM2-.*", ("apache-2.0",)),
)
_IN_CARD = {"health-ai-developer-foundations": "hai-def"}  # `license_name` where `license` is "other"
_AGREEMENTS, _NOTICES = ("LICENSE", "LICENCE", "USE_POLICY", "COPYING"), ("NOTICE",)


@dataclass(frozen=True)
class Origin:
    """One model that the export comes from.

    role: "student" or "teacher". name: its hub id, or the name of its folder. licences: keys of LICENCES; none: not
    known. directory: where its files are; None for a model that was made here. hub_id: where the name is one.
    """

    role: str
    name: str
    licences: tuple[str, ...]
    directory: Path | None = None
    hub_id: str | None = None


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
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", wish)
        plain = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", plain)).strip("-.")[:80].rstrip("-.") or "distilled"
        return plain if _begins(plain, self.prefix) else f"{self.prefix.replace(' ', '-')}-{plain}"


def origin(role: str, path: str, stated: str, directory: Path | None) -> Origin | None:
    """Where the model of `role` comes from; None if it was made here and nothing is stated.

    path: a directory, a hub id (owner/name or owner/name@revision), or "" for a model that was made here. stated: keys
    of LICENCES separated by commas, or "" to recognise it. directory: the model's local files, None if made here.
    Raises UserError for a stated key that is not known.
    """
    keys = tuple(dict.fromkeys(key.strip() for key in stated.split(",") if key.strip()))
    for key in keys:
        if key not in LICENCES:
            raise UserError(
                f"config.{role}.licence is {key!r}{nearest(key, LICENCES)}; there are {', '.join(LICENCES)}"
            )
    if directory is None:
        return Origin(role, "made here", keys) if keys else None
    found = _hub_id(path)
    return Origin(role, found or Path(path).resolve().name, keys or recognise(found, directory), directory, found)


def recognise(hub_id: str | None, directory: Path) -> tuple[str, ...]:
    """The licences that bind a model by its hub id, its licence files, its NOTICE and its card; () if none is known."""
    keys: list[str] = []
    for pattern, known in _BY_ID:
        if hub_id and re.fullmatch(pattern, hub_id):
            keys += known
    heads = [_plain(text)[:400] for text in _texts(directory, _AGREEMENTS).values()]
    notices = " ".join(_plain(text) for text in _texts(directory, _NOTICES).values())
    in_card = _licence_in_card(directory)
    for key, licence in LICENCES.items():
        in_text = licence.heading and any(licence.heading in head for head in heads)
        if in_text or (licence.notice and _plain(licence.notice.encode()) in notices) or key == in_card:
            keys.append(key)
    return tuple(dict.fromkeys(keys))


def duties(origins: Sequence[Origin], given: Sequence[Path] = (), made_by: str = "distil_jax") -> Duties:
    """Collects the texts that must go with an export, and says which are nowhere.

    given: files with texts that the models' directories lack, known by their headings. made_by: for the notice of
    changes. Raises UserError for a given file that cannot be read as text.
    """
    theirs = {o.role: _texts(o.directory, _AGREEMENTS) if o.directory else {} for o in origins}
    mine = {path.name: _read(path) for path in given}
    everywhere = [pair for texts in (*theirs.values(), mine) for pair in texts.items()]
    files: dict[str, bytes] = {}
    missing: list[str] = []
    used: set[bytes] = set()

    def ship(licence: Licence, what: str, kind: str, heading: str, url: str, texts: Sequence[tuple[str, bytes]]):
        for name, text in texts:
            if heading in _plain(text)[:400]:
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
            own = [pair for pair in (*theirs[o.role].items(), *mine.items()) if pair[1] not in used]
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
    for o in origins:
        if o.role == "student" and o.directory:
            lines.append(
                f"Modified files: the weights (*.safetensors), config.json, generation_config.json and the tokenizer "
                f"files are not those of {o.name}. The weights were trained further, and all files written anew, by "
                f"{made_by}."
            )
        elif o.role == "teacher":
            lines.append(f"The weights were trained by {made_by} to imitate the outputs of {o.name}.")
    for o in origins:
        for text in (_texts(o.directory, _NOTICES) if o.directory else {}).values():
            known = " ".join(map(_squeezed, lines))
            lines += [x.strip() for x in text.decode(errors="replace").splitlines() if _squeezed(x) not in known]
    return "\n\n".join(dict.fromkeys(line for line in lines if line)) + "\n"


def _overview(origins: Sequence[Origin], files: Mapping[str, bytes]) -> str:
    lines = [OVERVIEW, ""]
    for o in origins:
        titles = " and ".join(LICENCES[key].title for key in o.licences) or "a licence that is not known"
        lines.append(f"- {o.role}, {_squeezed(o.name)}: {titles}")
    lines += ["", "All of them bind this model. Their texts and notices, as far as they are here:", ""]
    return "\n".join([*lines, *(f"- {name}" for name in sorted(files))]) + "\n"


def _kept_name(role: str, name: str) -> str:
    """Where a text goes that has no name of ours: hub clients look for LICENSE*."""
    return f"LICENSE-of-{role}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"


def _hub_id(path: str) -> str | None:
    """The hub id behind a path: itself, that of a snapshot in the hub's cache, or a folder owner/name that we know."""
    if cached := re.search(r"models--([^/]+?)--([^/]+)(/|$)", path):
        return f"{cached[1]}/{cached[2]}"
    if not Path(path).expanduser().is_dir():
        return path.split("@", 1)[0]
    tail = "/".join(Path(path).resolve().parts[-2:])
    return tail if any(re.fullmatch(pattern, tail) for pattern, _ in _BY_ID) else None


def _licence_in_card(directory: Path) -> str | None:
    """The licence that the front matter of a model's README names, if it is one of ours."""
    if not (directory / "README.md").is_file():
        return None
    front = re.match(r"\s*---\r?\n(.*?)\r?\n---", _read(directory / "README.md").decode(errors="replace"), re.DOTALL)
    facts = (
        dict(re.findall(r"^(license(?:_name)?):\s*[\"']?([\w.-]+)[\"']?\s*$", front[1], re.MULTILINE)) if front else {}
    )
    key = _IN_CARD.get(facts.get("license_name", ""), facts.get("license", ""))
    return key if key in LICENCES and key != "other" else None


def _texts(directory: Path, starts: tuple[str, ...]) -> dict[str, bytes]:
    """The texts in the top of a directory whose names begin like that, but for the overview that we write."""
    found = {}
    for path in sorted(directory.iterdir()):
        if path.name.upper().startswith(starts) and path.is_file():
            with contextlib.suppress(UserError):  # a PDF is no text that we could compare or vouch for
                found[path.name] = _read(path)
    return {name: text for name, text in found.items() if not text.startswith(OVERVIEW.encode())}


def _read(path: Path) -> bytes:
    """A text file. Raises UserError if it is none."""
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a licence ({error}); give a plain text file in UTF-8") from error
    if len(content) > LARGEST_TEXT:
        raise UserError(f"{path} has {len(content)} bytes, too many for a licence; give its text alone")
    return content


def _plain(text: bytes) -> str:
    """For comparing headings: lower case, one space between words, no Markdown marks, straight commas."""
    return _squeezed(re.sub(r"[*#_,>]", " ", text.decode(errors="replace"))).lower()


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _valid(name: str) -> bool:
    # fullmatch with re.ASCII: the hub takes no other letters
    return bool(re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,94}\w)?", name, re.ASCII)) and ".." not in name and "--" not in name


def _begins(name: str, prefix: str) -> bool:
    joined = re.sub(r"[\s_-]", "", name)
    return joined.startswith(prefix.replace(" ", ""))
