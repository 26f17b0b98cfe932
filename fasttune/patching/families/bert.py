"""BERT."""

from transformers.models.bert import modeling_bert as stock

from fasttune.patching.families import _bert_like as shared
from fasttune.patching.layers.mlp import why_no_gelu


class BertEmbeddings(shared.SumNormDropout, stock.BertEmbeddings): ...


class BertLayer(shared.PromisedLayer, stock.BertLayer): ...


class BertSelfAttention(shared.SelfAttention, stock.BertSelfAttention): ...


class BertCrossAttention(shared.CrossAttention, stock.BertCrossAttention): ...


class BertSelfOutput(shared.DenseDropoutAddNorm, stock.BertSelfOutput): ...


class BertOutput(shared.DenseDropoutAddNorm, stock.BertOutput): ...


class BertIntermediate(shared.DenseActivation, stock.BertIntermediate): ...


class BertPredictionHeadTransform(shared.DenseGeluNorm, stock.BertPredictionHeadTransform): ...


FAMILY = shared.bert_like(
    "bert",
    stock,
    globals(),
    prefix="Bert",
    vocabulary="decoder",
    transform="BertPredictionHeadTransform",
    transform_unsuited=why_no_gelu("transform_act_fn"),
    pooled=("BertModel", "BertForNextSentencePrediction", "BertForSequenceClassification", "BertForMultipleChoice"),
    of_every_token=(
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertLMHeadModel",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
    ),
)
