"""CIDEr-D: how far a caption says what people said of the image (Flickr30k, NoCaps, COCO).

Source: Vedantam, Zitnick, Parikh 2015, "CIDEr: Consensus-based Image Description Evaluation", section 6 for the -D.
What the paper leaves open is as the COCO caption evaluation, which all papers report, has it.
"""

import math
from collections import Counter
from collections.abc import Sequence

LONGEST = 4
"""Words of the longest n-grams."""
SIGMA = 6.0
"""Of the Gaussian that punishes other lengths, in words."""
SCALE = 10.0

NGram = tuple[str, ...]


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """The mean over the images, and the score of each image.

    For each n from 1 to 4 a caption is the vector of its n-grams, each weighted by how often it occurs times
    log(images / images in whose references it occurs). A prediction's score is the cosine with a reference, where no
    n-gram counts more often than the reference has it, times exp(-(difference in length)^2 / (2 sigma^2)); averaged
    over n and over the references, times 10.

    The rarity of n-grams is that of these references: scores compare only on the same set of images, and a single
    image scores 0, as nothing in it is rare.

    Args:
        predictions: (images,) captions as tokens with spaces between; see `ptb_tokens`.
        references: (images,) lists of at least one caption, likewise.

    Returns:
        mean, and (images,) scores, each in [0, 10].

    Raises:
        ValueError: no image, an image without references, or lists of different lengths.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for the references of {len(references)} images")
    if not predictions:
        raise ValueError("there are no captions to score")
    counted = []
    for image, captions in enumerate(references):
        if isinstance(captions, str) or not captions:
            raise ValueError(f"image {image}: references must be a list of at least one caption, not {captions!r}")
        counted.append([_ngrams(caption) for caption in captions])
    images_with = Counter(ngram for captions in counted for ngram in set().union(*captions))
    log_images = math.log(len(references))

    def rarity(ngram: NGram) -> float:
        return log_images - math.log(max(images_with[ngram], 1))

    scores = []
    for prediction, captions in zip(predictions, counted, strict=True):
        vector = _Vector(_ngrams(prediction), rarity)
        similarities = [vector.similarity(_Vector(caption, rarity)) for caption in captions]
        scores.append(SCALE * sum(similarities) / len(similarities))
    return sum(scores) / len(scores), scores


class _Vector:
    """A caption's n-grams, weighted.

    Attributes:
        weights: for each n from 1 on, n-gram -> weight.
        norms: for each n, the length of that vector.
        words: the caption's length as the COCO evaluation takes it: its number of word pairs.
    """

    def __init__(self, counts: Counter[NGram], rarity):
        self.weights: list[dict[NGram, float]] = [{} for _ in range(LONGEST)]
        self.words = 0
        for ngram, count in counts.items():
            self.weights[len(ngram) - 1][ngram] = count * rarity(ngram)
            if len(ngram) == 2:
                self.words += count
        self.norms = [math.sqrt(sum(weight**2 for weight in weights.values())) for weights in self.weights]

    def similarity(self, reference: "_Vector") -> float:
        total = 0.0
        for mine, theirs, norm, other in zip(
            self.weights, reference.weights, self.norms, reference.norms, strict=True
        ):
            shared = sum(
                min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items() if ngram in theirs
            )
            if norm and other:
                total += shared / (norm * other)
        return total / LONGEST * math.exp(-((self.words - reference.words) ** 2) / (2 * SIGMA**2))


def _ngrams(caption: str) -> Counter[NGram]:
    words = caption.split()
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(words) - length + 1)
    )
