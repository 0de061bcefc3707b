"""A matrix for each file, and the processes that all files of one test process fork their own from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from matrix import Matrix, open_matrix
from nursery import Nursery
from shop import Site, open_site


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as site:
        yield site


@pytest.fixture(scope="module")
async def matrix(tmp_path_factory: pytest.TempPathFactory, site: Site, nursery: Nursery) -> AsyncIterator[Matrix]:
    async with open_matrix(tmp_path_factory.mktemp("matrix"), site, nursery) as matrix:
        yield matrix
