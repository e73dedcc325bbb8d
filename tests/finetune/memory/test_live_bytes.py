import gc

import pytest
import torch

from finetune.memory.live_bytes import META, OWN, LiveBytes

DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


@DEVICES
def test_a_storage_counts_once_and_while_it_lives(device):
    given = torch.zeros(100, device=device)
    with LiveBytes() as counted:
        made = given + 1
        views = [made.view(10, 10), made[:50], made.detach(), made.expand(3, 100)]
        assert counted.live == {"": 400}
        made.add_(1)
        other = made.double()
        assert counted.live == {"": 1200}
        del made
        assert counted.live == {"": 1200}  # the views hold it
        views.clear()
        assert counted.live == {"": 800}
        del other
    assert counted.live == {"": 0}
    assert counted.fullest[""].total == 1200


@DEVICES
def test_what_was_there_before_is_not_counted(device):
    given = torch.zeros(100, device=device)
    with LiveBytes() as counted:
        view = given[:10]
        given.mul_(2)
        view.zero_()
    assert not counted.fullest


@DEVICES
def test_what_backward_needs_is_held_until_it_ran(device):
    weight = torch.ones(100, device=device, requires_grad=True)
    with LiveBytes() as counted:
        counted.stage = "forward"
        loss = (weight * 2).exp().sum()
        # exp keeps its result; the product and its intermediate go.
        assert counted.live["forward"] == 400 + loss.nbytes
        counted.stage = "backward"
        torch.autograd.backward([loss])
        del loss
        gc.collect()
        assert counted.live == {"forward": 0, "backward": 400}  # the gradient
    assert counted.fullest["backward"].held["forward"] >= 400


@DEVICES
def test_what_operations_take_for_themselves_counts_at_the_peak_only(device):
    given = torch.zeros(100, device=device)
    takes = lambda operation, arguments: 1000 if operation is torch.ops.aten.exp.default else 0  # noqa: E731
    with LiveBytes(takes) as counted:
        made = given + 1
        made.exp()
    assert counted.fullest[""].total == 1400
    assert counted.fullest[""].held[OWN] == 1000
    assert counted.live == {"": 400}


def test_a_tensor_can_be_left_out():
    with LiveBytes() as counted:
        made = torch.ones(100)
        counted.leave_out(made)
        counted.leave_out(made)
        assert counted.live == {"": 0}
        del made
    assert counted.live == {"": 0}


def test_integers_are_real_where_all_else_is_shapes():
    weight = torch.zeros(10, 4, device=META)
    with LiveBytes():
        ids = torch.arange(3, device=META)
        assert ids.tolist() == [0, 1, 2]
        moved = torch.tensor([5, 7]).to(META)
        assert moved.tolist() == [5, 7]
        mask = torch.zeros(3, dtype=torch.bool, device=META)
        assert not mask.any()
        rows = torch.nn.functional.embedding(ids, weight)
        assert rows.is_meta
        assert rows.shape == (3, 4)
        # Real numbers beside shapes give shapes, and what is to leave the device stays.
        assert (rows * torch.ones(3, 4)).is_meta
        assert rows.to("cpu").is_meta
        assert torch.zeros(3, device=META).is_meta


def test_what_was_made_before_is_made_again():
    """Results of an operation are remembered by shapes: by strides, types and the kinds of numbers too."""
    x = torch.zeros(4, 6, device=META)
    whole = torch.zeros(4, 6, device=META, dtype=torch.bfloat16)
    with LiveBytes() as counted:
        for _ in range(3):
            assert (x + x.T.contiguous().T).stride() == (x + x).stride()
            assert (x.T + x.T).stride() == (1, 6)
            assert (whole + 1).dtype == torch.bfloat16
            assert (whole + x).dtype == torch.float32
            values, places = x.max(dim=1)
            assert (values.dtype, places.dtype) == (torch.float32, torch.int64)
            held = [x + 1, x + 1]
            assert held[0].untyped_storage()._cdata != held[1].untyped_storage()._cdata
            del held, values, places
    assert counted.live == {"": 0}
