"""The error of a refused request, and its JSON body."""

from typing import Any


class RefusedError(Exception):
    """A request that is refused.

    Args:
        status: HTTP status.
        code: one word for programs.
        message: one sentence for people: what is wrong, with the numbers.
        retry_after: seconds to wait before a retry; None where a retry does not help.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
        message = message[:2000].encode("utf-8", "backslashreplace").decode()  # JSON cannot hold lone surrogates
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """The body in OpenAI's format."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": None}}


def timed_out(seconds: float) -> RefusedError:
    """The error of a request that took too long."""
    return RefusedError(504, "timeout", f"not answered within {seconds:g} s", retry_after=1)
