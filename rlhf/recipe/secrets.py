"""Which of a recipe's values are secrets: they are shown to nobody and left out of every dump.

Here: values written into a recipe. Values read from the environment are known without guessing (`interpolate`).
"""

from __future__ import annotations

import re
from typing import Any

from rlhf.recipe.tree import PathKey

HIDDEN = "<hidden>"

# A key that is nothing but a secret, whatever its value; and a word that also has harmless meanings (a stop token).
_SECRET_KEY = re.compile(
    r"(password|passwd|passphrase|secret|credential|api_?key|(access|private|auth|hf|hub)_?(key|token))"
)
_MAYBE_KEY = re.compile(r"(^|_)(token|key|auth|bearer)s?($|_)")
_CREDENTIAL = re.compile(
    r"^(hf_|sk-|sk_|pk_|rk_|gh[opsur]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|AIza|eyJ)[A-Za-z0-9_\-.=]{12,}$"
    r"|^Bearer \S+$|-----BEGIN [A-Z ]*PRIVATE KEY|^[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@"
)


def hides(path: PathKey, value: Any) -> bool:
    """True if the text at `path` must not be shown."""
    if not isinstance(value, str) or not value:
        return False
    if _CREDENTIAL.search(value):
        return True
    words = [_snake(part) for part in path if isinstance(part, str)]
    if any(_SECRET_KEY.search(word) for word in words):
        return True
    return any(_MAYBE_KEY.search(word) for word in words) and _looks_random(value)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()


def _looks_random(value: str) -> bool:
    """Long, without spaces, letters and digits mixed."""
    return (
        len(value) >= 16
        and not re.search(r"\s", value)
        and bool(re.search(r"\d", value) and re.search(r"[A-Za-z]", value))
    )
