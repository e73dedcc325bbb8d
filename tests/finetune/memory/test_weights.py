import pytest
import torch
from plans_for_tests import KINDS, real_model, recipe_of, tiny_config
from transformers import GenerationConfig, Trainer
from trl import SFTConfig

from finetune.memory.optimizer import optimizer_states
from finetune.memory.weights import model_of_shapes, settle_embeddings, weight_bytes
from qwenvl import QwenVLConfig
from qwenvl.model.host_embedding import HostEmbedding
from qwenvl.model.nf4_weights import is_quantized


def storages(tensors) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def bytes_held(model: torch.nn.Module) -> int:
    """Of all storages that a model holds, found by another way than the plan's."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if is_quantized(module):
            for state in (module.weight.quant_state, module.weight.quant_state.state2):
                tensors += [value for value in vars(state).values() if torch.is_tensor(value)]
    return sum(storages(tensors).values())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_gradients_are_exact(kind):
    recipe = recipe_of(*KINDS[kind])
    planned = weight_bytes(model_of_shapes(recipe, tiny_config(), "cpu"))
    model = real_model(recipe)
    assert planned == weight_bytes(model)
    assert sum(planned.device.values()) + planned.host == pytest.approx(bytes_held(model), abs=0)
    assert planned.gradients == sum(one.nbytes for one in model.parameters() if one.requires_grad)
    assert planned.host == sum(one.weight.nbytes for one in model.modules() if isinstance(one, HostEmbedding))


OPTIMIZERS = [
    *("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit"),
    *("paged_lion_8bit", "rmsprop_bnb_8bit", "ademamix", "ademamix_8bit"),
]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizer_states_are_exact(optim, tmp_path):
    parameters = [torch.nn.Parameter(torch.ones(*shape)) for shape in [(300, 400), (70,), (64, 65), (4096,)]]
    arguments = SFTConfig(output_dir=str(tmp_path), optim=optim, bf16=False, use_cpu=True)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(parameters, **settings)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = storages(value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    planned = optimizer_states(optim, [torch.empty_like(one, device="meta") for one in parameters], "cpu")
    assert planned.device == sum(held.values())
    assert planned.host == 0


def test_paged_states_are_in_host_memory_where_there_is_a_gpu():
    """As bitsandbytes pages: large tensors' states, not the scales of their blocks."""
    large, small = torch.empty(1000, 1000, device="meta"), torch.empty(300, 300, device="meta")
    planned = optimizer_states("paged_adamw_8bit", [large, small], "cuda")
    assert planned.host == 2 * 1_000_000
    assert planned.device == 2 * 4 * 3907 + 2 * (90_000 + 4 * 352) + 2 * 1024
    assert optimizer_states("adamw_torch_fused", [large], "cuda").device == 8_000_004
    stepped_together = optimizer_states("adamw_torch", [large], "cuda")
    assert (stepped_together.device, stepped_together.host, stepped_together.working) == (8_000_000, 4, 4_000_000)


def test_full_size_in_4_bits():
    """Linears of the published language model: 6,476,005,376 values, 4.127 bits each; see performance.md's 3.34 GB."""
    recipe = recipe_of("model.dtype=bfloat16", "model.quantization=nf4", "model.quantize=[language,vision,head]")
    planned = weight_bytes(model_of_shapes(recipe, QwenVLConfig(), "cuda"))
    values = 32 * (4096 * 12288 + 4096 * 4096 + 3 * 4096 * 11008)
    codes, magnitudes = values // 2, values // 64
    tables = 32 * 5 * (4 * 16 + 4 + 4 * 256)
    plain = 2 * (32 * (2 * 4096 + 12288) + 4096)  # norms and biases, in bfloat16
    assert planned.device["language"] == codes + magnitudes + 4 * magnitudes // 256 + tables + plain
    assert planned.device["adapter"] == 4 * 112_197_632
    assert planned.device["embeddings"] == 2 * 151936 * 4096
    assert planned.gradients == planned.device["adapter"]


@pytest.mark.parametrize(("chat_format", "trained"), [("raw", True), ("chatml", False), (None, False)])
def test_auto_is_settled_by_the_checkpoint(chat_format, trained):
    recipe = recipe_of("adapter.train_embeddings=auto")
    settings = GenerationConfig(**({"chat_format": chat_format} if chat_format else {}))
    assert settle_embeddings(recipe, settings).adapter.train_embeddings is trained
    assert settle_embeddings(recipe_of("adapter.train_embeddings=true"), settings).adapter.train_embeddings is True
    assert settle_embeddings(recipe_of("adapter=null", "freeze.language=false"), settings).adapter is None
