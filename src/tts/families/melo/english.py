"""MeloTTS's English front end: text to the phonemes and BERT tokens that its voices learnt from.

What `melo.text.english` does, without importing it: that module downloads a tokenizer and two NLTK
corpora, wants MeCab, unpickles a file beside itself or writes one there, and keeps BERT in a global
of the process. Here nothing outlives the model. A test holds both equal, symbol by symbol. The
package's own number, time and abbreviation rules are used as they are.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# Two of the package's rules share an `inflect` engine each, which remembers what it is counting.
_RULES = threading.Lock()

_FIRST_ENTRY = 49  # lines of cmudict.rep before it are comments
_PUNCTUATION = frozenset(".,?!'-")
# Left as it is, this is read "minus", or "quintillion", or raises.
_JOINED_DIGITS = re.compile(r"(?<=[0-9])-(?=[0-9])")
_LONG_NUMBER = re.compile(r"[0-9][0-9,]{15,}")
# BERT's tokenizer gives up on a word of more than 100 characters.
_ENDLESS_WORD = re.compile(r"(\S{48})(?=\S)")
_SIGNS = str.maketrans(
    {"%": " percent", "&": " and ", "。": ".", "！": "!", "？": "?", "；": ";", "，": ",",
     "“": None, "”": None, '"': None, "‘": "'", "’": "'", "…": ".", "—": ", ", "–": ", ",
     **dict.fromkeys("<>()[]«»#")}
)  # fmt: skip
_TWO_WORDS = re.compile(r"([a-z])([A-Z])")
_ACRONYM = re.compile(r"\b[A-Z]{2,5}\b")

MAX_TOKENS = 100
"""WordPieces of one run of the network: BERT takes 512, and its memory grows with the square."""


class Guess(Protocol):
    """How to say a word that is not in the dictionary."""

    def __call__(self, word: str) -> list[str]:
        """ARPAbet with stress digits; `word` is in small letters."""
        ...


class Tokenizer(Protocol):
    """BERT's WordPiece."""

    def encode(self, text: str) -> tuple[list[str], list[int]]:
        """Tokens and their ids, without the marks of begin and end."""
        ...


@dataclass(frozen=True, slots=True)
class Phonemes:
    """One run of the network. `tones` goes with `symbols`; the marks of begin and end are in all.

    `tokens` are BERT's ids, and `per_token` how many symbols each of them has.
    """

    symbols: tuple[str, ...]
    tones: tuple[int, ...]
    tokens: tuple[int, ...]
    per_token: tuple[int, ...]


