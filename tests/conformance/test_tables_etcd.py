"""The laws of a table, on a real etcd."""

import itertools
from collections.abc import Iterator

import pytest

from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.tables import MakeTable, TableConformance

_numbers = itertools.count()


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


class TestEtcdTable(TableConformance):
    @pytest.fixture
    def options(self, etcd: EtcdServer) -> EtcdOptions:
        # A prefix of its own for each test; one is the beginning of the next.
        return EtcdOptions(endpoints=(etcd.endpoint,), prefix=f"/test{next(_numbers)}")

    @pytest.fixture
    def make_table(self, options: EtcdOptions) -> MakeTable:
        return lambda: EtcdStore(options).make_table()
