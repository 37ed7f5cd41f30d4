"""Predictions for a split as Parquet: a file of each rank, which one after another have the split's order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from recsys.data.storage import DataError, locate, naming
from recsys.model.ranker import RankerOutput
from recsys.runtime import Ranks

ROW_GROUP_ROWS = 1 << 17


@contextmanager
def writing_predictions(
    directory: str, ranks: Ranks, *, with_label: bool, with_domain: bool
) -> Iterator[Callable[[RankerOutput], None]]:
    """Give what takes the output for each of this rank's batches, in order; entering it is a collective call.

    They become `part-<rank>-of-<ranks>.parquet`, with columns `probability` (float32) and, where there are any, `label`
    (int8) and `domain` (int64). The file appears, whole, when the block ends without error.

    Args:
        directory: path or URL, as in `recsys.data.storage.locate`; no file may be there.
        ranks: this process among all.
        with_label: whether the batches have labels.
        with_domain: whether they have a domain.

    Raises:
        DataError: there are files already, or the storage refuses or does not answer.
    """
    place = locate(directory, source="--predictions")
    if ranks.is_first:
        with naming(f"--predictions: {place}"):
            taken = place.files()
        if taken:
            raise DataError(f"--predictions: {place} holds files, such as {taken[0]}; name a new or an empty directory")
    dist.barrier()  # none begins to write while the first looks what is there
    schema = pa.schema(
        {
            **({"label": pa.int8()} if with_label else {}),
            "probability": pa.float32(),
            **({"domain": pa.int64()} if with_domain else {}),
        }
    )
    with (place / f"part-{ranks.rank:05d}-of-{ranks.world_size:05d}.parquet").writing() as path:
        held: list[pa.Table] = []
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:

            def write(output: RankerOutput) -> None:
                columns = {
                    "label": output.labels.to(torch.int8),
                    "probability": output.logits.float().sigmoid(),
                    "domain": output.domain,
                }
                held.append(pa.table([columns[name].cpu().numpy() for name in schema.names], schema))
                if sum(map(len, held)) >= ROW_GROUP_ROWS:
                    flush()

            def flush() -> None:
                if held:
                    writer.write_table(pa.concat_tables(held), row_group_size=ROW_GROUP_ROWS)
                    held.clear()

            yield write
            flush()
