"""A corpus: the three splits of one text under one tokeniser, built once, opened in no time."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from zoo.data.bigrams import Bigrams, bigrams_of
from zoo.data.files import SPLITS, Stamps
from zoo.data.passkey import Passkeys
from zoo.data.sources import HUB, Source, find_source, store_folder
from zoo.data.store import TokenStore, open_or_build, write_store
from zoo.data.tokenizers import Tokenizer, tokenizer_of
from zoo.errors import UserError, choose, refuse, sentence

SCORED_TOKENS = 2**20  # of a split that the bigram model is scored on


@dataclass(frozen=True)
class Corpus:
    """`train`, `valid`, `test` share no document."""

    name: str
    train: TokenStore
    valid: TokenStore
    test: TokenStore
    tokenizer: Tokenizer
    eval_documents: str  # "whole": evaluation never crosses a document; "joined": it may
    passkey: float = 0.0  # share of the training windows that hold a passkey
    passkey_facts: int = 1  # the most keys of such a window

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def tokenizer_name(self) -> str:
        """What identifies the tokenizer."""
        return self.tokenizer.name

    @property
    def fingerprint(self) -> str:
        """sha256 over the name, the tokeniser, the three stores and what is mixed into training:
        equal means the same tokens."""
        what = [self.name, self.tokenizer_name]
        what += [store.sha256 for store in (self.train, self.valid, self.test)]
        what += [f"passkey {self.passkey}"] if self.passkey else []
        what += [f"{self.passkey_facts} facts"] if self.passkey_facts > 1 else []
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Documents, tokens and bytes of each split, and what a bigram model scores on two."""
        return {
            split: {
                "documents": len(store.offsets) - 1,
                "tokens": len(store),
                "bytes": store.source_bytes,
                **({} if store is self.train else self._bigram_scores(store)),
            }
            for split, store in zip(SPLITS, (self.train, self.valid, self.test), strict=True)
        }

    def _bigram_scores(self, store: TokenStore) -> dict[str, float]:
        """In nats per token and bits per byte, over the start of a split."""
        tokens = store.tokens[:SCORED_TOKENS]
        nats = self.bigrams.nats(tokens) if len(tokens) > 1 else np.zeros(0)
        size = int(store.bytes_of(1, len(tokens)).sum())
        if not size:
            return {}
        figures = {"bigram_nats": nats.mean(), "bigram_bits": nats.sum() / size / np.log(2)}
        return {name: round(float(value), 4) for name, value in figures.items()}

    @cached_property
    def bigrams(self) -> Bigrams:
        """Of the training text: what any use of further context must beat."""
        return bigrams_of(self.train, self.vocab_size)

    def text(self, split: str) -> Int[np.ndarray, " t"]:
        """The tokens of a split, document after document."""
        return getattr(self, split).tokens

    @property
    def passkeys(self) -> Passkeys | None:
        """What a training window may hold besides the text."""
        if not self.passkey:
            return None
        return Passkeys(self.passkey, self.tokenizer.encode, self.passkey_facts)

    @property
    def bytes_per_token(self) -> float:
        """Over all splits; each store has its own."""
        stores = self.train, self.valid, self.test
        return sum(store.source_bytes for store in stores) / sum(len(store) for store in stores)


def open_corpus(spec: Mapping[str, Any], cache: str | Path) -> Corpus:
    """The corpus a data configuration (configs/data) names; its tokens are kept below `cache`.

    The tokens are built when there are none yet, when their source has changed since, or when they
    are damaged. Raises UserError, one line, where the source is missing, unreadable or no text.
    """
    documents = choose("data.eval_documents", spec["eval_documents"], ("whole", "joined"))
    tokenizer = tokenizer_of(spec)
    try:
        train, valid, test = _stores(spec, cache, tokenizer)
    except TouchedError as touched:  # whether anything changed is seen by reading all of it again
        train, valid, test = _stores(spec, cache, tokenizer)
        if [store.meta["whole"] for store in (train, valid, test)] != touched.read:
            raise
    return Corpus(
        name=spec["name"],
        train=train,
        valid=valid,
        test=test,
        tokenizer=tokenizer,
        eval_documents=documents,
        passkey=spec.get("passkey", 0.0),
        passkey_facts=spec.get("passkey_facts", 1),
    )


class TouchedError(UserError):
    """Files have another time than before they were read, and the size they had; `read` are the
    hashes of what was read of them."""

    read: list[str]


def _stores(spec: Mapping[str, Any], cache: str | Path, tokenizer: Tokenizer) -> list[TokenStore]:
    source = find_source(spec)
    written = _fingerprint(source, tokenizer)
    folder = store_folder(spec, cache)
    return open_or_build(folder, SPLITS, written, lambda to: _build(to, spec, source, tokenizer))


def _fingerprint(source: Source, tokenizer: Tokenizer) -> str:
    """What a store is made of. An earlier version drew tokens where the tokenizer's file says so:
    its stores have the source alone."""
    return source.fingerprint + " undrawn" * tokenizer.draws


def _build(folder: Path, spec: Mapping[str, Any], source: Source, tokenizer: Tokenizer) -> None:
    """Write the stores. UserError where the files change meanwhile: each is read several times, and
    a text that moves from one to another would be in two splits. Those of a data set of the package
    datasets are that package's, and divided by their content."""
    for split, documents in source.documents().items():
        write_store(
            folder / split,
            documents,
            tokenizer.encode_checked,
            tokenizer=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            source=_fingerprint(source, tokenizer),
        )
    if spec["name"] not in HUB:
        _check_unchanged(spec["name"], source.stamps, find_source(spec).stamps, folder)


def _check_unchanged(name: str, before: Stamps, after: Stamps, folder: Path) -> None:
    """Raise UserError with the names of files that came, went or changed while they were read."""
    changed = sorted({file for file, *_ in {*before} ^ {*after}})
    if not changed:
        return
    more = f" and {len(changed) - 3} more" * (len(changed) > 3)
    rule = f"{', '.join(changed[:3])}{more} changed while the text was read"
    advice = "Use the same command again"
    if [stamp[:2] for stamp in before] != [stamp[:2] for stamp in after]:
        refuse("data", name, rule, advice)
    touched = TouchedError(sentence(f"data={name}", rule, advice))
    touched.read = [TokenStore.open(folder / split, verify=False).meta["whole"] for split in SPLITS]
    raise touched
