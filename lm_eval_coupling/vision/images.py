"""Labeled images from folders, Parquet files or names on the Hub, as ``datasets`` loads them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lm_eval_coupling.errors import CouplingError

_FILES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
}


@dataclasses.dataclass(frozen=True)
class LabeledImage:
    """A row of a data set: number, name for readers, encoded image, number of its label."""

    number: int
    name: str
    encoded: bytes
    label: int

    def decoded(self) -> Image.Image:
        """Decode the image to RGB.

        Returns:
            An image of Pillow's.

        Raises:
            OSError: if it cannot be decoded; some decoders raise other exceptions.
        """
        with Image.open(io.BytesIO(self.encoded)) as image:
            return image.convert("RGB")

    def digest(self) -> str:
        """Hash the encoded image and its label; order and subset of the data do not matter."""
        return hashlib.sha256(self.encoded + f" {self.label}".encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class LabeledImages:
    """A split of a data set.

    Attributes:
        name: of the data set, as the name of a task.
        split: its name.
        classes: names of the labels; None if the data has only numbers.
        rows: the data set.
        columns: names of the columns of images and of labels.
    """

    name: str
    split: str
    classes: list[str] | None
    rows: Any
    columns: tuple[str, str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> LabeledImage:
        image, label = self.columns
        row = self.rows[number]
        cell = row[image] or {}
        file = "/".join(Path(cell.get("path") or "").parts[-2:])
        return LabeledImage(
            number, f"{number} ({file})" if file else str(number), _bytes_of(cell), int(row[label])
        )

    def first(self, limit: int | None) -> Iterator[LabeledImage]:
        """Yield the first ``limit`` images; all of them for None."""
        return (
            self[number] for number in range(len(self) if limit is None else min(limit, len(self)))
        )

    def count_labels(self) -> int:
        """Return one more than the largest number of a label in the data."""
        import pyarrow.compute as pc

        return pc.max(self.rows.with_format("arrow")[self.columns[1]]).as_py() + 1


def _bytes_of(cell: Mapping[str, Any]) -> bytes:
    """Return the encoded image; nothing, which cannot be decoded, if its file is gone."""
    if cell.get("bytes") is not None:
        return cell["bytes"]
    try:
        return Path(cell["path"]).read_bytes()
    except (OSError, KeyError, TypeError):
        return b""


def load_images(data: str, split: str | None = None) -> LabeledImages:
    """Open a data set with one column of images and one of class labels.

    Args:
        data: a folder of images with a subfolder for each label, a file or folder of Parquet, or a
            name on the Hub.
        split: by default ``test``, or the only one there is.

    Returns:
        The data set, no image of which has been decoded yet.

    Raises:
        CouplingError: if it cannot be loaded, has no such split, no images or no labels.
    """
    splits = _loaded(data)
    rows = _split_of(splits, split, data)
    image, label = _image_column(rows, data), _label_column(rows, data)
    import datasets

    rows = rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    classes = getattr(rows.features[label], "names", None)
    if classes is None and "string" in rows.features[label].dtype:
        rows = rows.class_encode_column(label)
        classes = rows.features[label].names
    rows = rows.filter(_is_labelled, input_columns=label)
    if not len(rows):
        raise CouplingError(
            f"got {data}, whose split {rows.split} has no labelled image; "
            "choose another with --split"
        )
    return LabeledImages(
        name=_name_of(data),
        split=str(rows.split),
        classes=classes,
        rows=rows,
        columns=(image, label),
    )


def _loaded(data: str) -> Mapping[str, Any]:
    import datasets

    path = Path(data).expanduser()
    try:
        if path.is_file():
            if path.suffix not in _FILES:
                raise CouplingError(
                    f"got the file {data}, "
                    "expected a folder of images, .parquet, or a data set's name"
                )
            return datasets.load_dataset(_FILES[path.suffix], data_files=str(path))
        return datasets.load_dataset(str(path) if path.is_dir() else data)
    except CouplingError:
        raise
    except Exception as error:  # the libraries below raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CouplingError(
            f"got data {data!r}, which datasets cannot load: {reason[0][:300]}"
        ) from error


def _split_of(splits: Mapping[str, Any], split: str | None, data: str) -> Any:
    names = list(splits)
    chosen = split or ("test" if "test" in names else names[0] if len(names) == 1 else None)
    if chosen not in names:
        given = f"split {split!r} of" if split else "no --split for"
        raise CouplingError(f"got {given} {data}, expected one of {', '.join(names)}")
    return splits[chosen]


def _image_column(rows: Any, data: str) -> str:
    import datasets

    def holds_images(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (
            isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
        )

    return _only_column(
        [name for name, feature in rows.features.items() if holds_images(feature)],
        "column of images",
        rows,
        data,
    )


def _label_column(rows: Any, data: str) -> str:
    """Name the column of class labels, or of numbers or texts under a name such as ``label``."""
    import datasets

    labels = [
        name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)
    ]
    named = [name for name in ("label", "labels", "class", "target") if name in rows.features]
    plain = [
        name for name in named if re.search("int|string", getattr(rows.features[name], "dtype", ""))
    ]
    return _only_column(
        labels or plain, "column of class labels (of a folder: two subfolders or more)", rows, data
    )


def _only_column(names: Sequence[str], kind: str, rows: Any, data: str) -> str:
    if len(names) != 1:
        raise CouplingError(
            f"got {data} with the columns {', '.join(rows.features)}, expected one {kind}"
        )
    return names[0]


def _is_labelled(label: int | None) -> bool:
    """Return whether a label is known; test splits on the Hub have -1 or nothing."""
    return label is not None and label >= 0


def _name_of(data: str) -> str:
    """Return a name for the task; a file such as ``test.parquet`` has its folder's."""
    path = Path(data).expanduser().resolve()
    if path.is_file():
        return (
            path.parent.name
            if path.stem.split("-")[0] in ("train", "test", "validation")
            else path.stem
        )
    return path.name if path.is_dir() else data.rstrip("/").split("/")[-1]
