"""Reports: one page that shows runs and studies, and its figures as files."""

from lm.report.page import write
from lm.report.sources import Entry, Source, load

__all__ = ["Entry", "Source", "load", "write"]
