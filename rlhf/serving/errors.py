"""Errors as clients of OpenAI's API expect them.

Here: which error is which answer. Not here: where errors come from.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from rlhf.serving.async_engine import EngineFailed, Overloaded, Stopping

_RETRY_AFTER_S = "1"
_PARAMETER = re.compile(r"(?:request '[^']*': )?(\w+)=")  # as the engine's messages begin
_REQUEST = re.compile(r"^request '[^']*'(?:: | )")


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = {"Retry-After": _RETRY_AFTER_S} if retry else {}

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError | None:
    """The answer to what may be raised on a request's way; None for what is a bug."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(str(error), status=503, code="overloaded", retry=True)
    if isinstance(error, Stopping):
        return ApiError(str(error), status=503, code="shutting_down", retry=True)
    if isinstance(error, EngineFailed):
        return ApiError(str(error), status=500, code="engine_failed")
    if isinstance(error, ValidationError):
        return _of_validation(error)
    if isinstance(error, ValueError):  # the engine's and SamplingParams', which name value, rule and way out
        message = _REQUEST.sub("", str(error))
        named = _PARAMETER.match(message)
        return ApiError(message, param=named.group(1) if named else None)
    return None


def _of_validation(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return ApiError(f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(f"unknown parameter: {'.'.join(place)}", param=".".join(place), code="unknown_parameter")  # fmt: skip
    message = first["msg"].removeprefix("Value error, ")
    where = f"{'.'.join(place)}: " if place else ""
    return ApiError(f"{where}{message}", param=place[0] if place else None)
