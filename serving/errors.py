"""Why a request is not answered, in the form that its caller gets."""

from typing import Any


class RefusedError(Exception):
    """A request that ends without an answer.

    Args:
        status: of HTTP.
        code: one word for programs.
        message: one sentence for people, of what was wrong and by how much.
        retry_after: seconds until it is worth to ask again; None where it is not.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
        message = message[:2000].encode("utf-8", "backslashreplace").decode()  # JSON takes no halves of characters
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's interface has it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": None}}


def timed_out(seconds: float) -> RefusedError:
    """What is said of a request that took too long."""
    return RefusedError(504, "timeout", f"not answered within {seconds:g} s", retry_after=1)
