"""mrope positions as a vision-language model makes them."""

from __future__ import annotations

import numpy as np


def with_image(before: int, height: int, width: int, after: int) -> np.ndarray:
    """int64 [3, L]: text, an image of height × width patches, and text again.

    Inside an image time stands still while height and width run over the patches; the text after it
    goes on behind the largest position.
    """
    text = np.broadcast_to(np.arange(before), (3, before))
    rows, columns = np.divmod(np.arange(height * width), width)
    image = np.stack([np.zeros_like(rows), rows, columns]) + before
    first = (max(text.max(initial=-1), image.max(initial=-1))) + 1
    rest = np.broadcast_to(first + np.arange(after), (3, after))
    return np.concatenate([text, image, rest], axis=1).astype(np.int64)
