"""Tiny models of every supported class, and batches for them."""

import copy
import inspect

import torch
import transformers
from transformers import (
    AlbertConfig,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    EsmConfig,
    GPT2Config,
    ModernBertConfig,
    ModernBertDecoderConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

VOCABULARY = 101  # no multiple of 8
PAD = 1

_BERT_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # head dim 16
    "intermediate_size": 96,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "pad_token_id": PAD,
    "num_labels": 3,
}


def _modernbert(p):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 48,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "local_attention": 8,  # 4 to each side, in the second layer and the third; of a decoder 3 to the left
        "pad_token_id": PAD,
        "num_labels": 3,
        "embedding_dropout": p,
        "attention_dropout": p,
        "mlp_dropout": p,
        "classifier_dropout": p,
    }


_CONFIGS = {
    "Bert": lambda p: BertConfig(**_BERT_LIKE, hidden_dropout_prob=p, attention_probs_dropout_prob=p),
    "Roberta": lambda p: RobertaConfig(**_BERT_LIKE, hidden_dropout_prob=p, attention_probs_dropout_prob=p),
    "XLMRoberta": lambda p: XLMRobertaConfig(**_BERT_LIKE, hidden_dropout_prob=p, attention_probs_dropout_prob=p),
    "Camembert": lambda p: CamembertConfig(**_BERT_LIKE, hidden_dropout_prob=p, attention_probs_dropout_prob=p),
    "Electra": lambda p: ElectraConfig(
        **_BERT_LIKE, embedding_size=32, hidden_dropout_prob=p, attention_probs_dropout_prob=p, summary_last_dropout=p
    ),
    # Two groups of one layer, of which the first is run twice.
    "Albert": lambda p: AlbertConfig(
        **(_BERT_LIKE | {"num_hidden_layers": 3}),
        embedding_size=32,
        num_hidden_groups=2,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        classifier_dropout_prob=p,
    ),
    "ModernBertDecoder": lambda p: ModernBertDecoderConfig(**_modernbert(p)),
    "ModernBert": lambda p: ModernBertConfig(**_modernbert(p)),
    "Esm": lambda p: EsmConfig(
        **_BERT_LIKE,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
        layer_norm_eps=1e-5,  # as in ESM-2; at 1e-12 stock's gradients at padding are NaN in float16
        mask_token_id=5,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        classifier_dropout=p,
    ),
    "DistilBert": lambda p: DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=96,
        max_position_embeddings=48,
        pad_token_id=PAD,
        num_labels=3,
        dropout=p,
        attention_dropout=p,
        qa_dropout=p,
        seq_classif_dropout=p,
    ),
    "MPNet": lambda p: MPNetConfig(
        **_BERT_LIKE,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
    ),
    # As v3 is.
    "DebertaV2": lambda p: DebertaV2Config(
        **(_BERT_LIKE | {"type_vocab_size": 0}),
        relative_attention=True,
        position_buckets=4,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        pooler_dropout=p,
    ),
    "GPT2": lambda p: GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=48,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        summary_first_dropout=p,
        classifier_dropout=p,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=3,
        num_labels=3,
    ),
}

