"""The store as a resource: where the lineage tables are. What a store does: rsft_pipeline/store.py."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
from pydantic import Field

from resources import process
from rsft_pipeline.home import Home
from rsft_pipeline.store import Store


class StoreResource(dg.ConfigurableResource):
    """Opens the store, once per process. It stays open, because nothing is locked between commits."""

    catalog: str = Field("", description="`postgres:…` or `sqlite:/path`; default: a SQLite catalog in $RSFT_HOME.")
    data: str = Field("", description="Folder or object-store prefix of the Parquet files; default: in $RSFT_HOME.")
    memory: str = Field("", description="Most memory that DuckDB may use, e.g. `4GB`; default: 80 % of the machine's.")

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Tag the run with its process. It is done here because every run needs the store."""
        if context.run and context.instance:
            context.instance.add_run_tags(context.run.run_id, {process.TAG: process.this_process(context.run.run_id)})

    @contextmanager
    def open(self) -> Iterator[Store]:
        """The store, for a `with`; it stays open afterwards."""
        folder = Home.here().folder("store")
        catalog = self.catalog or f"sqlite:{folder / 'catalog.sqlite'}"
        yield _opened(catalog, self.data or str(folder / "data"), self.memory or None)


@functools.lru_cache(maxsize=4)
def _opened(catalog: str, data: str, memory: str | None) -> Store:
    """The store, opened once per process: loading DuckDB's extensions takes a quarter of a second."""
    return Store(catalog, data, memory=memory)
