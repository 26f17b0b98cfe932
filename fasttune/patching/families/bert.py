"""BERT."""

from transformers.models.bert import modeling_bert as stock

from fasttune.patching.families import _bert_like as shared
from fasttune.patching.families._activations import why_no_gelu
from fasttune.patching.rows import all_rows, first_row, labelled, labelled_and_first, labelled_next


class BertEmbeddings(shared.SumNormDropout, stock.BertEmbeddings): ...


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
        "BertModel": all_rows,
        "BertForMaskedLM": labelled,
        "BertForPreTraining": labelled_and_first,
        "BertLMHeadModel": labelled_next,
        "BertForNextSentencePrediction": first_row,
        "BertForSequenceClassification": first_row,
        "BertForMultipleChoice": first_row,
        "BertForTokenClassification": labelled,
        "BertForQuestionAnswering": all_rows,
    },
)
