"""What a conversion reports of keys that do not fit."""

import dataclasses


class ConversionError(ValueError):
    """Keys are unused, missing, of the wrong shape or there twice; the text lists them.

    Attributes:
      report: the lists of keys, a ``Report``.
    """

    def __init__(self, report: "Report") -> None:
        """Makes the error that says what ``report`` says."""
        super().__init__(str(report))
        self.report = report


@dataclasses.dataclass
class Report:
    """What stood in the way of a conversion, a line for each key.

    Attributes:
      headline: what it is about.
      unused: keys that no rule knows, or that the template lacks.
      missing: keys of the template that nothing gave; without a template, keys that a
        module lacks of which others are there.
      misshapen: keys whose array has another shape than it should have.
      repeated: keys that lead to a place which another key has filled.
    """

    headline: str = ""
    unused: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    repeated: list[str] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to report."""
        return any([self.unused, self.missing, self.misshapen, self.repeated])

    def __str__(self) -> str:
        """The headline, then every list with its length."""
        lists = {
            "unused": self.unused,
            "missing": self.missing,
            "of the wrong shape": self.misshapen,
            "for a place that is taken": self.repeated,
        }
        lines = [self.headline]
        for name, keys in lists.items():
            if keys:
                lines += [f"{len(keys)} {name}:", *(f"  {key}" for key in keys)]
        return "\n".join(lines)
