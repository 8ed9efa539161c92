"""Corpora of source code: units with their comments, cut out by a real grammar, tolerant of whatever lies in a folder.

`read_corpus` for folders, `syntax_problem` for a piece of code, `make_language` for a language described elsewhere.
"""

from __future__ import annotations

from model_foundry.data.code.corpus import Corpus, CorpusCounts, read_corpus
from model_foundry.data.code.languages import LANGUAGES, Language, find_language, make_language
from model_foundry.data.code.syntax import syntax_problem
from model_foundry.data.code.units import CodeUnit, UnitRules

__all__ = [
    "LANGUAGES",
    "CodeUnit",
    "Corpus",
    "CorpusCounts",
    "Language",
    "UnitRules",
    "find_language",
    "make_language",
    "read_corpus",
    "syntax_problem",
]
