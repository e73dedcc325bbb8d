"""The nano's Muon: PyTorch's, in the numbers that the CPU has, and the same however many processes share it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from examples.nano.making.muon import Muon, orthogonal

SHAPES = ((6, 4), (4, 9), (5, 5))
STEPS = 3


def matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def trained(make) -> list[torch.Tensor]:
    """The matrices after some steps on gradients that are the same everywhere."""
    parameters = matrices()
    optimizer = make(parameters)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def ours(parameters) -> Muon:
    return Muon(parameters, lr=0.1, weight_decay=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_direction_is_nearly_orthogonal(shape):
    singular = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert singular.min() > 0.5 and singular.max() < 1.3


def test_small_singular_values_do_not_grow_beyond_bounds():
    """Rounded, W W' has eigenvalues below zero."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (48, 200))
    matrix = rows @ torch.diag(torch.logspace(0, -9, 48)) @ columns[:48]
    assert torch.linalg.svdvals(orthogonal(matrix)).max() < 1.3


def test_it_steps_as_pytorchs_does():
    """Theirs is in bfloat16, 8 bits, on whatever CPU."""

    def theirs(parameters):
        return torch.optim.Muon(parameters, lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")

    for own, other, before in zip(trained(ours), trained(theirs), matrices(), strict=True):
        moved = (other - before).abs().max()
        assert moved > 0.05
        assert (own - other).abs().max() < 0.03 * moved


def _train_in_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(trained(ours), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_that_share_the_work_make_the_same_steps(tmp_path):
    multiprocessing.spawn(_train_in_process, (str(tmp_path),), nprocs=2)
    alone = trained(ours)
    for rank in range(2):
        for own, other in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            assert torch.equal(own, other)
