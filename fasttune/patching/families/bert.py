"""BERT."""

from transformers.models.bert import modeling_bert as stock

from fasttune.patching.families import _bert_like as shared
from fasttune.patching.families._activations import why_no_gelu
from fasttune.patching.rows import (
    all_rows,
    first_row,
    for_the_caller,
    labelled,
    labelled_and_first,
    labelled_next,
    labelled_tokens,
)


class BertEmbeddings(shared.SumNormDropout, stock.BertEmbeddings): ...


class BertLayer(shared.PackedLayer, stock.BertLayer): ...


class BertSelfOutput(shared.DenseDropoutAddNorm, stock.BertSelfOutput): ...


class BertOutput(shared.DenseDropoutAddNorm, stock.BertOutput): ...


class BertIntermediate(shared.DenseGelu, stock.BertIntermediate): ...


class BertPredictionHeadTransform(shared.DenseGeluNorm, stock.BertPredictionHeadTransform): ...


FAMILY = shared.bert_like(
    "bert",
    stock,
    globals(),
    prefix="Bert",
    vocabulary="decoder",
    transform="BertPredictionHeadTransform",
    transform_unsuited=why_no_gelu("transform_act_fn"),
    heads={
        "BertModel": for_the_caller,
        "BertForMaskedLM": labelled,
        "BertForPreTraining": labelled_and_first,
        "BertLMHeadModel": labelled_next,
        "BertForNextSentencePrediction": first_row,
        "BertForSequenceClassification": first_row,
        "BertForMultipleChoice": first_row,
        "BertForTokenClassification": labelled_tokens,
        "BertForQuestionAnswering": all_rows,
    },
)
