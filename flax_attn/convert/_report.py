"""The report on keys that do not fit."""

import dataclasses


class ConversionError(ValueError):
    """Keys are unused, missing, of the wrong shape or repeated; the message lists them.

    Attributes:
      report: the lists of keys, a ``Report``.
    """

    def __init__(self, report: "Report") -> None:
        """Makes the error whose message is ``report``."""
        super().__init__(str(report))
        self.report = report


@dataclasses.dataclass
class Report:
    """The keys that did not fit in a conversion, one line each.

    Attributes:
      headline: the summary.
      unused: keys that no rule knows, or that the template lacks.
      missing: keys of the template that were not found; without a template, keys that
        are absent from an incomplete module.
      misshapen: keys whose array does not have the expected shape.
      repeated: keys that are converted to the same key as an earlier one.
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
            "repeated": self.repeated,
        }
        lines = [self.headline]
        for name, keys in lists.items():
            if keys:
                lines += [f"{len(keys)} {name}:", *(f"  {key}" for key in keys)]
        return "\n".join(lines)
