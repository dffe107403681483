"""Read images from files: DICOM series, NIfTI, MetaImage, NRRD. The one reader of both sides.

Preparing and fine-tuning must agree on what a file shows and refuse the same broken ones, so the
checks stand here: pydicom and SimpleITK, which the rest of `store` does not import.
"""


class Rejected(Exception):
    """An image that cannot be used.

    `reason` is a fixed word of the rule, safe to show anywhere; `detail` says what was found, and
    may name header text: it stays private.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason
