"""Prompts: what a text-to-image model is asked for, class by class.

A prompt is a template with the phrase of a class in it. A class name is often not what one would say: "crane" is a bird
in one data set and a machine in another, "drumstick" is not food, EuroSAT's "River" is seen from above. The reviewed
tables in prompts.json give a phrase for each class of the papers' data sets; docs/prompts.md says where each list comes
from and what was mended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from fedkeel.errors import ConfigError, PoolError, nearest
from fedkeel.generators.names import plain_name

TEMPLATES: dict[str, str] = {
    "regl": "A photo of {class}, real world images, high resolution",  # appendix B
    "regl-text": "A photo of {class}",  # section 4.1.1
    "fbl": "a photo of a {class}",  # ours: the appendix with FBL's own prompts is not public [F-21]
}
"""Wordings by name. Any text that has {class} in it once is a template itself."""

TABLE_KEY, TEMPLATE_KEY = "generator.prompts", "generator.template"
"""The options that errors name."""

SHOWN = 5
"""So many missing classes an error names."""

CURE = f'; write the phrases into a JSON file {{"class": "phrase", ...}} and name it as {TABLE_KEY}'
"""What errors end with."""

SYNSET = re.compile(r"[nN]\d{8}")
NUMBERED = re.compile(r"^\d+[\W_]+(?=.*[^\W\d_])")
"""The number before a name, as in the folder 001.Black_footed_Albatross."""


@dataclass(frozen=True)
class Table:
    """The phrases of one data set. rows: by class name in the order of the data set's list, the phrase and other
    spellings of the name (a WordNet id among them). departure: how its phrases leave the papers, because they speak of
    the look of this one data set; "" where they name things only."""

    name: str
    source: str
    departure: str
    rows: Mapping[str, tuple[str, ...]]

    @cached_property
    def _phrases(self) -> dict[str, str]:
        spelled = {plain_name(name): row[0] for name, row in self.rows.items()}
        return {plain_name(other): row[0] for row in self.rows.values() for other in row[1:]} | spelled

    def phrase(self, name: str) -> str | None:
        """The phrase for a class in any of its spellings, None for an unknown one.

        A name that is not known as it stands is tried without the number before it ("001.Black_footed_Albatross"), and
        by the first of its words ("tench, Tinca tinca").
        """
        for spelling in (name, NUMBERED.sub("", name), name.split(",")[0]):
            found = self._phrases.get(plain_name(spelling))
            if found is not None:
                return found
        return None

    def fits(self, classes: Sequence[str]) -> bool:
        """Whether it has a phrase of its own for each class, and would not lend the look of its data set to another."""
        found = {self.phrase(name) for name in classes}
        whole = not self.departure or len(classes) == len(self.rows)  # "river" alone need not be seen from above
        return whole and None not in found and len(found) == len(classes)


@cache
def _tables() -> dict[str, Table]:
    content = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
    return {
        name: Table(
            name, table["source"], table["departure"], {key: tuple(row) for key, row in table["classes"].items()}
        )
        for name, table in content.items()
    }


def tables() -> tuple[str, ...]:
    """The names of the reviewed tables."""
    return tuple(_tables())


def reviewed(name: str) -> Table:
    """The reviewed table of this name (hyphens, underscores and case do not matter). Raises ConfigError."""
    found = {plain_name(known): table for known, table in _tables().items()}.get(plain_name(name))
    if found is None:
        allowed = f'must be "auto", a JSON file of yours, or one of {", ".join(tables())}'
        raise ConfigError(TABLE_KEY, name, allowed, nearest(name, tables()))
    return found


def phrases(classes: Sequence[str], table: str = "auto") -> tuple[str, ...]:
    """The phrase for each class.

    table: the name of a reviewed table, which must know every class; the path of a JSON file {"class": "phrase"} of the
    user's, which must too; or "auto": the reviewed table that knows all the classes (the smallest such one; `eurosat`
    and `fashion`, which say how their pictures look, only for all ten), else the class names themselves with spaces for
    underscores.

    Raises ConfigError for an unknown table or a file that cannot be used, PoolError for a class without a phrase of its
    own.
    """
    if not classes:
        return ()
    chosen = _choose(classes, table)
    if chosen is None:
        return _cleaned(classes)
    found = [chosen.phrase(name) for name in classes]
    missing = [name for name, phrase in zip(classes, found, strict=True) if phrase is None]
    if missing:
        raise PoolError(f"{TABLE_KEY} = {table!r} has no phrase for {_named(missing, list(chosen.rows))}")
    said = tuple(phrase for phrase in found if phrase is not None)
    _distinct(classes, said)
    return said


def prompt(template: str, phrase: str) -> str:
    """The template, by name or written out, with the phrase in the place of {class}.

    The phrase stands as it is, without an article. Raises ConfigError unless the template has {class} exactly once and
    no other braces.
    """
    text = TEMPLATES.get(template, template)
    before, place, after = text.partition("{class}")
    if not place or set(before + after) & set("{}"):
        allowed = f"must have {{class}} in it once and no other braces, or be one of {', '.join(TEMPLATES)}"
        raise ConfigError(TEMPLATE_KEY, template, allowed, nearest(template, TEMPLATES))
    return before + phrase + after


def origin(classes: Sequence[str], table: str = "auto") -> dict[str, str]:
    """Where these classes' phrases come from: the table's name ("" for cleaned class names), its source, and in what
    they depart from the papers ("" where they do not). A run's manifest has it beside the prompts."""
    chosen = _choose(classes, table)
    if chosen is None:
        return {"table": "", "source": "the class names themselves", "departure": ""}
    return {"table": chosen.name, "source": chosen.source, "departure": chosen.departure}