GPT2_HEADS = [
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
]
BERT_HEADS = [
    "BertModel",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertLMHeadModel",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]
RELATIVES = [
    *(
        f"{family}{head}"
        for family in ("Roberta", "XLMRoberta", "Camembert")
        for head in (
            "Model",
            "ForMaskedLM",
            "ForCausalLM",
            "ForSequenceClassification",
            "ForMultipleChoice",
            "ForTokenClassification",
            "ForQuestionAnswering",
        )
    ),
    "ElectraModel",
    "ElectraForMaskedLM",
    "ElectraForPreTraining",
    "ElectraForCausalLM",
    "ElectraForSequenceClassification",
    "ElectraForMultipleChoice",
    "ElectraForTokenClassification",
    "ElectraForQuestionAnswering",
]
# Encoders whose layers are not BERT's under another name.
ENCODERS = [
    "AlbertModel",
    "AlbertForMaskedLM",
    "AlbertForPreTraining",
    "AlbertForSequenceClassification",
    "AlbertForMultipleChoice",
    "AlbertForTokenClassification",
    "AlbertForQuestionAnswering",
    "DistilBertModel",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForMultipleChoice",
    "DistilBertForTokenClassification",
    "DistilBertForQuestionAnswering",
]
ENCODERS += [
    f"MPNet{head}"
    for head in (
        "Model",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForMultipleChoice",
        "ForTokenClassification",
        "ForQuestionAnswering",
    )
]
ENCODERS += [
    f"DebertaV2{head}"
    for head in (
        "Model",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForMultipleChoice",
        "ForTokenClassification",
        "ForQuestionAnswering",
    )
]
ENCODERS += [
    f"ModernBert{head}"
    for head in (
        "Model",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForMultipleChoice",
        "ForTokenClassification",
        "ForQuestionAnswering",
    )
]
ENCODERS += ["EsmModel", "EsmForMaskedLM", "EsmForSequenceClassification", "EsmForTokenClassification"]
ENCODERS += [f"ModernBertDecoder{head}" for head in ("Model", "ForCausalLM", "ForSequenceClassification")]
HEADS = [*GPT2_HEADS, *BERT_HEADS, *RELATIVES, *ENCODERS]


def family_of(head):
    return next(name for name in _CONFIGS if head.startswith(name))


def config_of(head, dropout=0.0, **changes):
    config = _CONFIGS[family_of(head)](dropout)
    if ("ForCausalLM" in head and "Decoder" not in head) or head == "BertLMHeadModel":
        config.is_decoder = True
    if "QuestionAnswering" in head or head == "AlbertForPreTraining":
        config.num_labels = 2
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def build(head, dropout=0.0, seed=0, **changes):
    """A model in training mode whose parameters are all away from their special values (0 and 1)."""
    return drawn(lambda: getattr(transformers, head)(config_of(head, dropout, **changes)), seed)


def drawn(make, seed=0):
    """The same of any model; make: makes it."""
    torch.manual_seed(seed)
    model = make().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batch_of(model, batch=3, length=13, padding=None, seed=1):
    """Inputs with labels. padding: None, "right" or "left": sequences of different lengths, or "scattered": holes
    anywhere but in the first token; labels at padding are -100."""
    g = torch.Generator().manual_seed(seed)
    head = type(model).__name__

    def integers(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=g)

    ids = integers(VOCABULARY, batch, length, low=4)
    inputs = {"input_ids": ids}
    mask = torch.ones_like(ids)
    if padding == "scattered":
        mask = (torch.rand(batch, length, generator=g) < 0.6).long()
        mask[:, 0] = 1
    elif padding:
        for row in range(1, batch):
            cut = 1 + (row * 5) % (length - 1)
            if padding == "right":
                mask[row, cut:] = 0
            else:
                mask[row, : length - cut] = 0
    if padding:
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        ids[mask == 0] = PAD if pad is None else pad
        inputs["attention_mask"] = mask
    names = inspect.signature(type(model).forward).parameters
    if head.endswith(("LM", "LMHeadModel", "ForPreTraining", "DoubleHeadsModel")):
        labels = ids.masked_fill(mask == 0, -100)
        if "Masked" in head or head in ("AlbertForPreTraining", "BertForPreTraining"):
            labels = labels.masked_fill(torch.rand(ids.shape, generator=g) < 0.5, -100)
            labels[0, 0] = 7
        if head == "ElectraForPreTraining":
            labels = integers(2, batch, length)
        inputs["labels"] = labels
        for name in ("next_sentence_label", "sentence_order_label"):
            if name in names:
                inputs[name] = integers(2, batch)
    elif "TokenClassification" in head:
        inputs["labels"] = integers(3, batch, length).masked_fill(mask == 0, -100)
    elif "SequenceClassification" in head:
        inputs["labels"] = integers(3, batch)
    elif "NextSentence" in head:
        inputs["labels"] = integers(2, batch)
    elif "QuestionAnswering" in head:
        inputs["start_positions"], inputs["end_positions"] = integers(length, batch), integers(length, batch)
    if "MultipleChoice" in head or "DoubleHeads" in head:  # two choices
        for name in ("input_ids", "attention_mask", "labels"):
            if name in inputs and inputs[name].dim() == 2:
                inputs[name] = inputs[name][:, None].repeat(1, 2, 1)
        if "MultipleChoice" in head:
            inputs["input_ids"][:, 1] = integers(VOCABULARY, batch, length, low=4)
            inputs["labels"] = integers(2, batch)
        else:
            inputs["mc_token_ids"] = (mask * torch.arange(length)).argmax(-1)[:, None].repeat(1, 2)
            inputs["mc_labels"] = integers(2, batch)
    if "token_type_ids" in names and not head.startswith(("Roberta", "XLM", "Camembert")):
        inputs["token_type_ids"] = integers(2, *inputs["input_ids"].shape)
    return inputs


def loss_of(model, inputs):
    """The model's loss; for models without one, a fixed function of the hidden states at real tokens."""
    outputs = model(**inputs)
    if getattr(outputs, "mc_loss", None) is not None:
        return outputs.loss + outputs.mc_loss
    if getattr(outputs, "loss", None) is not None:
        return outputs.loss
    hidden = outputs.last_hidden_state
    weights = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape).to(hidden.dtype)
    mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2]))
    loss = (hidden * weights * mask.unsqueeze(-1).to(hidden.dtype)).sum()
    if getattr(outputs, "pooler_output", None) is not None:
        loss = loss + outputs.pooler_output.sum()
    return loss


def gradients(model, inputs):
    """(loss, {name: gradient}) and leaves the model without gradients."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, inputs)
    loss.backward()
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def copy_in(model, dtype):
    return copy.deepcopy(model).to(dtype)
