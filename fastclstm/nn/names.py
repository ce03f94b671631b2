"""Names in messages: with their article, and what is meant by one that is not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MOST = 12
"""How many names a message tells."""


def nearest(name: str, known: Iterable[str], least: float = 0.5) -> str | None:
    """Return the nearest of the `known` names, or None where none is so near; capitals and underscores do not count."""
    import difflib

    plain_names = {one.replace("_", "").lower(): one for one in known}
    near = difflib.get_close_matches(name.replace("_", "").lower(), plain_names, 1, least)
    return plain_names[near[0]] if near else None


def unknown_option(
    op: str, name: str, known: Iterable[str], elsewhere: Mapping[str, tuple[str, ...]] | None = None
) -> str:
    """Return the message about an option that is none of the `known`.

    elsewhere: names that other libraries have for options, each with what it may be called here.
    """
    known = tuple(known)
    here = [one for one in (elsewhere or {}).get(name, ()) if one in known]
    meant = here[0] if here else nearest(name, known, 0.6)
    hint = f"did you mean {meant!r}? The" if meant else "the"
    told = ", ".join(known[:MOST]) + (f" and {len(known) - MOST} more" if len(known) > MOST else "")
    return f"{op}: unknown option {name!r}; {hint} options are {told}"


def with_article(name: str | type) -> str:
    """Return a name, or that of a class, after "a" or "an", as it is spoken.

    Examples
    --------
    >>> with_article("EncoderForecaster"), with_article("ConvLSTM2D"), with_article("LSTM")
    ('an EncoderForecaster', 'a ConvLSTM2D', 'an LSTM')
    """
    name = name if isinstance(name, str) else name.__name__
    spelled = name[:2].isupper() and name[:1] in "FHLMNRSX"  # letter by letter
    return f"{'an' if spelled or name[:1].upper() in tuple('AEIOU') else 'a'} {name}"