def _choose(classes: Sequence[str], table: str) -> Table | None:
    if plain_name(table) == "auto":
        # the smallest table is the most specific one; min takes the first of equals
        return min((each for each in _tables().values() if each.fits(classes)), key=lambda t: len(t.rows), default=None)
    return _from_file(table) if table.lower().endswith(".json") else reviewed(table)


def _from_file(table: str) -> Table:
    path = Path(table).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(TABLE_KEY, table, f"cannot be read as JSON: {reason}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(TABLE_KEY, table, 'must hold an object {"class": "phrase", ...}')
    rows: dict[str, tuple[str, ...]] = {}
    for name, phrase in content.items():
        if not isinstance(phrase, str) or not phrase.strip():
            raise ConfigError(TABLE_KEY, table, f"the phrase of {name!r} must be a text that is not empty")
        rows[name] = (" ".join(phrase.split()),)
    return Table(path.name, str(table), "", rows)


def _cleaned(classes: Sequence[str]) -> tuple[str, ...]:
    """Class names as phrases. Raises PoolError for names that say nothing to a model, and for two that say the same."""
    silent = [name for name in classes if SYNSET.fullmatch(name.strip()) or not any(map(str.isalpha, name))]
    if silent:
        raise PoolError(
            f"{_listed(silent)}: a WordNet id or a number tells a text-to-image model nothing, and none of the tables "
            f"{', '.join(tables())} knows all the classes{CURE}"
        )
    said = tuple(" ".join(name.replace("_", " ").split()) for name in classes)
    _distinct(classes, said)
    return said


def _distinct(classes: Sequence[str], said: Sequence[str]) -> None:
    """Raises PoolError for two classes that would get the same images."""
    first: dict[str, str] = {}
    for name, phrase in zip(classes, said, strict=True):
        other = first.setdefault(phrase.casefold(), name)
        if other != name:
            raise PoolError(f"classes {other!r} and {name!r} would both be asked for as {phrase!r}{CURE}")


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + rest


def _named(missing: Sequence[str], known: Sequence[str]) -> str:
    """The missing classes, each with the known one nearest in spelling."""
    lower = {name.replace("_", " ").casefold(): name for name in known}
    parts = []
    for name in missing[:SHOWN]:
        near = nearest(name.replace("_", " ").casefold(), lower)
        parts.append(repr(name) + (f" (nearest: {lower[near]!r})" if near else ""))
    rest = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return ", ".join(parts) + rest
