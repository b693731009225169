"""The run-time type checker of `pytest --shape-checks`: beartype, to which an int is a float."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
