"""Choose chest CT with a CC BY licence in the NCI Imaging Data Commons.

Needs `pip install idc-index`, and no network.

python scripts/idc/choose.py OUT --patients 200

OUT gets `series.csv` (one series for each patient: collection, licence, DOI to cite, size), and
`manifest.s5cmd`, for `idc download`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from idc_index.index import IDCClient

# Thin axial series have many slices; projection data, phantoms and scouts do not look like this.
_CHEST_CT = """
    SELECT * FROM index
    WHERE Modality = 'CT' AND SOPClassUID = '1.2.840.10008.5.1.4.1.1.2'
        AND BodyPartExamined IN ('CHEST', 'LUNG')
        AND license_short_name IN ('CC BY 3.0', 'CC BY 4.0')
        AND instanceCount BETWEEN 60 AND 1000
        AND collection_id NOT LIKE '%phantom%'
"""
_COUNT = """
    SELECT license_short_name AS licence, COUNT(*) AS series,
        COUNT(DISTINCT PatientID) AS patients, round(SUM(series_size_MB) / 1000) AS GB
    FROM ({}) GROUP BY licence ORDER BY licence
"""
_ONE_PER_PATIENT = """
    SELECT collection_id, PatientID, SeriesInstanceUID, instanceCount, series_size_MB,
        license_short_name, source_DOI, series_aws_url
    FROM ({}) WHERE series_size_MB < {}
    QUALIFY row_number() OVER
        (PARTITION BY collection_id, PatientID ORDER BY instanceCount DESC, SeriesInstanceUID) = 1
    ORDER BY md5(SeriesInstanceUID) LIMIT {}
"""


def main() -> None:
    """Count what there is, and write the lists for a random sample of patients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--patients", type=int, default=200)
    parser.add_argument("--max-mb", type=int, default=300, help="Largest series.")
    options = parser.parse_args()
    client = IDCClient()
    print(f"IDC {client.get_idc_version()}: chest CT that may be used with attribution")
    print(client.sql_query(_COUNT.format(_CHEST_CT)).to_string(index=False))
    chosen = client.sql_query(_ONE_PER_PATIENT.format(_CHEST_CT, options.max_mb, options.patients))
    options.out.mkdir(parents=True, exist_ok=True)
    chosen.to_csv(options.out / "series.csv", index=False)
    lines = "".join(f"cp {url} .\n" for url in chosen["series_aws_url"])
    (options.out / "manifest.s5cmd").write_text(lines)
    print(f"\nchosen: {len(chosen)} series, {chosen['series_size_MB'].sum() / 1000:.1f} GB, from")
    print(chosen["collection_id"].value_counts().head(8).to_string(header=False))


if __name__ == "__main__":
    main()
