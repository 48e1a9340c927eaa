"""What broke a prompt's prefix: logs and transcripts read call by call, each against the last.

    report = lint_file(Path("requests.jsonl"))
    for found in report.breaks:
        print(found.line, found.name, found.lost_tokens, found.fix)

Every file is read in one pass. Memory is bounded by what is open at a time, not by the file.
"""

from kvmem.explain.lint.cached import PrefixCache, predict_cached_tokens
from kvmem.explain.lint.lint import Linter, lint_file
from kvmem.explain.lint.measure import Characters, Tokens, load_tokenizer
from kvmem.explain.lint.rules import RULES, Rule
from kvmem.explain.lint.values import Break, Call, Fault, FileReport, Part, Request

__all__ = [
    "RULES",
    "Break",
    "Call",
    "Characters",
    "Fault",
    "FileReport",
    "Linter",
    "Part",
    "PrefixCache",
    "Request",
    "Rule",
    "Tokens",
    "lint_file",
    "load_tokenizer",
    "predict_cached_tokens",
]
