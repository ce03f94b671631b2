"""What accelerate did, told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """What `accelerate` found: `swapped` names what our kernels compute, `left` what they do not.

    Each is a mapping from a module's or layer's name to a sentence about it.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    nothing: str = "no ConvLSTM or ConvGRU was found"
    """What it says where it found nothing."""

    def __str__(self) -> str:
        if not self.swapped and not self.left:
            return f"accelerate: {self.nothing}"
        rows = [(name or "(the model)", "swapped", told) for name, told in self.swapped.items()]
        rows += [(name or "(the model)", "left", told) for name, told in self.left.items()]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(["accelerate:", *(f"  {name:{width}}  {what:7}  {told}" for name, what, told in rows)])
