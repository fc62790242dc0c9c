"""How much of a reference's words and letters an answer has: ROUGE-L and chrF, by the libraries that define them.

Both are optional (`pip install lora-cli[metrics]`); without them an evaluation says so and goes on. Knows strings only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

INSTALL = "ROUGE-L and chrF are left out; pip install 'lora-cli[metrics]' brings them"

# A word, or one character of a script that doesn't write spaces: Chinese, Japanese kana, Thai.
_WORD = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u0e00-\u0e7f\u3040-\u9fff]+"
)

Pairs = Sequence[tuple[str, str]]
"""(answer, reference)"""


def overlap_is_measured() -> bool:
    """Whether the libraries are there."""
    return find_spec("rouge_score") is not None and find_spec("sacrebleu") is not None


def rouge_l(pairs: Pairs) -> NDArray[np.float64]:
    """ROUGE-L's F-measure of each pair, 0 to 1, without stemming (Lin 2004; Google's rouge_score).

    rouge_score's own words are made of a-z and 0-9 alone, so that every answer in Russian or Chinese would have 0;
    ours are the same on such text and go by Unicode elsewhere.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return np.array([scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs])


def chrf(pairs: Pairs) -> NDArray[np.float64]:
    """chrF of each pair, as a share: n-grams of 1 to 6 characters, beta 2 (Popović 2015; sacrebleu, over 100)."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    return np.array([metric.sentence_score(answer, [reference]).score / 100 for answer, reference in pairs])


class _Words:
    """rouge_score's idea of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())