class Dictionary:
    """CMU's pronunciations, read from the package's cmudict.rep, taken apart when asked for."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        self._entries = entries

    @classmethod
    def read(cls, path: Path) -> Dictionary:
        """Raises OSError, and ValueError for what is no such file."""
        with path.open(encoding="latin-1") as lines:
            pairs = [
                line.strip().split("  ", 1)
                for number, line in enumerate(lines, 1)
                if number >= _FIRST_ENTRY
            ]
        return cls(dict(pairs))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, word: str) -> bool:
        return word.upper() in self._entries

    def say(self, word: str) -> list[str]:
        """ARPAbet with stress digits. Raises KeyError."""
        return [phone for phone in self._entries[word.upper()].split() if phone != "-"]


class English:
    """Of one model: its symbols, its tokenizer, a dictionary and what to do without an entry."""

    def __init__(
        self,
        dictionary: Dictionary,
        tokenizer: Tokenizer,
        rules: Callable[[str], str],
        guess: Guess,
        symbols: Iterable[str],
    ) -> None:
        self._dictionary = dictionary
        self._tokenizer = tokenizer
        self._rules = rules
        self._guess = guess
        self._symbols = frozenset(symbols)
        (self._begin_token,), (self._end_token,) = (
            tokenizer.encode(mark)[1] for mark in ("[CLS]", "[SEP]")
        )

    def read(self, text: str) -> Iterator[Phonemes]:
        """One segment, mostly in one run; none where there is nothing to say."""
        spelled = {word.lower() for word in _ACRONYM.findall(text)}
        tokens, ids = self._tokenizer.encode(self.normalise(text))
        for first, last in _runs(_words(tokens), MAX_TOKENS):
            run = self._phonemes(tokens, ids, list(_words(tokens[first:last])), first, spelled)
            if any(symbol.isalpha() and symbol != "UNK" for symbol in run.symbols):
                yield run

    def normalise(self, text: str) -> str:
        """In small letters, with numbers, times and abbreviations written out."""
        text = _TWO_WORDS.sub(r"\1 \2", text.translate(_SIGNS))
        text = _LONG_NUMBER.sub(lambda found: " ".join(found.group().replace(",", "")), text)
        with _RULES:
            text = self._rules(_JOINED_DIGITS.sub(" ", text))
        return _ENDLESS_WORD.sub(r"\1 ", text)

    def _phonemes(
        self,
        tokens: Sequence[str],
        ids: Sequence[int],
        words: Sequence[tuple[int, int]],
        offset: int,
        spelled: set[str],
    ) -> Phonemes:
        symbols, tones, per_token = ["_"], [0], [1]
        last = offset
        for begin, end in words:
            pieces = tokens[offset + begin : offset + end]
            said = self._say("".join(piece.removeprefix("##") for piece in pieces), spelled)
            symbols += (self._known(symbol) for symbol, _ in said)
            tones += (tone for _, tone in said)
            per_token += spread(len(said), end - begin)
            last = offset + end
        return Phonemes(
            (*symbols, "_"),
            (*tones, 0),
            (self._begin_token, *ids[offset:last], self._end_token),
            (*per_token, 1),
        )

    def _say(self, word: str, spelled: set[str]) -> list[tuple[str, int]]:
        if word in self._dictionary:
            return [symbol_and_tone(phone) for phone in self._dictionary.say(word)]
        if not any(char.isalnum() for char in word) or word.startswith("["):
            return [(char, 0) for char in word if char in _PUNCTUATION]
        said = spell(word) if word in spelled else self._guess(word) or spell(word)
        return [symbol_and_tone(phone) for phone in said]

    def _known(self, symbol: str) -> str:
        symbol = "V" if symbol == "v" else symbol  # the small one is Spanish
        return symbol if symbol in self._symbols else "UNK"


def symbol_and_tone(phone: str) -> tuple[str, int]:
    """The stress digit of ARPAbet becomes a tone: 0 none, else the digit and 1."""
    if phone[-1:].isdigit():
        return phone[:-1].lower(), int(phone[-1]) + 1
    return phone.lower(), 0


def spread(symbols: int, tokens: int) -> list[int]:
    """Symbols of a word over its tokens, evenly, the first ones getting the rest."""
    each, left = divmod(symbols, tokens)
    return [each + (i < left) for i in range(tokens)]


_LETTERS = dict(
    zip(
        "abcdefghijklmnopqrstuvwxyz",
        (
            "EY1|B IY1|S IY1|D IY1|IY1|EH1 F|JH IY1|EY1 CH|AY1|JH EY1|K EY1|EH1 L|EH1 M|EH1 N|OW1|"
            "P IY1|K Y UW1|AA1 R|EH1 S|T IY1|Y UW1|V IY1|D AH1 B AH0 L Y UW0|EH1 K S|W AY1|Z IY1"
        ).split("|"),
        strict=True,
    )
)


def spell(word: str) -> list[str]:
    """The names of its letters; what is no English letter is left out."""
    return [phone for char in word for phone in _LETTERS.get(char, "").split()]


def package_rules() -> Callable[[str], str]:
    """`melo.text.english.text_normalize`, from where it takes it. Imports the package."""
    from melo.text.english_utils.abbreviations import expand_abbreviations
    from melo.text.english_utils.number_norm import normalize_numbers
    from melo.text.english_utils.time_norm import expand_time_english

    def rules(text: str) -> str:
        return str(expand_abbreviations(normalize_numbers(expand_time_english(text.lower()))))

    return rules


class WordPiece:
    """The tokenizer of an uncased BERT, out of its vocab.txt. For any thread."""

    def __init__(self, vocabulary: Path) -> None:
        """Raises ValueError and OSError."""
        from tokenizers import BertWordPieceTokenizer

        words = vocabulary.read_text(encoding="utf-8").splitlines()
        self.size = len(words)
        ids = {word: i for i, word in enumerate(words)}
        if missing := {"[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"} - ids.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        self._tokenizer: Any = BertWordPieceTokenizer(ids, lowercase=True)

    def encode(self, text: str) -> tuple[list[str], list[int]]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return encoded.tokens, encoded.ids


def _words(tokens: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of tokens that are one word."""
    begin = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or not tokens[end].startswith("##"):
            yield begin, end
            begin = end


def _runs(words: Iterable[tuple[int, int]], longest: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens of at most `longest`, cut between words (a word has 100 at most)."""
    first = last = 0
    for _, end in words:
        if end - first > longest and last > first:
            yield first, last
            first = last
        last = end
    if last > first:
        yield first, last
