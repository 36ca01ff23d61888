r"""Penn Treebank tokens without Java: the words that ROUGE-L, CIDEr and METEOR count.

The rules are written from what the reference prints: pycocoevalcap 1.2's `PTBTokenizer`, which runs Stanford's 3.4.1 with
``-preserveLines -lowerCase`` and drops a list of punctuation. Its quirks are kept: brackets stay, as ``-lrb-`` and ``-lsb-``,
because that list names them in capitals; ``£`` is ``#`` and ``€`` is ``$``. Left out: phone numbers and mixed fractions
("3 1/2"), which it joins into one token with a space inside; and one sentence is read without the next, where the reference
looks at the next line's first word before it decides whether a final "A." ends a sentence. Curly apostrophes are read as
straight ones everywhere, there only in clitics.
"""

# ruff: noqa: RUF001  (the look-alikes of quotes and dashes are the subject)
import re

# Kept with their period, in any case and wherever they stand.
_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bldg blvd brig bros calif capt cf cmdr co col colo comdr
    conn corp cpl ct dec dept dr elec ens esq est etc ext feb fla fri ft ga gen gov hon inc ind insp intl jan jos jr jul jun
    kan kans ky lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn
    pfc ph.d plc pres prof pty pvt rd rep reps rev rt sen sens sep sept sfc sgt sq sr st supt tel tenn thu thurs treas tue
    tues univ va vs vt wed wis wisc wyo e.g i.e a.m p.m
"""
_ABBREVIATIONS_WITH_A_CAPITAL = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_ABBREVIATIONS_BEFORE_A_NUMBER = "art ca fig figs no nos op pp prop"
# After "Serie A." these begin a sentence; another word continues a name, as in "A. Smith".
_SENTENCE_STARTERS = """
    A About According Additionally After An As At But He Her Here However If In It Last Many More Now Once One Other Our She
    Since So Some Such That The Their Then There These They This We What When While Yet You
"""


def _any(words: str) -> str:
    return "(?:" + "|".join(re.escape(word) for word in words.split()) + ")"


_MARKS = "\u0300-\u036f\u064b-\u065f\u0900-\u0dff"  # accents and vowel signs that `\w` leaves out
_L = rf"(?:(?![\d_¹²³])[\w{_MARKS}])"  # a letter
_W = rf"(?:(?![_¹²³])[\w{_MARKS}])"  # a letter or digit
_END = rf"(?!{_W})"
_HYPHENED = rf"(?:-{_W}+)*"
# At every position the first that matches is the token.
_TOKEN = re.compile(
    "|".join(
        [
            # Clitics, and what stands before them: ca|n't, can|not, gon|na, 't|is.
            rf"(?:'(?:s|re|ve|ll|d|m)|n't){_END}",
            rf"{_W}+?(?=n't{_END})",
            rf"(?:can(?=not{_END})|(?:gon|wan)(?=na{_END})|got(?=ta{_END})|(?:gim|lem)(?=me{_END}))",
            rf"'t(?=(?:is|was){_END})",
            # Apostrophes inside words: '90s, 'em, 'n', O'Connor, Hawai'i, y'|all.
            rf"'(?:\d\ds?|n'?|em|til|cause){_END}",
            rf"[dlno]'{_L}{{2,}}{_HYPHENED}",
            rf"{_L}+[aeiouy]'[aeiou]{_L}*",
            rf"[djly]'(?={_L})",
            # Addresses, tags, languages.
            r"""https?://[^\s"<>|(),]*[^\s"<>|(),.;:!?']""",
            rf"{_W}[\w.+-]*@{_W}+(?:[.-]{_W}+)*",
            rf"\#{_L}{_W}*|@{_L}\w*|</?[a-z][^\s<>]*>|c\+\+|[cf]\#",
            # Periods that belong to the word: Mr., No. 5, U.S.-based, Madrid.The, A. Smith, and any before a comma.
            rf"{_W}+(?:[-_.]{_W}+)*\.(?=[,;:])",
            rf"(?:{_any(_ABBREVIATIONS)}|(?-i:{_any(_ABBREVIATIONS_WITH_A_CAPITAL)}))\.(?!{_L}){_HYPHENED}",
            rf"{_any(_ABBREVIATIONS_BEFORE_A_NUMBER)}\.(?=\s*\d)",
            rf"{_L}\.(?:{_L}\.)+(?!{_L}){_HYPHENED}",
            rf"{_L}{_W}*(?:[.!?]{_L}{_W}*)+{_HYPHENED}",
            rf"{_L}\.(?!\s+(?-i:{_any(_SENTENCE_STARTERS)})(?![.\w]))",
            # Numbers: 2,386.5-metre, -1.5, 10:30, ,2012.
            rf"\d+(?:[.,]\d+)+{_W}*(?:-{_W}+)+",
            r"[+-]?\d*(?:[.,:]\d+)+|[+-]\d+",
            r"(?-i:[A-Z]{1,3}\$|[A-Z]+(?:&[A-Z]+)+)",
            # Words, and what is left.
            rf"{_W}+(?:[-‐‑/_]{_W}+)*",
            r"[?!]{2,}|\*\*+|__+|--+|\.\.\.|\S",
        ]
    ),
    re.IGNORECASE,
)
# Characters that are read, or printed, as others. Dashes and quotes are dropped in the end: here they only part words.
_READ_AS = str.maketrans(
    {"’": "'", "\xad": "", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
    | dict.fromkeys("–—―", " -- ")
    | dict.fromkeys("“”«»„", ' " ')
    | dict.fromkeys("‘‹›", " ' ")
    | {"…": " ... "}
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PRINTED_AS = _BRACKETS | {"£": "#", "€": "$", "¢": "cents"}
_DROPPED = re.compile(r"['\"`.?!,:;‑-]|--+|\.\.\.")


def ptb_tokens(text: str) -> list[str]:
    """The lower-cased Penn Treebank tokens of one sentence, without punctuation.

    Source: what pycocoevalcap 1.2's `PTBTokenizer` returns; equal on 99.9 % or more of the texts of E2E, WebNLG and DART.

    Args:
      text: one sentence, or several; line ends count as spaces.

    Returns:
      Tokens; none for a text of punctuation only.

    >>> ptb_tokens("Mr. O'Neil's café (in the U.K.) isn't cheap: £20-25.")
    ['mr.', "o'neil", "'s", 'café', '-lrb-', 'in', 'the', 'u.k.', '-rrb-', 'is', "n't", 'cheap', '#', '20-25']
    """
    text = _ENTITY.sub(lambda entity: _ENTITIES[entity[0]], text).translate(_READ_AS)
    tokens = (token for token in _TOKEN.findall(text) if not _DROPPED.fullmatch(token))
    return [_PRINTED_AS.get(token, token.lower()) for token in tokens]
