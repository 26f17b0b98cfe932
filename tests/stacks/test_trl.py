"""TRL: its fused head on a patched model, and its trainers."""

import copy
import importlib
import itertools

import pytest
import torch
import transformers
from model_parity import note_errors, settle
from models import VOCABULARY, batch_of, build, copy_in

import fasttune
from fasttune import ops

pytest.importorskip("trl")

from trl.trainer.utils import add_fused_lm_head, selective_log_softmax, selective_log_softmax_and_entropy

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def inputs_of(model):
    inputs = batch_of(model, padding="right")
    inputs["labels"][0, :6] = -100  # a prompt
    return inputs


def headed(model, **options):
    add_fused_lm_head(model, outputs=OUTPUTS, **options)
    return model


def run(model, inputs):
    found = model(**inputs, fused_lm_head=True)
    (found.loss + 0.1 * found.entropy.mean()).backward()
    values = {name: getattr(found, name).detach() for name in ("loss", *OUTPUTS)}
    return {name: value for name, value in values.items() if value.is_floating_point()} | {
        name: p.grad for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("first", ["patch", "head"])
def test_the_fused_head(first, temperature, monkeypatch):
    counts, stock = [], ops.linear_log_prob

    def counting(input, *args, **kwargs):
        counts.append(input.shape[0])
        return stock(input, *args, **kwargs)

    monkeypatch.setattr(ops, "linear_log_prob", counting)

    def draw(errors, seed):
        model = build("GPT2LMHeadModel", seed=seed)
        inputs = inputs_of(model)
        other = copy_in(model, torch.float32)
        other.set_attn_implementation("eager")
        twins = copy_in(model, torch.float64), copy.deepcopy(model), other
        exact, expected, again = (run(headed(twin, temperature=temperature), inputs) for twin in twins)
        if first == "patch":
            ours = headed(fasttune.patch(model), temperature=temperature)
        else:
            ours = fasttune.patch(headed(model, temperature=temperature))
        counts.clear()
        note_errors(errors, run(ours, inputs), (expected, again), exact)
        assert counts == [int((inputs["labels"][:, 1:] != -100).sum())]

    settle(draw)


def test_top_1_and_evaluation_are_stocks():
    stock = headed(build("GPT2LMHeadModel"))
    ours = headed(fasttune.patch(build("GPT2LMHeadModel")))
    inputs = inputs_of(stock)
    for training in (True, False):
        expected, found = (model.train(training)(**inputs, fused_lm_head=True) for model in (stock, ours))
        assert torch.equal(expected.is_top1, found.is_top1)
        assert not found.mean_logits.requires_grad
        with torch.no_grad():
            expected, found = (model(**inputs, fused_lm_head=True) for model in (stock, ours))
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


def test_what_it_does_not_know_runs_as_stock():
    stock, ours = build("GPT2LMHeadModel"), fasttune.patch(build("GPT2LMHeadModel"))
    for model in (stock, ours):
        add_fused_lm_head(model, outputs=("log_probs", "log_sum_sq_probs"))
    inputs = inputs_of(stock)
    expected, found = (model(**inputs, fused_lm_head=True) for model in (stock, ours))
    torch.testing.assert_close(found.log_sum_sq_probs, expected.log_sum_sq_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_not_patched_gets_trls_own_function():
    fasttune.patch(build("GPT2LMHeadModel"))(**inputs_of(build("GPT2LMHeadModel")))  # the name is bound by now
    plain = headed(build("GPT2LMHeadModel"))
    loss = plain(**inputs_of(plain), fused_lm_head=True).loss
    assert "ChunkedLogProb" in str(_nodes(loss.grad_fn))


def test_a_function_with_other_arguments_is_left_alone(monkeypatch):
    import trl.trainer.utils as module

    from fasttune.patching.promises.trl import FusedHead, recognise

    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels):
            return hidden

    monkeypatch.setattr(module, "_fasttune_unknown", False, raising=False)
    monkeypatch.setattr(module, "_ChunkedLogProbFunction", Other)
    recognise()
    assert module._ChunkedLogProbFunction is Other
    monkeypatch.setattr(module, "_fasttune_unknown", False)
    monkeypatch.setattr(module, "_ChunkedLogProbFunction", trl_kernel())
    recognise()
    assert isinstance(module._ChunkedLogProbFunction, FusedHead)
    assert module._ChunkedLogProbFunction.forward is trl_kernel().forward


def trl_kernel():
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction


def _nodes(node):
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


@pytest.mark.parametrize("which", ["log_probs", "and_entropy"])
def test_selective_log_probabilities(which):
    stock, ours = build("GPT2LMHeadModel"), fasttune.patch(build("GPT2LMHeadModel"))
    inputs = inputs_of(stock)
    labels = inputs.pop("labels")[:, 1:]

    def loss(model):
        logits = model(**inputs).logits[:, :-1]
        index = labels.clamp(min=0)
        if which == "log_probs":
            values = selective_log_softmax(logits, index)
        else:
            values, entropy = selective_log_softmax_and_entropy(logits, index, temperature=0.7)
            values = values + 0.1 * entropy
        return -(values * (labels != -100)).sum()

    found = []
    for model in (stock, ours):
        value = loss(model)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * a.abs().max().item())


CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(VOCABULARY - 2))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT)


ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]
CHOSEN = [" w11 w12 w13", " w14", " w15 w16 w17 w18 w19", " w20 w21"]
REJECTED = [" w31", " w34 w35 w36", " w37 w38", " w40 w41 w42 w43"]
MESSAGES = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for prompt, answer in zip(PROMPTS, CHOSEN, strict=True)
]
PAIRS = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
DATA = {
    "SFT": {"prompt": PROMPTS, "completion": CHOSEN},
    "DPO": PAIRS,
    "Reward": {"chosen": CHOSEN, "rejected": REJECTED},
    "KTO": {"prompt": PROMPTS, "completion": CHOSEN, "label": [True, False, True, False]},
    "ORPO": PAIRS,
    "CPO": PAIRS,
    "GKD": {"messages": MESSAGES},
    "GRPO": {"prompt": PROMPTS},
    "RLOO": {"prompt": PROMPTS},
}
# Without a reference model: where all rewards are the same its divergence is the only gradient, which is 0 in stock and
# a rounding error here, and Adam makes a step of the one and not of the other.
SAMPLED = {"num_generations": 2, "max_completion_length": 6, "beta": 0.0}


def trainer_of(kind):
    import trl

    module = trl if hasattr(trl, f"{kind}Trainer") else importlib.import_module(f"trl.experimental.{kind.lower()}")
    return getattr(module, f"{kind}Trainer"), getattr(module, f"{kind}Config")


def reward(completions, **_):
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


@pytest.mark.parametrize(
    ("kind", "when"),
    [
        *itertools.product(["SFT", "DPO", "Reward", "KTO"], ["before", "after"]),
        *itertools.product(["ORPO", "CPO", "GKD", "GRPO", "RLOO"], ["before"]),
    ],
)
def test_trainers_end_with_stocks_weights(kind, when, tmp_path):
    datasets = pytest.importorskip("datasets")
    head = "GPT2ForSequenceClassification" if kind == "Reward" else "GPT2LMHeadModel"
    build(head, **({"num_labels": 1} if kind == "Reward" else {})).save_pretrained(tmp_path / "model")

    def trained(patch):
        model = getattr(transformers, head).from_pretrained(tmp_path / "model")
        model.config.pad_token_id, model.config.eos_token_id = 0, 1
        if patch == "before":
            fasttune.patch(model)
        trainer_class, config_class = trainer_of(kind)
        options, others = {"max_length": 24}, {}
        if kind in ("DPO", "KTO", "GKD"):
            other = build(head, seed=1)
            other.config.pad_token_id = 0
            others["teacher_model" if kind == "GKD" else "ref_model"] = (
                other if patch is None else fasttune.patch(other)
            )
        if kind == "GKD":
            options |= {"max_new_tokens": 4, "lmbda": 0.0}
        if kind in ("GRPO", "RLOO"):
            options, others["reward_funcs"] = SAMPLED, [reward]
        trainer = trainer_class(
            model=model,
            args=config_class(output_dir=str(tmp_path / str(patch)), **ARGUMENTS, **options),
            train_dataset=datasets.Dataset.from_dict(DATA[kind]),
            processing_class=tokenizer(),
            **others,
        )
        if patch == "after":
            fasttune.patch(trainer.model)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return logged, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    (logged, expected), (our_log, found) = trained(None), trained(when)
    for a, b in zip(logged, our_log, strict=True):
        for key in set(a) - {"epoch", "step", "grad_norm", "learning_rate", "num_tokens", "step_time"}:
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-3, nan_ok=True), key
    for name, a in expected.items():
        torch.testing.assert_close(found[name], a, rtol=1e-3, atol=3e-4, msg=name)
