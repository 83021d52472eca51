"""What a reader of a result needs to know about its data: counts, repetitions, and images of the training set."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dataloader.captions import CaptionSet
from dataloader.storage.identity import checksum, stamps
from utils.errors import UserError
from utils.tokenizer import get_tokenizer

MAX_COMPARED = 20_000  # images whose contents are compared with each other
TAIL_BYTES = 4096  # compared before whole files


def count_captions(found: CaptionSet, context_length: int) -> dict[str, Any]:
    """Return the numbers of images and captions, of what was left out, and of what is cut or repeated.

    `captions_cut` are longer than `context_length` tokens. `images_repeated` have the contents of an earlier file; it
    is None for images in shards and for more than 20,000.
    """
    captions = [caption for image in found.images for caption in image.captions]
    paths = [image.path for image in found.images]
    is_comparable = not found.shards and len(paths) <= MAX_COMPARED
    return {
        "images": found.num_images,
        "captions": len(captions),
        "images_missing": len(found.missing),
        "entries_unusable": len(found.unusable),
        "notes": {note: len(examples) for note, examples in found.notes.items()},
        "context_length": context_length,
        "captions_cut": sum(_is_cut(caption, context_length) for caption in captions),
        "captions_repeated": len(captions) - len(set(captions)),
        "images_repeated": len(find_copies(paths)) if is_comparable else None,
    }


def describe_counts(found: CaptionSet, counts: dict[str, Any]) -> str:
    """Return a line with the counts, and an example of what was left out."""
    parts = [found.describe()]
    if cut := counts["captions_cut"]:
        parts.append(f"{cut:,} captions ({cut / counts['captions']:.1%}) are cut at {counts['context_length']} tokens")
    if counts["captions_repeated"]:
        parts.append(f"{counts['captions_repeated']:,} captions repeat another")
    if counts["images_repeated"]:
        parts.append(f"{counts['images_repeated']:,} images have the contents of another")
    return "; ".join(parts)


def require_complete(num_images: int, left_out: Sequence[str], max_share: float) -> None:
    """Raise UserError if more than `max_share` of the `num_images` held-out images are missing or unreadable.

    `left_out`: the names of these.
    """
    if len(left_out) > max_share * num_images:
        raise UserError(
            f"{len(left_out):,} of the {num_images:,} held-out images are missing or unreadable (e.g. "
            f"{left_out[0][:100]}), so a figure would not be of this data set; complete the images, or accept it with "
            "--allow_missing"
        )


def find_shared(held_out: CaptionSet, training: CaptionSet) -> list[int | str]:
    """Return the ids of held-out images that are training images too: of the same content, or id and a caption.

    About 88 % of Karpathy's test split is in COCO's train2017. In shards, contents are not compared.
    """
    captions_of = {image.image_id: image.captions for image in training.images}
    shared = {
        number
        for number, image in enumerate(held_out.images)
        if not set(image.captions).isdisjoint(captions_of.get(image.image_id, ()))
    }
    if not (held_out.shards or training.shards):
        paths = [image.path for image in held_out.images]
        sizes = stamps(paths)[:, 0]
        others = [image.path for image in training.images]
        same_size = set(sizes.tolist())
        others = [path for path, size in zip(others, stamps(others)[:, 0].tolist(), strict=True) if size in same_size]
        copies = find_copies([*others, *paths])
        shared |= {number - len(others) for number, first in copies.items() if first < len(others) <= number}
    return [held_out.images[number].image_id for number in sorted(shared)]


def find_copies(paths: Sequence[str]) -> dict[int, int]:
    """Return, for each file whose bytes are those of an earlier one, the positions of both: {later: first}.

    Whole files are read only where size and last bytes agree.
    """
    sizes = stamps(paths)[:, 0].tolist()
    groups: Iterable[list[int]] = [[number for number, size in enumerate(sizes) if size > 0]]
    for key in (sizes.__getitem__, lambda number: _tail(paths[number]), lambda number: checksum(paths[number])):
        groups = [part for group in groups for part in _split(group, key) if len(part) > 1]
    return {number: group[0] for group in groups for number in group[1:]}


def _split(numbers: list[int], key: Callable[[int], Hashable]) -> Iterable[list[int]]:
    parts: dict[Hashable, list[int]] = {}
    for number in numbers:
        parts.setdefault(key(number), []).append(number)
    return parts.values()


def _tail(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            file.seek(-min(TAIL_BYTES, file.seek(0, 2)), 2)
            return file.read()
    except OSError:
        return path.encode("utf-8", "surrogatepass")  # equal to no other


def _is_cut(caption: str, context_length: int) -> bool:
    limit = context_length - 2  # without the markers
    if caption.isascii() and len(caption) - caption.count(" ") <= limit:  # each token has a character, and no space
        return False
    return len(get_tokenizer().encode(caption)) > limit
