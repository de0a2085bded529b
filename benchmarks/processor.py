"""What the processor is called."""

import re


def name_in(description: str) -> str | None:
    """Returns the name in Linux's description of the processors, None if there is none.

    With family and model where those are given: virtual machines leave the number out of the name.
    """
    fields = dict(re.findall(r"^(\w[\w ]*?)\s*:[ \t]*(\S.*)$", description, re.MULTILINE))
    name = fields.get("model name")
    if name is not None and {"cpu family", "model"} <= set(fields):
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name
