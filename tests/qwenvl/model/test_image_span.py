import pytest
import torch

from qwenvl import InputError, QwenVLConfig
from qwenvl.model.image_span import image_span_starts, place_image_features


@pytest.fixture
def config(tiny_folder):
    return QwenVLConfig.from_pretrained(tiny_folder)


def span(config, pads=256):
    return [config.image_start_id] + [config.image_token_id] * pads + [config.image_end_id]


def ids_of(*rows):
    longest = max(map(len, rows))
    return torch.tensor([row + [1] * (longest - len(row)) for row in rows])


def test_only_whole_spans_count(config):
    stray = [config.image_start_id, 5, config.image_token_id, config.image_end_id]
    rows = [
        stray + span(config) + stray,
        span(config, 255) + span(config, 257) + [9],
        span(config)[:-1] + [9] + span(config)[1:],
        span(config) + span(config),
    ]
    starts = image_span_starts(ids_of(*rows), config)
    assert [row.nonzero()[:, 0].tolist() for row in starts] == [[4], [], [], [0, 258]]


def test_short_rows_have_none(config):
    assert not image_span_starts(torch.full((2, 257), config.image_token_id), config).any()


def test_features_stand_strictly_between_the_tags(config):
    ids = ids_of([7, *span(config), 8, *span(config)], [config.image_token_id, 3, *span(config)])
    embeddings = torch.zeros(*ids.shape, 4)
    features = torch.arange(1, 3 * 256 + 1).float()[:, None].expand(-1, 4).reshape(3, 256, 4)
    placed = place_image_features(embeddings, ids, features, config)
    expected = torch.zeros(ids.shape)
    expected[0, 2:258], expected[0, 261:517] = features[0, :, 0], features[1, :, 0]
    expected[1, 3:259] = features[2, :, 0]
    assert (placed == expected[..., None]).all()
    assert (embeddings == 0).all(), "placed out of place"


@pytest.mark.parametrize("images", [0, 1, 3])
def test_images_and_spans_must_be_as_many(config, images):
    ids = ids_of(span(config) + span(config))
    features = torch.zeros(images, 256, 4) if images else None
    with pytest.raises(InputError, match=rf"2 whole image span.*{images} image"):
        place_image_features(torch.zeros(*ids.shape, 4), ids, features, config)
