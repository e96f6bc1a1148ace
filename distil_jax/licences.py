"""The licences that bind a distilled model, and how the one of a model is recognised. `duties.py` fulfils them.

Sources: the Llama 3, 3.1, 3.2 and 3.3 Community License Agreements, section 1.b; the Gemma Terms of Use and the Health
AI Developer Foundations Terms of Use, sections 3.1 and 3.2; the Apache License 2.0, section 4. This is bookkeeping, not
legal advice.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

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
AGREEMENTS, NOTICES = ("LICENSE", "LICENCE", "USE_POLICY", "COPYING"), ("NOTICE",)


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
    heads = [plain(text)[:400] for text in texts_in(directory, AGREEMENTS).values()]
    notices = " ".join(plain(text) for text in texts_in(directory, NOTICES).values())
    in_card = _licence_in_card(directory)
    for key, licence in LICENCES.items():
        in_text = licence.heading and any(licence.heading in head for head in heads)
        if in_text or (licence.notice and plain(licence.notice.encode()) in notices) or key == in_card:
            keys.append(key)
    return tuple(dict.fromkeys(keys))


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
    front = re.match(
        r"\s*---\r?\n(.*?)\r?\n---", read_text(directory / "README.md").decode(errors="replace"), re.DOTALL
    )
    facts = (
        dict(re.findall(r"^(license(?:_name)?):\s*[\"']?([\w.-]+)[\"']?\s*$", front[1], re.MULTILINE)) if front else {}
    )
    key = _IN_CARD.get(facts.get("license_name", ""), facts.get("license", ""))
    return key if key in LICENCES and key != "other" else None


def texts_in(directory: Path, starts: tuple[str, ...]) -> dict[str, bytes]:
    """The texts in the top of a directory whose names begin like that, but for the overview that we write."""
    found = {}
    for path in sorted(directory.iterdir()):
        if path.name.upper().startswith(starts) and path.is_file():
            with contextlib.suppress(UserError):  # a PDF is no text that we could compare or vouch for
                found[path.name] = read_text(path)
    return {name: text for name, text in found.items() if not text.startswith(OVERVIEW.encode())}


def read_text(path: Path) -> bytes:
    """A text file. Raises UserError if it is none."""
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a licence ({error}); give a plain text file in UTF-8") from error
    if len(content) > LARGEST_TEXT:
        raise UserError(f"{path} has {len(content)} bytes, too many for a licence; give its text alone")
    return content


def plain(text: bytes) -> str:
    """For comparing headings: lower case, one space between words, no Markdown marks, straight commas."""
    return squeezed(re.sub(r"[*#_,>]", " ", text.decode(errors="replace"))).lower()


def squeezed(text: str) -> str:
    return " ".join(text.split())
