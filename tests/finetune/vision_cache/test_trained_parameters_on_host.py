"""Trained parameters in host memory while images are encoded."""

import pytest
import torch

from finetune.vision_cache.phase import trained_parameters_on_host
from tests.finetune.model.test_qlora import adapted


def test_nothing_is_lost():
    """Also where what happens meanwhile fails: the same parameters, with the same values."""
    model = adapted(quantized=False)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match="meanwhile"), trained_parameters_on_host(model):
        assert {name for name, _ in model.named_parameters()} == before.keys()
        raise RuntimeError("meanwhile")
    for name, parameter in model.named_parameters():
        same, value = before[name]
        assert parameter is same and parameter.requires_grad == ("lora" in name)
        assert torch.equal(parameter, value)


@pytest.mark.gpu
def test_they_leave_the_gpu_and_come_back():
    model = adapted(quantized=False).cuda()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.clone().cpu() for parameter in trained]
    held = torch.cuda.memory_allocated()
    with trained_parameters_on_host(model):
        assert {parameter.device.type for parameter in trained} == {"cpu"}
        assert {parameter.device.type for parameter in model.parameters() if not parameter.requires_grad} == {"cuda"}
        assert torch.cuda.memory_allocated() <= held - sum(parameter.nbytes for parameter in trained)
    assert all(parameter.is_cuda for parameter in trained) and torch.cuda.memory_allocated() == held
    assert all(torch.equal(parameter.cpu(), value) for parameter, value in zip(trained, values, strict=True))
