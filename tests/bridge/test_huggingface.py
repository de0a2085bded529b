"""Hugging Face models of small random configurations, against torch; needs transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

import dpkernels
import oracles
from dpbridge import DPOptimizer
from dpbridge.lowering import lower
from lowering_checks import assert_model_matches, run_program, to_jax

transformers = pytest.importorskip("transformers")

BATCH, TIME, VOCABULARY, CLASSES = 3, 6, 19, 3
PAD = 1
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "num_labels": CLASSES}
ENCODER = {
    **SMALL,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}
# Two query heads share the keys and values of one.
DECODER = {**ENCODER, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 2}
GPT2 = {
    **SMALL,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "n_positions": 8,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
DISTILBERT = {
    **SMALL,
    "n_layers": 2,
    "n_heads": 2,
    "dim": 8,
    "hidden_dim": 16,
    "max_position_embeddings": 12,
}
T5 = {
    **SMALL,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "relative_attention_num_buckets": 8,
}
VIT = {
    "num_labels": CLASSES,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
MAE = {
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_hidden_size": 8,
    "decoder_intermediate_size": 16,
}

RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")
GPT2_RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
DISTILBERT_RATES = ("dropout", "attention_dropout", "seq_classif_dropout")

# The model's class, its configuration's, what is in that, and the names of its dropout rates.
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, GPT2_RATES),
    "gpt2 classifier": ("GPT2ForSequenceClassification", "GPT2Config", GPT2, GPT2_RATES),
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER, RATES),
    "bert, masked tokens": ("BertForMaskedLM", "BertConfig", ENCODER, RATES),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER, RATES),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT, DISTILBERT_RATES,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, ()),
    "llama classifier": ("LlamaForSequenceClassification", "LlamaConfig", DECODER, ()),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, ()),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, RATES),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, ("dropout_rate",)),
}  # fmt: skip
CLASSIFIERS = ("gpt2 classifier", "bert", "roberta", "distilbert", "llama classifier")
WITH_DROPOUT = [name for name, (*_, rates) in FAMILIES.items() if rates]
QUICK = (("gpt2", "sdpa", "none"), ("gpt2", "sdpa", "left"), ("bert", "eager", "right"))
PADDINGS = ("none", "right", "left")


def make_model(name, attention="sdpa", *, dropout=False):
    """Returns a model in training mode whose weights are far from their initial ones.

    With those, BERT's loss without its mask is within 1e-4 of that with it.
    """
    model_class, config_class, config, rates = FAMILIES[name]
    rates = dict.fromkeys(rates, 0.1 if dropout else 0.0)
    options = {**config, **rates, "attn_implementation": attention}
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    return spread(model).train()


def spread(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tokens():
    return torch.randint(PAD + 1, VOCABULARY, (BATCH, TIME))


def make_mask(padding):
    """The last example has no padding, the first two have some."""
    mask = torch.ones(BATCH, TIME, dtype=torch.long)
    mask[0, 4:] = 0
    mask[1, 3:] = 0
    return mask.flip(1) if padding == "left" else mask


def make_batch(name, padding="right"):
    """Returns keywords of the model, the labels among them."""
    classes = torch.randint(CLASSES, (BATCH,))
    if name == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8), "labels": classes}
    ids, target = tokens(), tokens()
    batch = {"input_ids": ids, "labels": classes if name in CLASSIFIERS else target}
    if padding != "none":
        batch["attention_mask"] = mask = make_mask(padding)
        ids[mask == 0] = PAD
        if name not in CLASSIFIERS:
            target[mask == 0] = -100
    return batch


def cases():
    for name in FAMILIES:
        for attention in ("eager", "sdpa"):
            for padding in PADDINGS if name != "vit" else ("none",):
                case = (name, attention, padding)
                yield pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("name", "attention", "padding"), list(cases()))
def test_family_equals_torch(name, attention, padding):
    assert_model_matches(make_model(name, attention), None, (), make_batch(name, padding))


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2 classifier", "vit"))]
)
def test_family_with_a_loss_of_its_output_equals_torch(name):
    batch = make_batch(name)
    target, inputs = (
        batch.pop("labels"),
        batch.pop("pixel_values" if name == "vit" else "input_ids"),
    )

    def loss_fn(output, labels):
        return functional.cross_entropy(output.logits, labels, label_smoothing=0.1)

    assert_model_matches(make_model(name), loss_fn, (inputs, target), batch)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sequences_packed_into_one_row_equal_torch(attention):
    # Where the position falls back, another sequence begins that must not see those before it.
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    batch = {**make_batch("llama", "none"), "position_ids": positions}
    assert_model_matches(make_model("llama", attention), None, (), batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "vit", "t5"])
def test_checkpointed_activations_leave_the_gradients_alone(name):
    model = make_model(name)
    model.activation_checkpointing_enable()
    assert_model_matches(model, None, (), make_batch(name))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_draws_other_masks_for_equal_examples(name, attention):
    batch = {key: leaf[-1:].expand_as(leaf).clone() for key, leaf in make_batch(name).items()}
    model = make_model(name, attention, dropout=True)
    losses, _, _ = run_program(model, None, (), batch, randomness=True)
    assert len(set(losses.tolist())) == BATCH


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_without_randomness_is_that_of_torch_in_evaluation(name):
    model, batch = make_model(name, dropout=True), make_batch(name)
    losses, gradients, _ = run_program(model, None, (), batch, randomness=False)
    expected_losses, expected = oracles.torch_per_example_gradients(model.eval(), None, (), batch)
    torch.testing.assert_close(torch.tensor(losses), expected_losses)
    oracles.assert_close(gradients, {n: g.numpy() for n, g in expected.items()}, rtol=1e-4)


def test_the_example_whose_label_is_out_of_range_is_found():
    batch = make_batch("bert")
    batch["labels"][1] = CLASSES
    _, _, held = run_program(make_model("bert"), None, (), batch)
    assert held.all(axis=1).tolist() == [True, False, True]


@pytest.mark.slow
def test_paths_dropped_at_random_differ_between_equal_examples():
    config = transformers.ConvNextConfig(
        hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2, image_size=8,
        drop_path_rate=0.5,
    )  # fmt: skip
    model = spread(transformers.ConvNextForImageClassification(config)).train()
    batch = {key: leaf[-1:].expand_as(leaf).clone() for key, leaf in make_batch("vit").items()}
    losses = [
        run_program(model, None, (), batch, randomness=True, seed=seed)[0] for seed in range(4)
    ]
    # Each path is kept or not: of 12 examples, all would be alike with a probability of 2**-11.
    assert len(set(np.concatenate(losses).tolist())) > 1
    assert_model_matches(model, None, (), make_batch("vit"))


@pytest.mark.slow
def test_patches_masked_at_random_equal_torch_where_draws_are_fixed():
    model = spread(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**VIT, **MAE)))
    assert_model_matches(model.train(), None, (), {"pixel_values": torch.randn(BATCH, 3, 8, 8)})


MIXTRAL = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}


def mixtral(experts):
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL))
    model.set_experts_implementation(experts)
    return spread(model).train()


@pytest.mark.slow
def test_experts_in_batched_products_equal_torch():
    assert_model_matches(mixtral("batched_mm"), None, (), make_batch("llama"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts", "text"), [("eager", "must not branch on values"), ("grouped_mm", r"aten\.histc")]
)
def test_experts_in_other_products_are_refused_by_name(experts, text):
    with pytest.raises(NotImplementedError, match=text):
        run_program(mixtral(experts), None, (), make_batch("llama"))


def test_batch_norm_is_refused_by_name():
    config = transformers.ResNetConfig(hidden_sizes=[4, 8], depths=[1, 1], embedding_size=4)
    model = transformers.ResNetForImageClassification(config)
    with pytest.raises(NotImplementedError, match=r"BatchNorm2d at `resnet\.embedder"):
        make_optimizer(model)


def make_optimizer(model, **options):
    trainable = [p for p in model.parameters() if p.requires_grad]
    defaults = {"l2_clip_norm": 0.5, "noise_multiplier": 0.0, "expected_batch_size": BATCH}
    base = torch.optim.SGD(trainable, lr=0.1)
    return DPOptimizer(base, model, seed=0, **{**defaults, **options})


def clipped_mean(model, batch, l2_clip_norm=0.5):
    """Clips and adds up torch's gradients of each example."""
    _, gradients = oracles.torch_per_example_gradients(model, None, (), batch)
    each = [{name: g[i].numpy() for name, g in gradients.items()} for i in range(BATCH)]
    return oracles.clipped_sum(each, l2_clip_norm, normalize_by=BATCH)


