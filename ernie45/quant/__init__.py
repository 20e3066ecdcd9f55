"""Fewer bits: what is quantised (`spec`), how it lies in memory (`pack`), how it computes (`linear`, `block`), how it is made (`rtn`)."""
