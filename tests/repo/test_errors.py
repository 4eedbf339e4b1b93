"""Errors say whose they are, and go on saying it in another process."""

from __future__ import annotations

import pickle

import pytest

from renio_megatron import errors
from renio_megatron.errors import ConfigError, DataError, RenioError, Scope, on_every_rank

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RenioError)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_scope_is_kept_on_the_way_to_another_process(kind):
    assert kind("broken").scope is Scope.ONE_RANK
    for scope in Scope:
        error = kind("broken", scope=scope)
        arrived = pickle.loads(pickle.dumps(error))
        assert (type(arrived), str(arrived), arrived.scope) == (kind, "broken", scope)


def test_errors_of_what_every_rank_reads_are_every_ranks():
    with pytest.raises(DataError, match="broken") as caught, on_every_rank():
        raise DataError("broken") from ValueError("behind it")
    assert caught.value.scope is Scope.ALL_RANKS
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ZeroDivisionError), on_every_rank():
        raise ZeroDivisionError
    with on_every_rank():
        pass
    assert ConfigError("later").scope is Scope.ONE_RANK