def released(model):
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_step_takes_the_clipped_mean_of_torchs_gradients(name):
    model, batch = make_model(name), make_batch(name)
    expected = clipped_mean(model, batch)
    optimizer = make_optimizer(model)
    optimizer.backward(**batch)
    optimizer.step()
    oracles.assert_close(released(model), expected, rtol=1e-4)


@pytest.mark.slow
def test_a_model_that_writes_into_its_configuration_is_lowered_once(monkeypatch):
    lowered = []

    def counted(*args):
        lowered.append(args)
        return lower(*args)

    monkeypatch.setattr("dpbridge.example_loss.lower", counted)
    model, batch = make_model("bert"), make_batch("bert")
    assert model.config.problem_type is None
    optimizer = make_optimizer(model)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(**batch)
        optimizer.step()
    assert model.config.problem_type == "single_label_classification"
    assert len(lowered) == 1


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


# peft 0.21 asks what transformers 5.23 calls by another name.
calls_by_old_names = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

ADAPTED = {
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "vit": ["q_proj", "v_proj"],
    "t5": ["q", "v", "wo"],
}


def adapt(peft, name, *, lora_dropout=0.0, **options):
    """Adapters are away from their initial values, where half of the gradients are zero."""
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=lora_dropout,
        target_modules=ADAPTED[name],
        fan_in_fan_out=name == "gpt2",
        **options,
    )
    return spread(peft.get_peft_model(make_model(name), config)).train()


