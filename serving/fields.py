"""Field types that accept several spellings, or few values."""

import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


_BOOLS = {"1": True, "true": True, "0": False, "false": False}


def _to_bool(value: Any) -> Any:
    if isinstance(value, str):
        return _BOOLS.get(value.lower(), value)
    return bool(value) if type(value) is int and value in (0, 1) else value


def _to_int(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value) else value


# as HTML forms send them: "1", "0", "true" and "false" in any case, the numbers 1 and 0, and decimal digits
FormBool = Annotated[bool, BeforeValidator(_to_bool)]
FormInt = Annotated[int, BeforeValidator(_to_int)]

Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]  # 0: greedy decoding
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


def only(*allowed: Any) -> AfterValidator:
    """Refuse a value other than null and `allowed`, the values that change nothing."""

    def check(value: Any) -> Any:
        # True is 1 in Python, and not in JSON
        if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            return value
        is_many = isinstance(value, (list, dict))
        text = f"a {type(value).__name__} of {len(value)}" if is_many else json.dumps(value)[:60]
        supported = " or ".join(json.dumps(one) for one in (*allowed, None))
        raise ValueError(f"it is {text}; what is supported here is {supported}")

    return AfterValidator(check)
