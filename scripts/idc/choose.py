"""Choose chest CT with a CC BY licence in the NCI Imaging Data Commons.

python scripts/idc/choose.py OUT --patients 200

Needs `pip install idc-index`, and no network. OUT gets `series.csv` (one series of each patient:
collection, licence, DOI to cite, size), and `manifest.s5cmd`, for `idc download-from-manifest`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from idc_index.index import IDCClient

# The largest series of each patient. Scouts have fewer slices, and projection data are another
# SOP class. Ordered by a hash: the first ones are a random sample, the same at every run.
_CHEST_CT = """
    SELECT collection_id, PatientID, SeriesInstanceUID, instanceCount, series_size_MB,
        license_short_name, source_DOI, series_aws_url
    FROM index
    WHERE SOPClassUID = '1.2.840.10008.5.1.4.1.1.2'
        AND BodyPartExamined IN ('CHEST', 'LUNG')
        AND license_short_name IN ('CC BY 3.0', 'CC BY 4.0')
        AND instanceCount BETWEEN 60 AND 1000 AND series_size_MB < 300
        AND collection_id NOT LIKE '%phantom%'
    QUALIFY row_number() OVER
        (PARTITION BY collection_id, PatientID ORDER BY instanceCount DESC, SeriesInstanceUID) = 1
    ORDER BY md5(SeriesInstanceUID)
"""


def main() -> None:
    """Print what there is, and write the lists for a sample of patients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--patients", type=int, default=200)
    options = parser.parse_args()
    client = IDCClient()
    found = client.sql_query(_CHEST_CT)
    print(f"IDC {client.get_idc_version()}, the largest series of each patient:")
    groups = found.groupby(["collection_id", "license_short_name"])["series_size_MB"]
    table = (
        groups.agg(patients="size", GB=lambda mb: round(mb.sum() / 1000)).astype(int).reset_index()
    )
    print(table.sort_values("patients", ascending=False).head(12).to_string(index=False))
    print(f"in all: {len(found)} patients of {len(table)} collections, {table['GB'].sum()} GB")
    chosen = found.head(options.patients)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen.to_csv(options.out / "series.csv", index=False)
    lines = "".join(f"cp {url} .\n" for url in chosen["series_aws_url"])
    (options.out / "manifest.s5cmd").write_text(lines)
    size, collections = chosen["series_size_MB"].sum() / 1000, chosen["collection_id"].nunique()
    print(f"chosen: {len(chosen)} patients of {collections} collections, {size:.1f} GB")


if __name__ == "__main__":
    main()