def adapters(model):
    return {name for name, _ in model.named_parameters() if "lora_" in name}


@calls_by_old_names
@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_gradients_equal_torchs(peft, name):
    model = adapt(peft, name)
    _, gradients, _ = run_program(model, None, (), make_batch(name))
    assert gradients.keys() == adapters(model)
    assert_model_matches(model, None, (), make_batch(name))


@calls_by_old_names
@pytest.mark.slow
def test_adapters_that_scale_directions_equal_torchs(peft):
    assert_model_matches(adapt(peft, "llama", use_dora=True), None, (), make_batch("llama"))


@calls_by_old_names
@pytest.mark.slow
def test_adapters_with_a_trained_head_equal_torchs(peft):
    model = adapt(peft, "bert", task_type="SEQ_CLS")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained - adapters(model))
    assert_model_matches(model, None, (), make_batch("bert"))


@calls_by_old_names
@pytest.mark.slow
def test_dropout_of_adapters_draws_other_masks_for_equal_examples(peft):
    batch = {key: leaf[-1:].expand_as(leaf).clone() for key, leaf in make_batch("llama").items()}
    model = adapt(peft, "llama", lora_dropout=0.5)
    losses, _, _ = run_program(model, None, (), batch, randomness=True)
    assert len(set(losses.tolist())) == BATCH


@calls_by_old_names
def test_only_adapters_train(peft):
    model, batch = adapt(peft, "gpt2"), make_batch("gpt2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = clipped_mean(model, batch)
    optimizer = make_optimizer(model)
    optimizer.backward(**batch)
    optimizer.step()
    oracles.assert_close(released(model), expected, rtol=1e-4)
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert moved == released(model).keys() == adapters(model)


def explained(model, batch):
    """Says what norms and clipped sum of each trainable parameter cost."""
    program = lower(model, None, (), {key: leaf[:1] for key, leaf in batch.items()})
    with jax.enable_x64(True):
        arrays = {name: to_jax(p) for name, p in model.named_parameters()}
        constants = {name: to_jax(tensor) for name, tensor in program.constants.items()}
        trainable = {n: arrays.pop(n) for n, p in model.named_parameters() if p.requires_grad}

        def loss(parameters, rows):
            named = {**arrays, **constants, **parameters}
            return program(named, jax.random.key(0), jnp.array(False), *rows)[0][0]

        rows = tuple(map(to_jax, jax.tree.leaves(batch)))
        return dpkernels.clipped_grad(loss, l2_clip_norm=1.0).explain(trainable, rows)


@calls_by_old_names
def test_only_adapters_cost(peft):
    model, batch = adapt(peft, "gpt2"), make_batch("gpt2")
    alone = explained(model, batch)
    everything = explained(model.requires_grad_(True), batch)
    named = {name for row in alone.rows for name in row.parameters}
    assert named == {f"['{name}']" for name in adapters(model)}
    assert sum(row.flops for row in alone.rows) < 0.1 * sum(row.flops for row in everything.rows)
