"""The prompts of a run: texts kept in Arrow, and their tokens, computed when a batch needs them.

12 million captions as Python strings take 3 GB, their tokens padded to the longest 50 GB.
"""

from collections.abc import Sequence

import pyarrow as pa


class StoredTexts(Sequence[str]):
    """Texts in an Arrow array, each put into a template when it is read.

    Args:
        texts: array of strings.
        template: ``{}`` stands for the text.
    """

    def __init__(self, texts: pa.Array, template: str = "{}"):
        self.texts, self.template = texts, template

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # nobody takes slices
        return self.template.format(self.texts[int(index)].as_py())


def make_prompts(template: str, captions: Sequence[str]) -> Sequence[str]:
    """Return the user messages for captions or class names."""
    if isinstance(captions, StoredTexts):
        return StoredTexts(captions.texts, template)
    return [template.format(caption) for caption in captions]
