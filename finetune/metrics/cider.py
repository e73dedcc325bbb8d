"""CIDEr-D: agreement of a caption with the captions that people wrote (Flickr30k, NoCaps, COCO).

Source: Vedantam, Zitnick, Parikh 2015, "CIDEr: Consensus-based Image Description Evaluation", section 6 for the -D.
Details that the paper leaves open follow the COCO caption evaluation, whose scores papers report.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

LONGEST = 4
"""Words of the longest n-grams."""
SIGMA = 6.0
"""Standard deviation of the Gaussian length penalty, in words."""
SCALE = 10.0

NGram = tuple[str, ...]


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Compute the mean score over the images, and the score of each image.

    For each n from 1 to 4 a caption is a TF-IDF vector of its n-grams: the count times log(images / images in whose
    references the n-gram occurs). A prediction's score is the cosine similarity with a reference, with the counts
    clipped to the reference's, times exp(-(difference in length)^2 / (2 sigma^2)); averaged over n and over the
    references, times 10.

    The document frequencies are those of these references: scores are comparable only on the same set of images, and a
    single image scores 0, as every n-gram has an IDF of 0.

    Args:
        predictions: (images,) captions as tokens separated by spaces; see `ptb_tokens`.
        references: (images,) lists of at least one such caption.

    Returns:
        The mean, and (images,) scores, each in [0, 10].

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
    images_with = Counter(ngram for ngrams in counted for ngram in set().union(*ngrams))
    log_images = math.log(len(references))

    def idf(ngram: NGram) -> float:
        return log_images - math.log(max(images_with[ngram], 1))

    scores = []
    for prediction, ngrams in zip(predictions, counted, strict=True):
        vector = _Vector(_ngrams(prediction), idf)
        similarities = [vector.similarity(_Vector(counts, idf)) for counts in ngrams]
        scores.append(SCALE * sum(similarities) / len(similarities))
    return sum(scores) / len(scores), scores


class _Vector:
    """A caption's TF-IDF vectors.

    Attributes:
        weights: for each n from 1 on, n-gram -> weight.
        norms: for each n, the Euclidean norm of that vector.
        words: the caption's length, which the COCO evaluation takes to be its number of bigrams.
    """

    def __init__(self, counts: Counter[NGram], idf: Callable[[NGram], float]):
        self.weights: list[dict[NGram, float]] = [{} for _ in range(LONGEST)]
        self.words = 0
        for ngram, count in counts.items():
            self.weights[len(ngram) - 1][ngram] = count * idf(ngram)
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
